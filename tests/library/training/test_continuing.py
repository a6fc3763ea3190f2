"""Every optimizer with every schedule: six steps straight equal three, a state on the disk, and three more."""

import hashlib
import importlib.util
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn

from library.errors import UserError
from library.training.lr_schedulers import build_lr_scheduler
from library.training.optimizer_kinds import KINDS
from library.training.optimizers import build_optimizer, result_weights
from library.training.options import OptimizerOptions, SchedulerOptions
from library.training.rates import check_rates, settled_schedule
from library.training.restoring import restore
from library.training.states import TrainingState, read_state, write_state

STEPS = 6
OPTIMIZERS = [*(kind.name for kind in KINDS), "NAdam", "bitsandbytes.optim.AdEMAMix8bit"]
SCHEDULES = {
    "constant": {},
    "constant_with_warmup": {"lr_warmup_steps": 2},
    "linear": {"lr_warmup_steps": 0.2},
    "cosine": {},
    "cosine_with_restarts": {"lr_scheduler_num_cycles": 2},
    "polynomial": {"lr_scheduler_power": 2.0},
    "inverse_sqrt": {"lr_warmup_steps": 1},
    "cosine_with_min_lr": {"lr_scheduler_min_lr_ratio": 0.1},
    "warmup_stable_decay": {"lr_decay_steps": 2},
    "piecewise_constant": {"lr_scheduler_args": ("step_rules=1:2,0.5:4,0.25",)},
    "StepLR": {"lr_scheduler_args": ("step_size=2",)},
    "MultiStepLR": {"lr_scheduler_args": ("milestones=[1,4]",)},
    "ExponentialLR": {"lr_scheduler_args": ("gamma=0.9",)},
    "CosineAnnealingLR": {"lr_scheduler_args": ("T_max=6",)},
    "CosineAnnealingWarmRestarts": {"lr_scheduler_args": ("T_0=4",)},
    "LinearLR": {},
    "ConstantLR": {},
    "PolynomialLR": {},
    "OneCycleLR": {"lr_scheduler_args": ("max_lr=0.02", "total_steps=9", "cycle_momentum=False")},
    "CyclicLR": {"lr_scheduler_args": ("base_lr=0.001", "max_lr=0.02", "step_size_up=2", "cycle_momentum=False")},
}
# With a rate of 0 in one of their first six steps, which DAdaptSGD does not stand: see the test below.
WITH_ZERO = ("constant_with_warmup", "linear", "inverse_sqrt", "PolynomialLR")
# Rates of a size that changes the toy visibly within six steps.
RATES = {kind.name: 1.0 for kind in KINDS if kind.finds_rate}


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hundreds of states are written, and none has to outlive a power failure."""
    monkeypatch.setattr("os.fsync", lambda file: None)


@dataclass
class Rates:
    optimizer: OptimizerOptions
    scheduler: SchedulerOptions


def rates(optimizer: str, schedule: str, **more) -> Rates:
    place = "lr_scheduler_type" if schedule[0].isupper() else "lr_scheduler"
    return Rates(
        OptimizerOptions(optimizer_type=optimizer, learning_rate=RATES.get(optimizer, 1e-2), **more),
        SchedulerOptions(**{place: schedule}, **SCHEDULES.get(schedule, {})),
    )


def pairs():
    for name in OPTIMIZERS:
        kind = next((kind for kind in KINDS if kind.name == name), None)
        package = "torch" if kind is None else kind.module.partition(".")[0]
        missing = pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=f"{package} is not installed")
        # The others have one schedule, whatever is asked for: see the tests below.
        single = kind is not None and (kind.schedule_free or kind.relative_step)
        for schedule in ("constant",) if single else SCHEDULES:
            if name == "DAdaptSGD" and schedule in WITH_ZERO:
                continue
            yield pytest.param(name, schedule, id=f"{name}-{schedule}", marks=missing)


@pytest.mark.parametrize("schedule", [name for name in WITH_ZERO if name.islower()])
def test_why_dadapt_sgd_has_no_warmup(schedule: str) -> None:
    """Its step divides by the norm of the gradients that have a rate, and fails where none has."""
    pytest.importorskip("dadaptation")
    options = rates("DAdaptSGD", schedule)
    (problem,) = check_rates(options)
    assert problem.what.startswith("DAdaptSGD fails in a step with a learning rate of 0")
    with pytest.raises(ZeroDivisionError):
        Run(options).train(1)


class Run:
    """A small run of which every part can be thrown away and made again."""

    def __init__(self, options: Rates) -> None:
        torch.manual_seed(0)
        self.module = nn.Sequential(nn.Linear(64, 72), nn.Tanh(), nn.Linear(72, 64))
        first, last = self.module[0].parameters(), self.module[2].parameters()
        rate = options.optimizer.learning_rate
        groups = [{"params": list(first), "lr": rate, "name": "one"}, {"params": list(last), "lr": rate, "name": "two"}]
        self.optimizer = build_optimizer(options.optimizer, groups).optimizer
        self.schedule = build_lr_scheduler(settled_schedule(options), self.optimizer, STEPS)
        self.step = 0
        self.rates = []

    def train(self, steps: int) -> "Run":
        for _ in range(steps):
            inputs = torch.randn(4, 64, generator=torch.Generator().manual_seed(self.step))
            self.rates.append([float(group["lr"]) for group in self.optimizer.param_groups])
            nn.functional.mse_loss(self.module(inputs), inputs.sin()).backward()
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            self.schedule.step()
            self.step += 1
        return self

    def save(self, folder: Path) -> Path:
        state = TrainingState(
            step=self.step,
            epoch=1,
            tensors=self.module.state_dict(),
            optimizer=self.optimizer.state_dict(),
            scheduler=self.schedule.state_dict(),
        )
        write_state(folder, state)
        return folder

    def resume(self, folder: Path) -> "Run":
        state = read_state(folder)
        self.module.load_state_dict(dict(state.tensors))
        restore(state, optimizer=self.optimizer, scheduler=self.schedule)
        self.step = state.step
        return self

    @property
    def hash(self) -> str:
        digest = hashlib.sha256()
        for tensor in self.module.state_dict().values():
            digest.update(tensor.numpy().tobytes())
        return digest.hexdigest()


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported")
@pytest.mark.parametrize(("optimizer", "schedule"), list(pairs()))
def test_continuing_equals_the_uninterrupted_run(optimizer: str, schedule: str, tmp_path: Path) -> None:
    options = rates(optimizer, schedule)
    assert check_rates(options) == []
    whole = Run(options).train(3)
    folder = whole.save(tmp_path / "at-state")
    whole.train(3)
    continued = Run(options).resume(folder).train(3)
    assert continued.hash == whole.hash
    assert continued.rates == whole.rates[3:]
    assert whole.hash != Run(options).hash, "something has been trained"


@pytest.mark.parametrize("schedule", [name for name in SCHEDULES if name != "constant"])
@pytest.mark.parametrize("optimizer", ["AdaFactor", *(kind.name for kind in KINDS if kind.schedule_free)])
def test_optimizers_that_have_a_schedule_of_their_own_keep_it(optimizer: str, schedule: str) -> None:
    if optimizer != "AdaFactor":
        pytest.importorskip("schedulefree")
    options = rates(optimizer, schedule)
    settled = settled_schedule(options)
    if optimizer != "AdaFactor":
        assert settled == SchedulerOptions()
    elif options.scheduler.lr_warmup_steps:
        assert [problem.where for problem in check_rates(options)] == ["--lr_warmup_steps"]
    else:
        assert settled == SchedulerOptions(lr_scheduler="adafactor:0.01")


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_adafactor_with_a_given_rate_follows_every_schedule(schedule: str, tmp_path: Path) -> None:
    options = rates("AdaFactor", schedule, optimizer_args=("relative_step=False", "scale_parameter=False"))
    assert check_rates(options) == []
    folder = Run(options).train(3).save(tmp_path / "at-state")
    assert Run(options).resume(folder).train(3).hash == Run(options).train(STEPS).hash


@pytest.mark.parametrize("optimizer", [kind.name for kind in KINDS if kind.schedule_free])
def test_saving_a_result_in_between_changes_nothing(optimizer: str) -> None:
    pytest.importorskip("schedulefree")
    # RAdam leaves the weights alone for its first steps, unless it is told to make them.
    arguments = ("silent_sgd_phase=False",) if optimizer == "RAdamScheduleFree" else ()
    options = rates(optimizer, "constant", optimizer_args=arguments)
    run = Run(options).train(2)
    with result_weights(run.optimizer):
        result = run.hash
    assert result != run.hash
    assert run.train(4).hash == Run(options).train(STEPS).hash


@pytest.mark.parametrize(
    ("before", "after"),
    [("cosine", "StepLR"), ("StepLR", "linear"), ("MultiStepLR", "OneCycleLR"), ("OneCycleLR", "constant")],
)
def test_another_schedule_takes_over_at_its_own_place(before: str, after: str, tmp_path: Path) -> None:
    folder = Run(rates("AdamW", before)).train(3).save(tmp_path / "at-state")
    found = Run(rates("AdamW", after)).resume(folder).train(3).rates
    assert found == [pytest.approx(rate) for rate in Run(rates("AdamW", after)).train(STEPS).rates[3:]]


@pytest.mark.parametrize("schedule", ["cosine", "StepLR", "ExponentialLR"])
def test_a_changed_rate_holds_from_the_state_on(schedule: str, tmp_path: Path) -> None:
    options = rates("AdamW", schedule)
    folder = Run(options).train(3).save(tmp_path / "at-state")
    halved = Rates(OptimizerOptions(optimizer_type="AdamW", learning_rate=5e-3), options.scheduler)
    found = Run(halved).resume(folder).train(3).rates
    whole = Run(options).train(STEPS).rates[3:]
    assert found == [pytest.approx([rate / 2 for rate in rates]) for rates in whole]


@pytest.mark.parametrize(("before", "after"), [("Lion", "AdamW"), ("AdamW", "SGDNesterov")])
def test_a_state_of_another_optimizer_is_refused(before: str, after: str, tmp_path: Path) -> None:
    folder = Run(rates(before, "constant")).train(1).save(tmp_path / "at-state")
    with pytest.raises(UserError, match="another optimizer"):
        Run(rates(after, "constant")).resume(folder)
