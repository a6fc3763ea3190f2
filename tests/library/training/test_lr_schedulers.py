import json
from pathlib import Path

import pytest
import torch

from library.errors import UserError
from library.options import parse_int_or_float
from library.training.lr_schedulers import build_lr_scheduler, check_lr_scheduler, in_steps, multiplier_for
from library.training.options import SchedulerOptions

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "lr_schedulers.json").read_text())["cases"]
CONVERSIONS = {
    "lr_warmup_steps": parse_int_or_float,
    "lr_decay_steps": parse_int_or_float,
    "lr_scheduler_num_cycles": int,
    "lr_scheduler_timescale": int,
    "lr_scheduler_power": float,
    "lr_scheduler_min_lr_ratio": float,
}
# Schedules that need an optimizer, or two options of it: test_rates.py has them.
WITH_OPTIMIZER = ("--lr_scheduler_type", "--optimizer_type", "adafactor")


def schedule_of(case):
    values = {}
    arguments = case["args"]
    for name, value in zip(arguments[::2], arguments[1::2], strict=True):
        name = name.removeprefix("--")
        if name == "learning_rate":
            continue
        values[name] = (value,) if name == "lr_scheduler_args" else CONVERSIONS.get(name, str)(value)
    return SchedulerOptions(**values)


def cases(*, errors):
    return [
        pytest.param(case, id=" ".join(case["args"][2:]))
        for case in GOLDEN
        if ("error" in case) == errors and case["num_processes"] == 1 and not set(WITH_OPTIMIZER) & set(case["args"])
    ]


@pytest.mark.parametrize("case", cases(errors=False))
def test_golden(case):
    multiplier = multiplier_for(schedule_of(case), case["max_train_steps"], initial_lr=1e-3)
    for step, rate in case["lr_used_at_step"].items():
        assert 1e-3 * multiplier(int(step)) == pytest.approx(rate, rel=1e-9, abs=1e-16), step


@pytest.mark.parametrize("case", cases(errors=True))
def test_golden_errors(case):
    options = schedule_of(case)
    problems = check_lr_scheduler(options)
    assert problems
    assert all(problem.remedy for problem in problems)


def test_golden_with_two_processes_is_followed_per_optimizer_step():
    """The recorded scheduler ran over twice the steps, and twice as fast: every optimizer step took two of them."""
    (case,) = [case for case in GOLDEN if case["num_processes"] == 2]
    multiplier = multiplier_for(schedule_of(case), case["max_train_steps"], initial_lr=1e-3)
    rates = case["lr_used_at_step"]
    for step in (0, 1, 5, 10, 25, 33, 45, 50):
        assert 1e-3 * multiplier(step) == pytest.approx(rates[str(2 * step)], rel=1e-9)


def optimizer_with(*rates):
    return torch.optim.SGD([{"params": [torch.nn.Parameter(torch.ones(1))], "lr": rate} for rate in rates])


def trace(scheduler, optimizer, steps):
    rates = []
    for _ in range(steps):
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    return rates


def test_scheduler_follows_the_function_for_every_group():
    optimizer = optimizer_with(1e-3, 4e-4)
    options = SchedulerOptions(lr_scheduler="cosine", lr_warmup_steps=3)
    rates = trace(build_lr_scheduler(options, optimizer, 10), optimizer, 10)
    multiplier = multiplier_for(options, 10, initial_lr=1.0)
    assert rates == [pytest.approx([1e-3 * multiplier(step), 4e-4 * multiplier(step)]) for step in range(10)]


def test_polynomial_ends_at_the_same_rate_in_every_group():
    optimizer = optimizer_with(1e-3, 1e-5, 1e-8)
    rates = trace(build_lr_scheduler(SchedulerOptions(lr_scheduler="polynomial"), optimizer, 8), optimizer, 9)
    assert rates[-1] == pytest.approx([1e-7, 1e-7, 1e-8])


def test_scheduler_continues_from_its_state():
    options = SchedulerOptions(lr_scheduler="cosine_with_restarts", lr_scheduler_num_cycles=2, lr_warmup_steps=0.2)
    optimizer = optimizer_with(1e-3)
    whole = trace(build_lr_scheduler(options, optimizer, 12), optimizer, 12)
    first = optimizer_with(1e-3)
    scheduler = build_lr_scheduler(options, first, 12)
    begun = trace(scheduler, first, 5)
    second = optimizer_with(1e-3)
    resumed = build_lr_scheduler(options, second, 12)
    second.load_state_dict(first.state_dict())
    resumed.load_state_dict(scheduler.state_dict())
    assert begun + trace(resumed, second, 7) == whole


@pytest.mark.parametrize(("given", "steps"), [(0, 0), (0.0, 0), (10, 10), (0.1, 20), (0.999, 199), (1, 1)])
def test_durations_are_steps_or_shares(given, steps):
    assert in_steps(given, 200) == steps


def test_step_rules_need_no_quotes():
    options = SchedulerOptions(lr_scheduler="piecewise_constant", lr_scheduler_args=("step_rules=1:2,0.5:4,0.25",))
    multiplier = multiplier_for(options, 10, initial_lr=1.0)
    assert [multiplier(step) for step in range(6)] == [1, 1, 0.5, 0.5, 0.25, 0.25]


@pytest.mark.parametrize("rules", ["1:10,0.1", "0.5"])
def test_good_step_rules(rules):
    options = SchedulerOptions(lr_scheduler="piecewise_constant", lr_scheduler_args=(f"step_rules={rules}",))
    assert check_lr_scheduler(options) == []


@pytest.mark.parametrize("rules", ["", "1:10,0.1:5,0.01", "1:x,0.1", "1:10", "a:10,1", "1,2"])
def test_bad_step_rules_are_refused(rules):
    options = SchedulerOptions(lr_scheduler="piecewise_constant", lr_scheduler_args=(f"step_rules={rules}",))
    with pytest.raises(UserError, match="needs step_rules"):
        multiplier_for(options, 10, initial_lr=1.0)


def test_unknown_argument_and_name():
    (problem,) = check_lr_scheduler(SchedulerOptions(lr_scheduler="cosine", lr_scheduler_args=("num_cycle=2",)))
    assert problem.remedy == "Did you mean num_cycles? cosine accepts: num_cycles."
    (problem,) = check_lr_scheduler(SchedulerOptions(lr_scheduler="COSINE"))
    assert problem.remedy is not None
    assert problem.remedy.startswith("Did you mean cosine?")


def test_a_warmup_longer_than_the_run_is_mentioned(caplog):
    build_lr_scheduler(
        SchedulerOptions(lr_scheduler="constant_with_warmup", lr_warmup_steps=10), optimizer_with(1e-3), 10
    )
    assert "never reached" in caplog.text
