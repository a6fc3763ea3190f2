"""The training loop: the only one, for every method. It knows steps, and nothing of diffusion."""

import logging
import random
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import Any, Final

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler
from tqdm import tqdm

from library.errors import UserError
from library.randomness import key
from library.runtime import Runtime
from library.training.method import Hook, MicroBatch, StepShape, TrainingMethod
from library.training.optimizers import FOUND_RATE, learning_rates
from library.training.progress import Moment, RunLength
from library.training.signals import Interruption
from library.training.tracking import LossAverage
from library.training.updates import StepFacts, Update

log = logging.getLogger(__name__)

MOST_SKIPPED: Final = 40
"""Steps in a row that may be left out: an fp16 scaler halves its scale, 2^16 to begin with, each time."""


def fit(
    method: TrainingMethod,
    batches: Iterable[MicroBatch],
    *,
    length: RunLength,
    shape_of: Callable[[int], StepShape],
    optimizer: Any,
    schedule: LRScheduler,
    update: Update,
    runtime: Runtime,
    start_step: int = 0,
    hooks: Sequence[Hook] = (),
    name_examples: Callable[[Sequence[int]], Sequence[str]] = lambda examples: list(map(str, examples)),
    interruption: Interruption | None = None,
    losses: LossAverage | None = None,
) -> int:
    """Train from ``start_step`` to the end of the run, or until asked to stop.

    Args:
        method: What is trained; its module and ``optimizer`` are already prepared by Accelerate.
        batches: The micro-batches of this process from ``start_step`` on, in order.
        length: Length of the run.
        shape_of: How the step with a given index (from 0) is put together.
        optimizer: The prepared optimizer.
        schedule: The learning rates, advanced once an optimizer step; not prepared (Accelerate would advance it once
            a process).
        update: How gradients change the weights.
        runtime: Processes and precision.
        start_step: Number of steps already done.
        hooks: Called in order after every step.
        name_examples: File names for the numbers of examples, for messages.
        interruption: Asked after every step whether to stop, or to save.
        losses: The mean loss of the run so far.

    Returns:
        The number of finished steps; less than ``length.total_steps`` when interrupted.

    Raises:
        UserError: The loss or the gradient is not finite, or always was where such steps are left out.
    """
    interruption = interruption or Interruption()
    average = losses or LossAverage()
    stream = iter(batches)
    progress = _progress_bar(length.total_steps, start_step, is_shown=runtime.is_main)
    step, left_out = start_step, _LeftOut()
    with progress:
        while step < length.total_steps:
            shape = shape_of(step)
            try:
                micro_batches = list(islice(stream, shape.micro_batches))
            except UserError:
                if interruption.requested:
                    # A signal to the whole process group has ended the loader's workers, too.
                    break
                raise
            assert micro_batches, "the plan promised more batches"
            assert {batch.step for batch in micro_batches} == {step}, "batches are not those of the step"
            with update.watching(step):
                loss, asked = _accumulate(method.module, micro_batches, shape, runtime, interruption)
            rates = learning_rates(optimizer)
            names = _Names(name_examples, micro_batches)
            gradient_norm = update.apply(StepFacts(step=step, loss=loss, images=names))
            left_out.add(names, was_skipped=update.was_skipped)
            metrics = method.after_step(step + 1)
            # From here on the weights are those of a finished step, whatever fails.
            update.done, update.has_begun = step + 1, False
            schedule.step()
            epoch = length.epoch_of(step)
            average.add(step=step % length.steps_per_epoch, loss=loss)
            step += 1
            moment = Moment(
                step=step,
                epoch=epoch,
                epoch_ended=step % length.steps_per_epoch == 0,
                finished=step == length.total_steps,
                loss=loss,
                average_loss=average.value,
                learning_rates=rates,
                metrics={**metrics, **left_out.metrics, "gradient_norm": gradient_norm},
                interrupted=asked.stop,
                save_requested=asked.save,
                skipped=update.was_skipped,
            )
            progress.set_postfix(avr_loss=f"{average.value:.4f}", lr=_shown_rate(rates), refresh=False)
            progress.update()
            for hook in hooks:
                hook(moment)
            if asked.stop:
                break
    if left_out.total:
        log.info("steps left out because loss or gradient was not finite: %d of %d", left_out.total, step - start_step)
    return step


def _progress_bar(total: int, done: int, *, is_shown: bool) -> Any:
    bar = tqdm(total=total, initial=done, desc="steps", smoothing=0.1, disable=not is_shown)
    # The time of day, which it goes by, may be set while it runs.
    bar._time = time.monotonic
    bar.start_t = bar.last_print_t = bar._time()
    return bar


@dataclass(frozen=True, slots=True)
class _Asked:
    """What signals to any of the processes ask for."""

    stop: bool
    save: bool


class _Names:
    """File names of the examples in ``micro_batches``, looked up only for a message."""

    def __init__(self, name_examples: Callable[[Sequence[int]], Sequence[str]], batches: Sequence[MicroBatch]) -> None:
        self._name_examples = name_examples
        self._batches = batches

    def __str__(self) -> str:
        return ", ".join(self._name_examples([number for batch in self._batches for number in batch.examples]))


def _accumulate(
    module: nn.Module,
    micro_batches: Sequence[MicroBatch],
    shape: StepShape,
    runtime: Runtime,
    interruption: Interruption,
) -> tuple[float, _Asked]:
    """Add up the gradients of a step; gradients are exchanged between processes with the last micro-batch only.

    Returns:
        The mean loss over the examples of all processes, and what any of them was asked for.
    """
    accelerator = runtime.accelerator
    total = torch.zeros(3, device=runtime.device)
    for index, batch in enumerate(micro_batches):
        last = index == len(micro_batches) - 1
        with nullcontext() if last else accelerator.no_sync(module):
            # Dropout and third-party adapters draw from the global generators: they are set by address, too.
            seed = key(runtime.seed, "step", batch.step, *batch.examples)
            random.seed(seed)
            torch.manual_seed(seed)
            # Only now, so that the GPU holds one of them at a time.
            loss = module(batch.to(runtime.device)).sum()
            # DDP averages gradients over processes: times world makes the sum, and the step's mean is over examples.
            accelerator.backward(loss * (runtime.world / shape.examples))
        total[0] += loss.detach()
    total[1], total[2] = float(interruption.requested), float(interruption.take_save_request())
    loss_sum, stop, save = accelerator.reduce(total, reduction="sum").tolist()
    return loss_sum / shape.examples, _Asked(stop=stop > 0, save=save > 0)


class _LeftOut:
    """Counts the steps that were left out."""

    def __init__(self) -> None:
        self.total = 0
        self._in_a_row = 0

    def add(self, names: _Names, *, was_skipped: bool) -> None:
        """Take in a step.

        Raises:
            UserError: All are left out: the weights are spoilt, or fp16 overflows whatever the scale.
        """
        self._in_a_row = self._in_a_row + 1 if was_skipped else 0
        self.total += was_skipped
        if self._in_a_row >= MOST_SKIPPED:
            raise UserError(
                f"loss or gradient was not finite in {self._in_a_row} steps in a row",
                where=f"images: {names}",
                remedy="Use bf16 or fp32 instead of fp16, or lower the learning rate. What was saved before is good.",
            )

    @property
    def metrics(self) -> dict[str, float]:
        """Their number, once there are any."""
        return {"skipped_steps": float(self.total)} if self.total else {}


def _shown_rate(rates: dict[str, float]) -> str:
    """One number when all groups share a rate, otherwise the range; of rates that are found, those."""
    found = [rate for name, rate in rates.items() if name.startswith(FOUND_RATE)] or list(rates.values())
    low, high = min(found), max(found)
    return f"{low:.2e}" if low == high else f"{low:.1e}..{high:.1e}"
