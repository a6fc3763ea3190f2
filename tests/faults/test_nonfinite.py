"""A loss or a gradient that is not finite: the run stops with a state, or leaves the step out, by option."""

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from library.errors import UserError
from library.files import read_tensors
from library.messages import kept_messages
from library.runtime import Runtime
from library.training.loop import MOST_SKIPPED, fit
from library.training.method import StepShape
from library.training.progress import Moment, RunLength
from library.training.states import read_state
from library.training.updates import StepFacts, WholeUpdate
from tests.faults.runs import RESULT, arguments, names, train
from tests.fresh import forget_accelerate
from tests.library.training.test_loop import Batch, Method, batches
from tests.scripts.runs import read_scalars

SKIP = "--on_nonfinite=skip"


def spoil(monkeypatch: pytest.MonkeyPatch, *steps: int, value: float = math.nan) -> None:
    """Let the loss of the first example of these steps, from 1, not be finite."""
    from library.task import DenoisingTask

    original = DenoisingTask.losses

    def losses(self: Any, batch: Any, context: Tensor) -> Tensor:
        found = original(self, batch, context)
        factor = torch.ones_like(found)
        factor[0] = value if batch.step + 1 in steps else 1.0
        return found * factor

    monkeypatch.setattr(DenoisingTask, "losses", losses)


def test_the_run_stops_with_a_state_and_may_then_leave_the_step_out(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = arguments(model, tmp_path, "--ema", "--optimizer_type=AdamW", "--lr_scheduler=cosine")
    spoil(monkeypatch, 3, value=math.inf)
    with pytest.raises(UserError, match="the loss is not finite at step 3") as caught:
        train(tmp_path / "out", *given)
    assert ".png, " in str(caught.value)
    assert "--on_nonfinite skip" in str(caught.value)
    kept = tmp_path / "out" / "thing-step00000002-state"
    assert read_state(kept).step == 2
    continued = train(tmp_path / "out", *given, SKIP, f"--resume={kept}")
    whole = train(tmp_path / "whole", *given, SKIP, "--save_every_n_steps=1", "--save_state")
    assert continued.tensor_hash(RESULT) == whole.tensor_hash(RESULT)
    assert continued.tensor_hash("thing-ema.safetensors") == whole.tensor_hash("thing-ema.safetensors")
    # Neither weights nor moments nor average moved in the third step; the schedule did.
    before, after = (read_state(whole.folder / f"thing-step0000000{step}-state") for step in (2, 3))
    assert all(torch.equal(before.tensors[name], tensor) for name, tensor in after.tensors.items())
    for number, moments in after.optimizer["state"].items():
        for name, moment in moments.items():
            assert torch.equal(moment, before.optimizer["state"][number][name])
    last = read_state(whole.folder / "thing-step00000004-state")
    assert [state.ema_updates for state in (before, after, last)] == [2, 2, 3]
    assert after.scheduler["last_epoch"] == before.scheduler["last_epoch"] + 1
    assert read_scalars(whole.folder / "log", "skipped_steps") == [1, 1]
    assert all(map(math.isfinite, read_scalars(whole.folder / "log", "loss/average")))


def test_a_step_that_is_left_out_names_its_images(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(monkeypatch, 1, 2, 3, 4)
    run = train(tmp_path / "out", *arguments(model, tmp_path), SKIP)
    assert run.code == 0
    said = [message.text for message in kept_messages() if "the step is left out" in message.text]
    assert len(said) == 4
    named = [text.rpartition("images: ")[2].split(", ") for text in said]
    assert sorted(name for some in named for name in some) == sorted(
        path.name for path in (tmp_path / "images").glob("*.png")
    )
    # A LoRA that has learnt nothing does nothing.
    tensors = read_tensors(run.folder / RESULT).tensors
    assert not any(bool(tensor.any()) for name, tensor in tensors.items() if "lora_up" in name)


def test_weights_that_are_not_finite_are_never_saved(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from networks.training import NetworkTraining

    def spoil_weights(self: NetworkTraining, step: int) -> dict[str, float]:
        if step == 3:
            next(self.trained.parameters()).data.fill_(math.nan)
        return {}

    monkeypatch.setattr(NetworkTraining, "after_step", spoil_weights)
    given = arguments(model, tmp_path, "--save_every_n_steps=1", "--save_state")
    with pytest.raises(UserError, match="refusing to save"):
        train(tmp_path / "out", *given)
    assert {name for name in names(tmp_path / "out") if "step" in name} == {
        f"thing-step0000000{step}{suffix}" for step in (1, 2) for suffix in (".safetensors", "-state")
    }


def test_a_schedule_that_fails_costs_no_weights(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The step before it is made by then, and the model of a whole run may hang on it."""
    whole = train(tmp_path / "whole", *arguments(model, tmp_path, "--save_every_n_steps=1"))

    class Failing(LambdaLR):
        def step(self, *given: Any) -> None:
            if self.last_epoch == 2:
                raise ZeroDivisionError
            super().step(*given)

    monkeypatch.setattr("torch.optim.lr_scheduler.LambdaLR", Failing)
    with pytest.raises(ZeroDivisionError):
        train(tmp_path / "out", *arguments(model, tmp_path))
    name = "thing-step00000003.safetensors"
    saved, expected = (read_tensors(folder / name).tensors for folder in (tmp_path / "out", whole.folder))
    assert saved.keys() == expected.keys()
    assert all(torch.equal(saved[key], expected[key]) for key in saved)
    assert read_state(tmp_path / "out" / "thing-step00000003-state").step == 3


def fitted(stream: list[Batch], *, rate: Callable[[int], float] = lambda step: 1.0, **more: Any) -> Tensor:
    """The weights after training on ``stream`` with AdamW, leaving out steps that are not finite."""
    from accelerate import Accelerator

    forget_accelerate()
    runtime = Runtime(Accelerator(cpu=True, step_scheduler_with_optimizer=False), torch.float32, 7)
    method = Method()
    optimizer = torch.optim.AdamW(method.param_groups(), lr=0.1)
    method.module, prepared = runtime.accelerator.prepare(method.module, optimizer)
    fit(
        method,
        stream,
        length=RunLength(total_steps=len(stream), steps_per_epoch=2),
        shape_of=lambda step: StepShape(micro_batches=1, examples=4),
        optimizer=prepared,
        schedule=LambdaLR(optimizer, rate),
        runtime=runtime,
        update=WholeUpdate(prepared, runtime, max_grad_norm=1.0, skips=True),
        **more,
    )
    return next(method.trained.parameters()).detach().clone()


def test_a_step_left_out_is_a_step_that_was_not_made() -> None:
    stream = batches(5)
    stream[2] = Batch(2, (1,), torch.full((4, 3), math.nan))
    moments: list[Moment] = []
    found = fitted(stream, rate=lambda step: 0.5**step, hooks=[moments.append])
    # The same steps without it, at the rates that they had.
    kept = [0, 1, 3, 4]
    shorter = [Batch(place, (1,), batches(5)[step].x) for place, step in enumerate(kept)]
    assert torch.equal(found, fitted(shorter, rate=lambda place: 0.5 ** [*kept, 5][place]))
    assert [moment.skipped for moment in moments] == [False, False, True, False, False]
    assert all(math.isfinite(moment.average_loss) for moment in moments)


def test_the_run_ends_when_every_step_is_left_out() -> None:
    count = MOST_SKIPPED + 5
    stream = [Batch(step, (1,), torch.full((4, 3), math.nan)) for step in range(count)]
    moments: list[Moment] = []
    with pytest.raises(UserError, match=f"not finite in {MOST_SKIPPED} steps in a row"):
        fitted(stream, hooks=[moments.append])
    assert len(moments) == MOST_SKIPPED - 1


def test_an_fp16_scaler_goes_on_after_a_step_that_is_left_out() -> None:
    """Its scale falls, as for a gradient that overflows, and the next step is made."""
    from accelerate import Accelerator
    from accelerate.optimizer import AcceleratedOptimizer

    Accelerator(cpu=True)
    layer = nn.Linear(3, 1, bias=False)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = AcceleratedOptimizer(torch.optim.SGD(layer.parameters(), lr=0.1), scaler=scaler)

    def clip(parameters: Any, limit: float) -> Tensor:
        scaler.unscale_(optimizer.optimizer)
        return nn.utils.clip_grad_norm_(parameters, limit)

    accelerator = SimpleNamespace(scaler=scaler, clip_grad_norm_=clip, num_processes=1)
    update = WholeUpdate(optimizer, Runtime(accelerator, torch.float16, 7), max_grad_norm=1.0, skips=True)
    weights = [layer.weight.detach().clone()]
    skipped = []
    for step, factor in enumerate((1.0, math.nan, 1.0)):
        loss = layer(torch.ones(1, 3)).square().mean() * factor
        scaler.scale(loss).backward()
        update.apply(StepFacts(step=step, loss=float(loss), images="a.png"))
        weights.append(layer.weight.detach().clone())
        skipped.append(update.was_skipped)
    assert skipped == [False, True, False]
    assert scaler.get_scale() == 512
    assert torch.equal(weights[1], weights[2])
    assert not torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[2], weights[3])


def test_weights_changed_within_the_backward_pass_cannot_be_left_out(model: Path, tmp_path: Path) -> None:
    given = arguments(model, tmp_path, SKIP, "--fused_backward_pass", "--max_grad_norm=0")
    with pytest.raises(UserError, match="--fused_backward_pass cannot leave out a step"):
        train(tmp_path / "out", *given)
