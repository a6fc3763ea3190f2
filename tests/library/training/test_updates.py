"""Weights updated within the backward pass, or kept in bf16: the same optimizer, in another order of work."""

import copy

import pytest
import torch
from torch import Tensor, nn

from library.errors import UserError
from library.runtime import Runtime
from library.training import updates
from library.training.optimizers import build_optimizer
from library.training.options import OptimizerOptions
from library.training.updates import FusedUpdate, StepFacts, Update, WholeUpdate

pytestmark = pytest.mark.usefixtures("accelerate_anew")

NAMES = ["AdamW", "AdamW8bit", "Lion", "SGDNesterov"]


@pytest.fixture
def runtime() -> Runtime:
    from accelerate import Accelerator

    return Runtime(Accelerator(cpu=True, step_scheduler_with_optimizer=False), torch.float32, 7)


def network(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 80), nn.Tanh(), nn.Linear(80, 1)).to(dtype)


def loss_of(module: nn.Module, step: int) -> Tensor:
    inputs = torch.randn(8, 64, generator=torch.Generator().manual_seed(step))
    dtype = next(module.parameters()).dtype
    return (module(inputs.to(dtype)).float() - inputs.sum(1, keepdim=True)).pow(2).mean()


def steps(module: nn.Module, update: Update, first: int, last: int) -> list[float]:
    norms = []
    for step in range(first, last):
        with update.watching(step):
            loss = loss_of(module, step)
            loss.backward()
        norms.append(update.apply(StepFacts(step=step, loss=float(loss.detach()), images="one.png")))
    return norms


def optimizer_for(name: str, module: nn.Module) -> torch.optim.Optimizer:
    first, *rest = module.parameters()
    groups = [{"params": [first], "lr": 1e-2, "name": "a"}, {"params": rest, "lr": 3e-3, "name": "b"}]
    return build_optimizer(OptimizerOptions(optimizer_type=name, learning_rate=1e-2), groups).optimizer


@pytest.mark.parametrize("name", NAMES)
def test_fused_steps_are_the_ordinary_ones(name: str, runtime: Runtime) -> None:
    plain, fused = network(), network()
    prepared = runtime.accelerator.prepare(optimizer_for(name, plain))
    norms = steps(plain, WholeUpdate(prepared, runtime, max_grad_norm=0), 0, 4)
    fused_norms = steps(fused, FusedUpdate(optimizer_for(name, fused), seed=7), 0, 4)
    for one, other in zip(plain.parameters(), fused.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    assert fused_norms == pytest.approx(norms, rel=1e-5)


def test_a_fused_pass_holds_one_gradient_at_a_time() -> None:
    module = network()
    update = FusedUpdate(optimizer_for("AdamW", module), seed=7)
    held = []

    def count(_: object) -> None:
        held.append(sum(parameter.grad is not None for parameter in module.parameters()))

    for parameter in module.parameters():
        parameter.register_post_accumulate_grad_hook(count)
    steps(module, update, 0, 1)
    assert held == [1, 1, 1, 1]
    assert all(parameter.grad is None for parameter in module.parameters())


def test_a_fused_pass_leaves_a_weight_whose_gradient_is_not_finite() -> None:
    module = network()
    before = copy.deepcopy(module.state_dict())
    update = FusedUpdate(optimizer_for("AdamW", module), seed=7)
    with update.watching(0):
        (loss_of(module, 0) * float("nan")).backward()
    with pytest.raises(UserError, match=r"the gradient is not finite at step 1"):
        update.apply(StepFacts(step=0, loss=1.0, images="one.png"))
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_bf16_weights_follow_the_fp32_ones_and_continue_exactly(name: str, fused: bool, runtime: Runtime) -> None:
    def update_for(module: nn.Module) -> tuple[torch.optim.Optimizer, Update]:
        optimizer = optimizer_for(name, module)
        if fused:
            return optimizer, FusedUpdate(optimizer, seed=7)
        return optimizer, WholeUpdate(runtime.accelerator.prepare(optimizer), runtime, max_grad_norm=0)

    wide, narrow, second = network(), network(torch.bfloat16), network(torch.bfloat16)
    steps(wide, update_for(wide)[1], 0, 6)
    steps(narrow, update_for(narrow)[1], 0, 6)

    optimizer, update = update_for(second)
    steps(second, update, 0, 3)
    weights, state = copy.deepcopy(second.state_dict()), copy.deepcopy(optimizer.state_dict())
    resumed = network(torch.bfloat16)
    resumed.load_state_dict(weights)
    again, update = update_for(resumed)
    from library.training.restoring import restore
    from library.training.states import TrainingState

    schedule = torch.optim.lr_scheduler.LambdaLR(again, lambda step: 1.0)
    kept = TrainingState(step=3, epoch=1, tensors={}, optimizer=state, scheduler=schedule.state_dict())
    restore(kept, optimizer=again, scheduler=schedule)
    steps(resumed, update, 3, 6)

    for one, other, third in zip(wide.parameters(), narrow.parameters(), resumed.parameters(), strict=True):
        assert other.dtype == torch.bfloat16
        assert torch.equal(other, third)
        # Rates of 1e-2 over 6 steps move a weight by up to 0.06.
        assert float((one - other.float()).abs().mean()) < 0.01


@pytest.mark.parametrize("name", NAMES)
def test_bf16_weights_stepped_in_portions_are_those_stepped_one_by_one(
    name: str, runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """5120, 80, 80 and 1 values in two groups: a portion ends with its group, or before it is too large."""

    def trained(portion: int) -> tuple[nn.Module, list[list[int]]]:
        monkeypatch.setattr(updates, "_PORTION", portion)
        module, sizes = network(torch.bfloat16), []
        optimizer = optimizer_for(name, module)
        optimizer.register_step_pre_hook(
            lambda of, *_: sizes.append([one.numel() for group in of.param_groups for one in group["params"]])
        )
        steps(module, WholeUpdate(optimizer, runtime, max_grad_norm=0), 0, 3)
        return module, sizes

    alone, singly = trained(0)
    assert singly == [[5120], [80], [80], [1]] * 3
    for portion, expected in ((1 << 24, [[5120], [80, 80, 1]]), (160, [[5120], [80, 80], [1]])):
        together, portions = trained(portion)
        assert portions == expected * 3
        for one, other in zip(alone.parameters(), together.parameters(), strict=True):
            assert torch.equal(one, other)


def test_a_bf16_weight_without_a_gradient_stays(runtime: Runtime) -> None:
    module = network(torch.bfloat16)
    before = copy.deepcopy(module.state_dict())
    optimizer = optimizer_for("AdamW", module)
    loss_of(module, 0).backward()
    module[2].weight.grad = None
    WholeUpdate(optimizer, runtime, max_grad_norm=0).apply(StepFacts(step=0, loss=1.0, images="one.png"))
    changed = {name for name, value in module.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"0.weight", "0.bias", "2.bias"}
    assert all(len(group["params"]) == count for group, count in zip(optimizer.param_groups, (1, 3), strict=True))


def test_coupled_optimizers_step_all_bf16_weights_together(runtime: Runtime) -> None:
    one, other = network(torch.bfloat16), network(torch.bfloat16)
    steps(one, WholeUpdate(optimizer_for("AdamW", one), runtime, max_grad_norm=0, coupled=True), 0, 3)
    steps(other, WholeUpdate(optimizer_for("AdamW", other), runtime, max_grad_norm=0), 0, 3)
    for first, second in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(first, second)
