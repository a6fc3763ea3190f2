"""Optimizer and schedule together: golden traces, what the two refuse, and the curve."""

import json
import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from library.errors import UserError
from library.options import parse_int_or_float
from library.training.lr_schedulers import build_lr_scheduler
from library.training.optimizer_kinds import KINDS
from library.training.optimizers import build_optimizer
from library.training.options import LR_SCHEDULERS, OptimizerOptions, SchedulerOptions
from library.training.rates import (
    check_rates,
    curve_lines,
    learning_rate_curve,
    rate_notices,
    recorded_rates,
    rehearse_rates,
    settled_schedule,
    try_rates,
)

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "lr_schedulers.json").read_text())["cases"]
CONVERSIONS = {
    "learning_rate": float,
    "lr_warmup_steps": parse_int_or_float,
    "lr_decay_steps": parse_int_or_float,
    "lr_scheduler_num_cycles": int,
    "lr_scheduler_timescale": int,
    "lr_scheduler_power": float,
    "lr_scheduler_min_lr_ratio": float,
}
CPU = torch.device("cpu")


@dataclass
class Rates:
    optimizer: OptimizerOptions = field(default_factory=OptimizerOptions)
    scheduler: SchedulerOptions = field(default_factory=SchedulerOptions)


def rates(*, learning_rate=1e-3, optimizer_type="", optimizer_args=(), **schedule):
    return Rates(
        OptimizerOptions(learning_rate=learning_rate, optimizer_type=optimizer_type, optimizer_args=optimizer_args),
        SchedulerOptions(**schedule),
    )


def options_of(case):
    values = {}
    name = None
    for word in case["args"]:
        if word.startswith("--"):
            name = word.removeprefix("--")
        elif name.endswith("_args"):
            values[name] = (*values.get(name, ()), word)
        else:
            values[name] = CONVERSIONS.get(name, str)(word)
    return rates(**values)


def cases(*, errors):
    return [
        pytest.param(case, id=" ".join(case["args"][2:]) + f" x{case['num_processes']}")
        for case in GOLDEN
        if ("error" in case) == errors
    ]


def trace(options, steps):
    """The rates in effect at each step, and after the last, of a run that trains as the loop does."""
    weight = torch.nn.Parameter(torch.zeros(4, 4))
    group = {"params": [weight], "lr": options.optimizer.learning_rate, "name": "unet"}
    optimizer = build_optimizer(options.optimizer, [group]).optimizer
    schedule = build_lr_scheduler(settled_schedule(options), optimizer, steps)
    found = []
    for _ in range(steps + 1):
        found.append(float(optimizer.param_groups[0]["lr"]))
        # Adafactor's rate depends on the size of the weight: the recorded one did not change it.
        weight.grad = torch.zeros_like(weight)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
    return found


@pytest.mark.parametrize("case", cases(errors=False))
def test_golden_traces(case):
    options = options_of(case)
    assert check_rates(options) == []
    found = trace(options, case["max_train_steps"])
    for step, rate in case["lr_used_at_step"].items():
        # The recorded scheduler of two processes ran over twice the steps, two of them an optimizer step.
        index, between = divmod(int(step), case["num_processes"])
        if not between:
            assert found[index] == pytest.approx(rate, rel=1e-6, abs=1e-16), step


@pytest.mark.parametrize("case", cases(errors=True))
def test_golden_errors(case):
    problems = check_rates(options_of(case))
    assert problems
    assert all(problem.remedy for problem in problems)


@pytest.mark.parametrize(
    "more",
    [
        {"lr_scheduler": "constant_with_warmup", "lr_warmup_steps": 0.25},
        {"lr_scheduler": "cosine", "lr_warmup_steps": 5},
        {"lr_scheduler": "piecewise_constant", "lr_scheduler_args": ("step_rules=1:3,0.5",)},
    ],
)
def test_the_curve_is_what_training_uses(more):
    options = rates(**more)
    curve = learning_rate_curve(options, 20)
    assert list(curve) == list(range(20))
    assert list(curve.values()) == pytest.approx(trace(options, 20)[:20], rel=1e-12)


def test_the_curve_of_a_long_run_is_looked_at_in_places():
    for more in (
        {"lr_scheduler": "warmup_stable_decay", "lr_warmup_steps": 12_345, "lr_decay_steps": 98_765},
        {"lr_scheduler": "piecewise_constant", "lr_scheduler_args": ("step_rules=1:4567,0.5",)},
    ):
        steps = list(learning_rate_curve(rates(**more), 10_000_000))
        assert len(steps) < 1100
        turns = (0, 4567) if "lr_scheduler_args" in more else (0, 12_345, 10_000_000 - 98_765, 9_999_999)
        assert set(turns) <= set(steps)
    (line,) = curve_lines(rates(lr_scheduler="linear", lr_warmup_steps=12_345), 10_000_000)
    assert "100 % at step 12346" in line


@pytest.mark.parametrize(
    ("name", "argument", "what"),
    [
        ("polynomial", "power=-1", "cannot be computed.* after 1000 steps"),
        ("polynomial", "power='a'", "cannot be computed"),
        ("polynomial", "lr_end=-1e-3", "is -"),
        ("inverse_sqrt", "timescale=-2", "cannot be computed"),
        ("piecewise_constant", "step_rules=nan", "is nan after 0 steps"),
        ("piecewise_constant", "step_rules=1:10,-1", "is -1 after 10 steps"),
        ("warmup_stable_decay", "min_lr_ratio=-0.5", "is -0.5 after 1000 steps"),
    ],
)
def test_values_with_which_no_rate_can_be_are_refused(name, argument, what):
    options = rates(lr_scheduler=name, lr_scheduler_args=(argument,))
    (problem,) = check_rates(options)
    assert re.search(what, problem.what)
    assert problem.where == "--lr_scheduler_args"
    with pytest.raises(UserError, match="the factor of the learning rate"):
        curve_lines(options, 10)


def test_values_that_a_longer_run_does_not_stand():
    options = rates(lr_scheduler="piecewise_constant", lr_scheduler_args=("step_rules=1:5000,nan",))
    assert check_rates(options) == []
    rehearse_rates(options, groups(4, 4), 4000)
    with pytest.raises(UserError, match="is nan after 5000 steps"):
        rehearse_rates(options, groups(4, 4), 7777)


def test_an_optimizer_that_sets_its_rate_itself_has_none_to_go_through():
    rehearse_rates(rates(optimizer_type="AdaFactor"), groups(4, 4), 6)


def test_a_class_whose_rate_is_no_number():
    options = rates(lr_scheduler_type="ExponentialLR", lr_scheduler_args=("gamma=1e300",))
    with pytest.raises(UserError, match="the learning rate is inf after 2 steps"):
        rehearse_rates(options, groups(4, 4), 6)


def test_the_curve_on_one_line():
    assert curve_lines(rates(), 100) == ["learning rate: 0.001 throughout (constant)"]
    assert curve_lines(rates(lr_scheduler="linear", lr_warmup_steps=10), 100) == [
        "learning rate (linear, of 0.001 or the part's own): 0 % at step 1, 100 % at step 11, 83.3 % at step 26, "
        "55.6 % at step 51, 27.8 % at step 76, 1.11 % at step 100"
    ]
    assert curve_lines(rates(optimizer_type="AdaFactor"), 9) == ["learning rate: adafactor, known while it runs"]
    assert curve_lines(rates(lr_scheduler_type="StepLR", lr_scheduler_args=("step_size=2",)), 9) == [
        "learning rate: StepLR, known while it runs"
    ]
    assert curve_lines(rates(learning_rate=0.0, lr_scheduler="cosine"), 1) == [
        "learning rate: that of each part (cosine)"
    ]


def test_adafactor_sets_its_rate_itself():
    options = rates(optimizer_type="Adafactor", lr_scheduler="cosine")
    assert settled_schedule(options).lr_scheduler == "adafactor:0.001"
    assert recorded_rates(options) == {"learning_rate": None, "lr_scheduler": "adafactor:0.001"}
    (notice,) = rate_notices(options)
    assert notice.endswith("(relative_step=True): every learning rate, --lr_scheduler cosine")
    assert settled_schedule(rates(optimizer_type="AdaFactor", lr_scheduler="adafactor:0.5")).lr_scheduler.endswith(
        ":0.5"
    )
    assert rate_notices(rates()) == []
    assert recorded_rates(rates()) == {}


def test_adafactor_with_a_given_rate():
    options = rates(optimizer_type="adafactor", optimizer_args=("relative_step=False", "clip_threshold=2.0"))
    assert settled_schedule(options) is options.scheduler
    assert len(rate_notices(options)) == 3
    calm = rates(
        optimizer_type="adafactor", optimizer_args=("relative_step=False",), lr_scheduler="constant_with_warmup"
    )
    assert rate_notices(calm) == ["AdaFactor limits its steps itself: --max_grad_norm 0 is recommended"]


@pytest.mark.parametrize("name", ["adafactor:fast", "adafactor:nan", "adafactor:-1"])
def test_adafactor_with_something_else_than_a_rate(name):
    (problem,) = check_rates(rates(optimizer_type="adafactor", lr_scheduler=name))
    assert "is not a learning rate" in problem.what


@pytest.mark.parametrize("more", [{}, {"optimizer_type": "AdaFactor", "optimizer_args": ("relative_step=False",)}])
def test_adafactors_schedule_is_for_it_alone(more):
    (problem,) = check_rates(rates(lr_scheduler="adafactor", **more))
    assert problem.what == "the schedule adafactor is that of AdaFactor with relative_step=True"


def test_a_schedule_is_ignored_and_told_for_schedule_free():
    pytest.importorskip("schedulefree")
    options = rates(optimizer_type="AdamWScheduleFree", lr_scheduler="cosine", lr_warmup_steps=10)
    assert rate_notices(options) == [
        "without effect with AdamWScheduleFree, which has no schedule: --lr_scheduler cosine, --lr_warmup_steps; "
        "AdamWScheduleFree has the argument warmup_steps"
    ]
    assert learning_rate_curve(options, 5) == dict.fromkeys(range(5), 1e-3)
    assert rate_notices(rates(optimizer_type="AdamWScheduleFree")) == []


@pytest.mark.parametrize(
    ("name", "rate", "words"),
    [("AdamW", 1.0, "very high"), ("Lion", 0.1, "very high"), ("AdamW", 1e-3, ""), ("SGDNesterov", 1.0, "")],
)
def test_rates_that_are_rarely_meant(name, rate, words):
    notices = rate_notices(rates(optimizer_type=name, learning_rate=rate))
    assert [words in notice for notice in notices] == ([True] if words else [])


def test_low_factors_are_rarely_meant():
    pytest.importorskip("prodigyopt")
    (notice,) = rate_notices(rates(optimizer_type="Prodigy", learning_rate=1e-4))
    assert "very low for Prodigy" in notice
    assert rate_notices(rates(optimizer_type="Prodigy", learning_rate=1.0)) == []


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("ReduceLROnPlateau", "follows a figure that is measured"),
        ("torch.optim.lr_scheduler.LambdaLR", "needs a function"),
        ("SequentialLR", "is made of other schedules"),
        ("steplr", "the schedule 'steplr' is not known"),
        ("LRScheduler", "is not known"),
        ("Counter", "is not known"),
        ("no_such_package.Schedule", "which is not installed"),
        ("__main__.Schedule", "which is not installed"),
        ("..StepLR", "is no import path"),
        (".StepLR", "is no import path"),
        ("torch.optim.lr_scheduler.", "is no import path"),
    ],
)
def test_classes_that_cannot_be_used(monkeypatch, name, what):
    # As it is where a script was started by its file.
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)
    (problem,) = check_rates(rates(lr_scheduler_type=name))
    assert what in problem.what
    assert problem.remedy


def test_arguments_of_a_class():
    options = rates(lr_scheduler_type="StepLR", lr_scheduler_args=("step=3", "gama=0.5"))
    first, second = check_rates(options)
    assert first.what == "StepLR has no argument 'step'"
    assert second.remedy == "Did you mean gamma? StepLR accepts: step_size, gamma, last_epoch."
    with pytest.raises(UserError, match="StepLR refuses its arguments.*step_size"):
        try_rates(rates(lr_scheduler_type="StepLR"), CPU)


def test_a_class_that_ends_before_the_run():
    options = rates(lr_scheduler_type="OneCycleLR", lr_scheduler_args=("max_lr=0.1", "total_steps=5"))
    assert len(trace(rates(lr_scheduler_type="OneCycleLR", lr_scheduler_args=("max_lr=0.1", "total_steps=6")), 5)) == 6
    optimizer = build_optimizer(options.optimizer, [{"params": [torch.nn.Parameter(torch.ones(1))], "lr": 1e-3}])
    with pytest.raises(UserError, match="It has to last for 9 steps"):
        build_lr_scheduler(options.scheduler, optimizer.optimizer, 9)


def groups(*shape):
    return [{"params": [torch.nn.Parameter(torch.ones(*shape))], "lr": 1.0, "name": "one"}]


@pytest.mark.parametrize(
    ("schedule", "arguments", "refused"),
    [
        ("PolynomialLR", ("total_iters=5",), True),
        ("PolynomialLR", ("total_iters=6",), False),
        ("CosineAnnealingLR", ("T_max=5",), True),
        ("StepLR", ("step_size=2",), False),
    ],
)
def test_a_class_whose_rate_ends_at_0_is_refused_beforehand(schedule, arguments, refused):
    """With an optimizer that fails there; the rate of the sixth and last step is the first after five."""
    pytest.importorskip("dadaptation")
    options = rates(
        learning_rate=1.0, optimizer_type="DAdaptSGD", lr_scheduler_type=schedule, lr_scheduler_args=arguments
    )
    assert check_rates(options) == []
    if refused:
        with pytest.raises(UserError, match="DAdaptSGD fails in a step with a learning rate of 0"):
            rehearse_rates(options, groups(4, 4), 6)
    else:
        rehearse_rates(options, groups(4, 4), 6)


def test_weights_that_an_optimizer_cannot_train_are_refused_beforehand():
    options = rates(learning_rate=1.0, optimizer_type="Muon")
    given = groups(4, 4)
    rehearse_rates(options, given, 6)
    assert given[0].keys() == {"params", "lr", "name"}, "they are those of the run, and stay as they are"
    with pytest.raises(UserError, match="Muon cannot train these weights: Muon only supports 2D parameters"):
        rehearse_rates(options, groups(4, 4, 3, 3), 6)


def test_settings_without_effect_are_told():
    options = SchedulerOptions(lr_scheduler_type="StepLR", lr_scheduler="cosine", lr_scheduler_power=2.0)
    (notice,) = options.notices()
    assert notice == "without effect with --lr_scheduler_type StepLR: --lr_scheduler_power, --lr_scheduler"


def curves():
    """The schedules as the page about them shows them."""
    warm = {"lr_warmup_steps": 10}
    settings = {
        "constant": {},
        "constant_with_warmup": warm,
        "linear": warm,
        "cosine": warm,
        "cosine_with_restarts": {**warm, "lr_scheduler_num_cycles": 3},
        "polynomial": {**warm, "lr_scheduler_power": 2.0},
        "inverse_sqrt": warm,
        "cosine_with_min_lr": {**warm, "lr_scheduler_min_lr_ratio": 0.1},
        "warmup_stable_decay": {**warm, "lr_decay_steps": 0.3},
        "piecewise_constant": {"lr_scheduler_args": ("step_rules=1:40,0.5:80,0.1",)},
    }
    yield f"{'step':22}" + "".join(f"{step:>5}" for step in PLACES) + "   every second step"
    for name, more in settings.items():
        parts = [rate / 1e-3 for rate in learning_rate_curve(rates(lr_scheduler=name, **more), 100).values()]
        bar = "".join(" .:-=+*#%@"[round(9 * part)] for part in parts[::2])
        yield f"{name:22}" + "".join(f"{100 * parts[step - 1]:5.0f}" for step in PLACES) + f"   |{bar}|"


PLACES = (1, 6, 11, 26, 51, 76, 100)


def test_the_page_shows_the_curves():
    page = (Path(__file__).parents[3] / "docs" / "optimizers.md").read_text(encoding="utf-8")
    assert "```\n" + "\n".join(curves()) + "\n```" in page


def test_the_option_allows_what_there_is():
    assert [name for name in LR_SCHEDULERS if check_rates(rates(lr_scheduler=name)) and name not in NEEDING_MORE] == []
    assert [problem.where for name in NEEDING_MORE for problem in check_rates(rates(lr_scheduler=name))] == [
        "--lr_scheduler_args",
        "--lr_scheduler_min_lr_ratio",
    ]


NEEDING_MORE = ("piecewise_constant", "cosine_with_min_lr")


def test_the_page_names_every_optimizer():
    page = (Path(__file__).parents[3] / "docs" / "optimizers.md").read_text(encoding="utf-8")
    assert [kind.name for kind in KINDS if f"`{kind.name}`" not in page] == []


def test_checking_imports_nothing_heavy():
    code = (
        "import sys\n"
        "from types import SimpleNamespace\n"
        "from library.training.options import OptimizerOptions, SchedulerOptions\n"
        "def rates(**more):\n"
        "    return SimpleNamespace(optimizer=OptimizerOptions(), scheduler=SchedulerOptions(**more))\n"
        "from library.training.rates import check_rates, curve_lines\n"
        "assert check_rates(rates(lr_scheduler_type='StepLR', lr_scheduler_args=('typo=1',)))\n"
        "curve_lines(rates(lr_scheduler='cosine'), 10)\n"
        "print({'torch', 'numpy'} & set(sys.modules))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
