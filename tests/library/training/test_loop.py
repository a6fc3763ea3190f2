"""The loop, with one linear layer in place of a diffusion model."""

import math
import os
import signal
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from library.errors import UserError
from library.runtime import Runtime
from library.training.loop import MOST_SKIPPED, fit
from library.training.method import Hook, StepShape
from library.training.progress import Moment, RunLength
from library.training.signals import Interruption
from library.training.updates import WholeUpdate
from tests.fresh import forget_accelerate


@dataclass(frozen=True)
class Batch:
    step: int
    examples: tuple[int, ...]
    x: Tensor

    def to(self, device: torch.device) -> "Batch":
        return self


class Squares(nn.Module):
    """Loss of an example: the square of a linear function of it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 1, bias=False)
        nn.init.constant_(self.layer.weight, 0.5)

    def forward(self, batch: Batch) -> Tensor:
        return self.layer(batch.x).square().flatten()


class Method:
    def __init__(self) -> None:
        self.module: nn.Module = Squares()
        self.trained = self.module
        self.steps: list[int] = []

    def param_groups(self) -> list[dict[str, Any]]:
        return [{"params": list(self.module.parameters()), "lr": 0.1, "name": "layer"}]

    def after_step(self, step: int) -> dict[str, float]:
        self.steps.append(step)
        return {"extra": float(step)}

    def save(self, path: Path, metadata: Any) -> None:
        raise AssertionError("the loop saves nothing itself")


def examples(step: int, count: int = 4) -> Tensor:
    return torch.randn(count, 3, generator=torch.Generator().manual_seed(step))


def batches(steps: int, parts: int = 1) -> list[Batch]:
    return [
        Batch(step, tuple(range(part, 4, parts)), chunk)
        for step in range(steps)
        for part, chunk in enumerate(examples(step).chunk(parts))
    ]


def train(
    stream: list[Batch],
    *,
    steps: int = 4,
    parts: int = 1,
    max_grad_norm: float = 0.0,
    hooks: tuple[Hook, ...] = (),
    start_step: int = 0,
    interruption: Interruption | None = None,
    decay: Callable[[int], float] = lambda step: 1.0,
) -> tuple[Method, int]:
    from accelerate import Accelerator

    forget_accelerate()
    runtime = Runtime(Accelerator(cpu=True, step_scheduler_with_optimizer=False), torch.float32, 7)
    method = Method()
    optimizer = torch.optim.SGD(method.param_groups())
    schedule = LambdaLR(optimizer, decay)
    method.module, prepared = runtime.accelerator.prepare(method.module, optimizer)
    done = fit(
        method,
        stream,
        length=RunLength(total_steps=steps, steps_per_epoch=2),
        shape_of=lambda step: StepShape(micro_batches=parts, examples=4),
        optimizer=prepared,
        schedule=schedule,
        runtime=runtime,
        start_step=start_step,
        update=WholeUpdate(prepared, runtime, max_grad_norm=max_grad_norm),
        hooks=hooks,
        interruption=interruption,
        name_examples=lambda numbers: [f"image{number}.png" for number in numbers],
    )
    return method, done


def weight(method: Method) -> Tensor:
    return next(method.trained.parameters()).detach().clone()


def by_hand(steps: int, max_norm: float = math.inf, decay: Callable[[int], float] = lambda step: 1.0) -> Tensor:
    """The same training written out: plain gradient descent on the mean over the examples."""
    w = torch.full((1, 3), 0.5)
    for step in range(steps):
        x = examples(step)
        gradient = (2 * (x @ w.T) * x).mean(0, keepdim=True)
        norm = gradient.norm()
        w = w - 0.1 * decay(step) * gradient * min(1.0, max_norm / norm.item())
    return w


def test_training_is_gradient_descent_on_the_mean() -> None:
    method, done = train(batches(4))
    assert done == 4
    assert torch.allclose(weight(method), by_hand(4), atol=1e-6)


def test_accumulated_micro_batches_are_one_batch() -> None:
    method, _ = train(batches(4, parts=2), parts=2)
    assert torch.allclose(weight(method), by_hand(4), atol=1e-6)


def test_gradients_are_clipped_to_the_norm() -> None:
    method, _ = train(batches(4), max_grad_norm=0.05)
    assert torch.allclose(weight(method), by_hand(4, max_norm=0.05), atol=1e-6)


def test_the_schedule_advances_once_a_step() -> None:
    method, _ = train(batches(4, parts=2), parts=2, decay=lambda step: 0.5**step)
    assert torch.allclose(weight(method), by_hand(4, decay=lambda step: 0.5**step), atol=1e-6)


def test_hooks_see_every_step_in_order() -> None:
    moments: list[Moment] = []
    order: list[str] = []
    method, _ = train(batches(3), steps=3, hooks=(moments.append, lambda moment: order.append("second")))
    assert [(m.step, m.epoch, m.epoch_ended, m.finished) for m in moments] == [
        (1, 1, False, False),
        (2, 1, True, False),
        (3, 2, False, True),
    ]
    x = examples(0)
    assert moments[0].loss == pytest.approx((x.sum(1) * 0.5).square().mean().item())
    assert moments[1].average_loss == pytest.approx((moments[0].loss + moments[1].loss) / 2)
    assert moments[0].learning_rates == {"layer": pytest.approx(0.1)}
    assert moments[2].metrics["extra"] == 3
    assert moments[0].metrics["gradient_norm"] > 0
    assert len(order) == 3
    assert method.steps == [1, 2, 3]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_before_the_step(value: float) -> None:
    stream = batches(4)
    stream[2] = Batch(2, (5, 6), torch.full((4, 3), value))
    moments: list[Moment] = []
    with pytest.raises(UserError, match="not finite at step 3") as error:
        train(stream, hooks=(moments.append,))
    assert "image5.png, image6.png" in str(error.value)
    assert [moment.step for moment in moments] == [1, 2]


def test_fp16_steps_that_all_overflow_end_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scaler leaves them out one by one; nothing would be trained, and nothing said."""
    monkeypatch.setattr("accelerate.optimizer.AcceleratedOptimizer.step_was_skipped", True)
    moments: list[Moment] = []
    with pytest.raises(UserError, match=f"{MOST_SKIPPED} steps in a row"):
        train(batches(2 * MOST_SKIPPED), steps=2 * MOST_SKIPPED, hooks=(moments.append,))
    assert len(moments) == MOST_SKIPPED - 1


def test_a_run_begins_where_it_is_told() -> None:
    moments: list[Moment] = []
    _, done = train(batches(4)[2:], start_step=2, hooks=(moments.append,))
    assert [moment.step for moment in moments] == [3, 4]
    assert done == 4


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_and_stops(number: int) -> None:
    moments: list[Moment] = []

    def stop_in_the_second_step(moment: Moment) -> None:
        moments.append(moment)
        if moment.step == 1:
            os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    with Interruption().watched() as interruption:
        _, done = train(batches(4), hooks=(stop_in_the_second_step,), interruption=interruption)
    assert done == 2
    assert interruption.exit_code == 128 + number
    assert signal.getsignal(number) == before


def test_a_loader_that_ends_with_the_signal_is_no_error() -> None:
    def stream():
        yield from batches(2)
        os.kill(os.getpid(), signal.SIGTERM)
        raise UserError("a worker ended unexpectedly")

    with Interruption().watched() as interruption:
        _, done = train(stream(), interruption=interruption)
    assert done == 2
    assert interruption.exit_code == 143
    with pytest.raises(UserError, match="worker"):
        train(iter_then_fail())


def iter_then_fail():
    yield from batches(2)
    raise UserError("a worker ended unexpectedly")


def test_a_second_signal_stops_at_once() -> None:
    with Interruption().watched():
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_epochs_win_over_steps() -> None:
    by_steps = RunLength.of(max_train_steps=10, max_train_epochs=None, steps_per_epoch=4)
    by_epochs = RunLength.of(max_train_steps=10, max_train_epochs=2, steps_per_epoch=4)
    assert (by_steps.total_steps, by_steps.epochs) == (10, 3)
    assert (by_epochs.total_steps, by_epochs.epochs) == (8, 2)
    assert [by_steps.epoch_of(step) for step in (0, 3, 4, 9)] == [1, 1, 2, 3]


def test_a_step_holds_one_of_its_batches_on_the_device_at_a_time() -> None:
    moved: list[weakref.ref[Tensor]] = []
    alive: list[int] = []

    @dataclass(frozen=True)
    class Counted(Batch):
        def to(self, device: torch.device) -> Batch:
            alive.append(sum(one() is not None for one in moved))
            copy = self.x.clone()
            moved.append(weakref.ref(copy))
            return Batch(self.step, self.examples, copy)

    plain = batches(2, parts=4)
    method, _ = train([Counted(one.step, one.examples, one.x) for one in plain], steps=2, parts=4)
    assert alive == [0] * 8
    other, _ = train(plain, steps=2, parts=4)
    assert torch.equal(method.module.layer.weight, other.module.layer.weight)
