"""Learning-rate schedules: pure functions of the optimizer step, and the scheduler made of them.

Each schedule gives the factor of the learning rate for the optimizer step with index ``step``, from 0. A scheduler made
here advances once an optimizer step, whatever the number of processes or accumulated batches.
"""

import inspect
import logging
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from library.errors import Problem, raise_if_any
from library.training.arguments import read_arguments, unknown_names
from library.training.options import RELATIVE_STEP, SchedulerOptions
from library.training.schedule_classes import build_schedule_class, check_schedule_class

if TYPE_CHECKING:
    import torch
    from torch.optim.lr_scheduler import LRScheduler

logger = logging.getLogger(__name__)

Multiplier = Callable[[int], float]

_ARGS_FLAG: Final = "--lr_scheduler_args"
_DEFAULT_TIMESCALE: Final = 10_000  # steps, of inverse_sqrt without warm-up
_MOST_LOOKED_AT: Final = 1000  # steps of a run, besides those where a schedule turns


def _warmup(step: int, warmup_steps: int) -> float:
    return step / max(1, warmup_steps)


def _progress(step: int, warmup_steps: int, total_steps: int) -> float:
    """Share of the way from the end of the warm-up (0) to the end of the run (1)."""
    return (step - warmup_steps) / max(1, total_steps - warmup_steps)


def constant(step: int) -> float:
    """1 throughout."""
    return 1.0


def constant_with_warmup(step: int, *, warmup_steps: int) -> float:
    """From 0 to 1 during the warm-up, then 1."""
    return _warmup(step, warmup_steps) if step < warmup_steps else 1.0


def linear(step: int, *, warmup_steps: int, total_steps: int) -> float:
    """From 0 to 1 during the warm-up, then down to 0 in a line."""
    if step < warmup_steps:
        return _warmup(step, warmup_steps)
    return max(0.0, 1.0 - _progress(step, warmup_steps, total_steps))


def cosine(step: int, *, warmup_steps: int, total_steps: int, num_cycles: float = 0.5) -> float:
    """After the warm-up ``num_cycles`` cosine waves between 1 and 0 (half a wave: one descent)."""
    return cosine_with_min_lr(
        step, warmup_steps=warmup_steps, total_steps=total_steps, num_cycles=num_cycles, min_lr_ratio=0.0
    )


def cosine_with_restarts(step: int, *, warmup_steps: int, total_steps: int, num_cycles: int = 1) -> float:
    """After the warm-up ``num_cycles`` descents from 1 to 0, each starting at 1 again (SGDR, arXiv 1608.03983)."""
    if step < warmup_steps:
        return _warmup(step, warmup_steps)
    progress = _progress(step, warmup_steps, total_steps)
    return 0.0 if progress >= 1.0 else 0.5 * (1.0 + math.cos(math.pi * ((num_cycles * progress) % 1.0)))


def polynomial(
    step: int, *, warmup_steps: int, total_steps: int, initial_lr: float, power: float = 1.0, lr_end: float = 1e-7
) -> float:
    """After the warm-up down to the rate ``lr_end`` (not below ``initial_lr`` where that is smaller still)."""
    if step < warmup_steps:
        return _warmup(step, warmup_steps)
    end = min(lr_end / initial_lr, 1.0) if initial_lr > 0 else 1.0
    remaining = max(0.0, 1.0 - _progress(step, warmup_steps, total_steps))
    return float(end + (1.0 - end) * remaining**power)


def inverse_sqrt(step: int, *, warmup_steps: int, timescale: int | None = None) -> float:
    """After the warm-up ``1 / sqrt(1 + t / timescale)``, t counted from its end (arXiv 2106.04560)."""
    if step < warmup_steps:
        return _warmup(step, warmup_steps)
    scale = timescale or warmup_steps or _DEFAULT_TIMESCALE
    return 1.0 / math.sqrt((step - warmup_steps + scale) / scale)


def cosine_with_min_lr(
    step: int, *, warmup_steps: int, total_steps: int, min_lr_ratio: float, num_cycles: float = 0.5
) -> float:
    """As ``cosine``, between 1 and ``min_lr_ratio``."""
    if step < warmup_steps:
        return _warmup(step, warmup_steps)
    progress = _progress(step, warmup_steps, total_steps)
    wave = 0.5 * (1.0 + math.cos(math.pi * num_cycles * 2.0 * progress))
    return max(0.0, min_lr_ratio + (1.0 - min_lr_ratio) * wave)


def warmup_stable_decay(
    step: int,
    *,
    warmup_steps: int,
    total_steps: int,
    decay_steps: int,
    min_lr_ratio: float = 0.0,
    num_cycles: float = 0.5,
) -> float:
    """Warm-up, then 1, then a cosine down to ``min_lr_ratio`` over the last ``decay_steps`` (arXiv 2404.06395)."""
    decay_start = total_steps - decay_steps
    if step < decay_start or step < warmup_steps:
        return constant_with_warmup(step, warmup_steps=warmup_steps)
    if step >= total_steps:
        return min_lr_ratio
    return cosine_with_min_lr(
        step - decay_start, warmup_steps=0, total_steps=decay_steps, min_lr_ratio=min_lr_ratio, num_cycles=num_cycles
    )


def piecewise_constant(step: int, *, step_rules: str) -> float:
    """Factors by range: ``"1:10,0.1:20,0.01"`` is 1 before step 10, 0.1 before step 20, 0.01 from then on.

    Raises:
        ValueError: ``step_rules`` is not of that form.
    """
    ranges, last = _read_step_rules(step_rules)
    return next((factor for factor, end in ranges if step < end), last)


def _read_step_rules(step_rules: str) -> tuple[list[tuple[float, int]], float]:
    """Factors with the step each ends at, and the last factor."""
    *rules, last = step_rules.split(",")
    ranges = [(float(factor), int(end)) for factor, _, end in (rule.partition(":") for rule in rules)]
    ends = [end for _, end in ranges]
    if ends != sorted(set(ends)):
        raise ValueError("the steps must rise")
    return ranges, float(last)


_SCHEDULES: Final[dict[str, Callable[..., float]]] = {
    schedule.__name__: schedule
    for schedule in (
        constant,
        constant_with_warmup,
        linear,
        cosine,
        cosine_with_restarts,
        polynomial,
        piecewise_constant,
        inverse_sqrt,
        cosine_with_min_lr,
        warmup_stable_decay,
    )
}
# Given by options of their own or by the run, not by --lr_scheduler_args.
_OWN_OPTIONS: Final = frozenset({"step", "warmup_steps", "total_steps", "decay_steps", "initial_lr"})


def check_lr_scheduler(options: SchedulerOptions) -> list[Problem]:
    """What is wrong with the schedule's name or arguments; imports nothing heavy."""
    if options.lr_scheduler_type:
        return check_schedule_class(options)
    name = options.lr_scheduler
    if is_relative_step(name):
        return _warmup_problems(options, name) + _relative_step_problems(options)
    schedule = _SCHEDULES.get(name)
    if schedule is None:
        return options.problems()
    problems = _argument_problems(options, schedule)
    if "warmup_steps" not in inspect.signature(schedule).parameters:
        problems += _warmup_problems(options, name)
    if schedule is cosine_with_min_lr and options.lr_scheduler_min_lr_ratio is None:
        problems.append(
            Problem(
                "cosine_with_min_lr needs the lowest rate as a fraction of the learning rate",
                where="--lr_scheduler_min_lr_ratio",
                remedy="For instance --lr_scheduler_min_lr_ratio 0.1.",
            )
        )
    return problems


def is_relative_step(name: str) -> bool:
    """Whether the schedule ``name`` is Adafactor's own, ``adafactor`` or ``adafactor:<rate>``."""
    return name.partition(":")[0] == RELATIVE_STEP


def _relative_step_problems(options: SchedulerOptions) -> list[Problem]:
    given, problems = _read_scheduler_arguments(options)
    problems += unknown_names(given, [], flag=_ARGS_FLAG, owner=RELATIVE_STEP)
    _, colon, rate = options.lr_scheduler.partition(":")
    if colon and not _is_rate(rate):
        what = f"--lr_scheduler {options.lr_scheduler}: {rate!r} is not a learning rate"
        problems.append(Problem(what, where="--lr_scheduler", remedy="For instance --lr_scheduler adafactor:0.001."))
    return problems


def _is_rate(text: str) -> bool:
    try:
        return math.isfinite(float(text)) and float(text) >= 0
    except ValueError:
        return False


def _warmup_problems(options: SchedulerOptions, name: str) -> list[Problem]:
    if not options.lr_warmup_steps:
        return []
    return [
        Problem(
            f"the schedule {name} has no warm-up, but --lr_warmup_steps is {options.lr_warmup_steps}",
            where="--lr_warmup_steps",
            remedy="Use --lr_scheduler constant_with_warmup, or leave --lr_warmup_steps out.",
        )
    ]


def _argument_problems(options: SchedulerOptions, schedule: Callable[..., float]) -> list[Problem]:
    given, problems = _read_scheduler_arguments(options)
    accepted = [name for name in inspect.signature(schedule).parameters if name not in _OWN_OPTIONS]
    problems += unknown_names(given, accepted, flag=_ARGS_FLAG, owner=options.lr_scheduler)
    if schedule is not piecewise_constant:
        return problems
    rules = given.get("step_rules")
    if not isinstance(rules, str) or not _are_step_rules(rules):
        form = "step_rules=1:10,0.1:20,0.01"
        problems.append(
            Problem(
                "piecewise_constant needs step_rules: factors with the step each ends at, and a last factor"
                + (f", not {rules!r}" if rules is not None else ""),
                where=_ARGS_FLAG,
                remedy=f"For instance --lr_scheduler_args {form}: 1 before step 10, 0.1 before step 20, then 0.01.",
            )
        )
    return problems


def _read_scheduler_arguments(options: SchedulerOptions) -> tuple[dict[str, object], list[Problem]]:
    """The arguments; ``step_rules`` may be written with or without quotes."""
    name = "step_rules"
    texts = list(options.lr_scheduler_args)
    rules = [text.partition("=")[2].strip().strip("\"'") for text in texts if text.partition("=")[0].strip() == name]
    others = [text for text in texts if text.partition("=")[0].strip() != name]
    values, problems = read_arguments(others, flag=_ARGS_FLAG)
    return {**values, **({name: rules[-1]} if rules else {})}, problems


def _are_step_rules(rules: str) -> bool:
    try:
        _read_step_rules(rules)
    except ValueError:
        return False
    return True


def in_steps(duration: float, total_steps: int) -> int:
    """A duration in optimizer steps: whole numbers are steps, values below 1 a share of the run."""
    return int(duration * total_steps) if 0 < duration < 1 else int(duration)


def telling_steps(options: SchedulerOptions, total_steps: int) -> list[int]:
    """Steps that show the factors of a whole run, from 0 to ``total_steps``, which follows the last one.

    Of a long run these are the places where a schedule turns, with those beside them, and others evenly between.
    """
    turns = [*(total_steps * quarter // 4 for quarter in range(5)), in_steps(options.lr_warmup_steps, total_steps)]
    turns.append(total_steps - in_steps(options.lr_decay_steps, total_steps))
    if options.lr_scheduler == piecewise_constant.__name__:
        rules = _read_scheduler_arguments(options)[0]["step_rules"]
        turns += [end for _, end in _read_step_rules(str(rules))[0]]
    even = range(0, total_steps + 1, -(-total_steps // _MOST_LOOKED_AT))
    beside = (turn + offset for turn in turns for offset in (-1, 0, 1))
    return sorted({*even, *(step for step in beside if 0 <= step <= total_steps)})


def factor_problems(options: SchedulerOptions, total_steps: int, *, initial_lr: float) -> list[Problem]:
    """What is wrong with the factors that values of ``--lr_scheduler_args`` lead to, told by the first wrong one.

    Args:
        options: A schedule by name, checked.
        total_steps: Length of the run.
        initial_lr: The rate that the factors are of.
    """
    factor = multiplier_for(options, total_steps, initial_lr=initial_lr)
    for step in telling_steps(options, total_steps):
        try:
            value = factor(step)
            wrong = None if math.isfinite(value) and value >= 0 else f"is {value:g}"
        except (TypeError, ValueError, ArithmeticError) as error:
            wrong = f"cannot be computed ({error})"
        if wrong is not None:
            what = f"the factor of the learning rate {wrong} after {step} steps of {options.lr_scheduler}"
            return [Problem(what, where=_ARGS_FLAG, remedy="Give values with which it is a number from 0 on.")]
    return []


def multiplier_for(options: SchedulerOptions, total_steps: int, *, initial_lr: float) -> Multiplier:
    """The factor of the learning rate by step, for a parameter group that starts at ``initial_lr``.

    Raises:
        UserError: The options contradict each other.
    """
    raise_if_any(check_lr_scheduler(options))
    assert not options.lr_scheduler_type, "a class has no factor of its own"
    schedule = _SCHEDULES[options.lr_scheduler]
    cycles = options.lr_scheduler_num_cycles
    offered: dict[str, object] = {
        "warmup_steps": in_steps(options.lr_warmup_steps, total_steps),
        "decay_steps": in_steps(options.lr_decay_steps, total_steps),
        "total_steps": total_steps,
        "initial_lr": initial_lr,
        "power": options.lr_scheduler_power,
        "timescale": options.lr_scheduler_timescale,
        "min_lr_ratio": options.lr_scheduler_min_lr_ratio or 0.0,
    }
    if schedule is cosine_with_restarts:
        offered["num_cycles"] = cycles
    elif schedule in (cosine_with_min_lr, warmup_stable_decay):
        # The option counts descents, the formula whole waves.
        offered["num_cycles"] = cycles / 2
    given, _ = _read_scheduler_arguments(options)
    names = inspect.signature(schedule).parameters
    settings = {name: value for name, value in {**offered, **given}.items() if name in names}

    def multiplier(step: int) -> float:
        return schedule(step, **settings)

    return multiplier


def build_lr_scheduler(
    options: SchedulerOptions, optimizer: "torch.optim.Optimizer", total_steps: int
) -> "LRScheduler":
    """The scheduler over all groups of ``optimizer``; call its ``step()`` once an optimizer step.

    It must not be prepared by Accelerate, which would advance it once a process.

    Raises:
        UserError: The options contradict each other.
    """
    raise_if_any(check_lr_scheduler(options))
    if options.lr_scheduler_type:
        return build_schedule_class(options, optimizer, total_steps)
    from torch.optim.lr_scheduler import LambdaLR

    from library.training.relative_step import RelativeStepReport

    if is_relative_step(options.lr_scheduler):
        rate = options.lr_scheduler.partition(":")[2]
        return RelativeStepReport(optimizer, float(rate or 0.0))
    if in_steps(options.lr_warmup_steps, total_steps) >= total_steps:
        logger.warning(
            "the warm-up (%s) is not over at the end of the run (%d steps): the full learning rate is never reached",
            options.lr_warmup_steps,
            total_steps,
        )
    multipliers = [
        multiplier_for(options, total_steps, initial_lr=float(group["lr"])) for group in optimizer.param_groups
    ]
    return LambdaLR(optimizer, multipliers)
