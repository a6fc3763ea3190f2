"""Optimizer and schedule together: which schedule holds, what the two refuse of each other, and the curve they make.

Imports nothing heavy.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, Protocol

from library.errors import Problem, raise_if_any
from library.training.arguments import read_arguments
from library.training.lr_schedulers import (
    check_lr_scheduler,
    factor_problems,
    in_steps,
    is_relative_step,
    multiplier_for,
    telling_steps,
)
from library.training.optimizer_kinds import OptimizerKind
from library.training.optimizers import (
    check_optimizer,
    kind_of,
    rehearse_optimizer,
    try_optimizer,
    uses_relative_step,
)
from library.training.options import RELATIVE_STEP, OptimizerOptions, SchedulerOptions
from library.training.schedule_classes import advance, build_schedule_class

if TYPE_CHECKING:
    import torch

_LOW: Final = 0.1
"""Factors of a rate that the optimizer finds itself, usually 1, are low up to here."""
_ANY_LENGTH: Final = 1000
"""Steps that show the shape of every schedule."""
_HIGH: Final = 0.1
"""Rates of optimizers that divide by the size of gradients, usually 1e-4, are high from here on."""


class RateOptions(Protocol):
    """The groups of a script's options that decide the learning rate."""

    @property
    def optimizer(self) -> OptimizerOptions: ...  # noqa: D102
    @property
    def scheduler(self) -> SchedulerOptions: ...  # noqa: D102


def settled_schedule(options: RateOptions) -> SchedulerOptions:
    """The schedule that holds: some optimizers replace the one asked for."""
    asked = options.scheduler
    if uses_relative_step(options.optimizer):
        given = is_relative_step(asked.lr_scheduler) and ":" in asked.lr_scheduler and not asked.lr_scheduler_type
        own = asked.lr_scheduler if given else f"{RELATIVE_STEP}:{options.optimizer.learning_rate}"
        return SchedulerOptions(lr_scheduler=own, lr_warmup_steps=asked.lr_warmup_steps)
    kind = kind_of(options.optimizer)
    return SchedulerOptions() if kind is not None and kind.schedule_free else asked


def check_rates(options: RateOptions) -> list[Problem]:
    """What is wrong with optimizer and schedule, alone and together; imports nothing heavy."""
    problems = check_optimizer(options.optimizer) + check_lr_scheduler(options.scheduler)
    if problems:
        return problems
    name = options.scheduler.lr_scheduler
    if is_relative_step(name) and not options.scheduler.lr_scheduler_type and not uses_relative_step(options.optimizer):
        return [
            Problem(
                f"the schedule {name} is that of AdaFactor with relative_step=True",
                where="--lr_scheduler",
                remedy="Choose another, or --optimizer_type AdaFactor without relative_step=False.",
            )
        ]
    return (
        check_lr_scheduler(settled_schedule(options))
        or _factor_problems(options, _ANY_LENGTH, [options.optimizer.learning_rate])
        or _zero_rate_problems(options)
    )


def _factor_problems(options: RateOptions, total_steps: int, rates: Iterable[float]) -> list[Problem]:
    """What is wrong with the factors of any of ``rates``; a class has none, and is gone through as it is."""
    schedule = settled_schedule(options)
    if _has_no_factors(schedule):
        return []
    found = [factor_problems(schedule, total_steps, initial_lr=rate) for rate in dict.fromkeys(rates)]
    return next((problems for problems in found if problems), [])


def _has_no_factors(schedule: SchedulerOptions) -> bool:
    return bool(schedule.lr_scheduler_type) or is_relative_step(schedule.lr_scheduler)


def _zero_rate_problems(options: RateOptions) -> list[Problem]:
    kind = kind_of(options.optimizer)
    if kind is None or kind.zero_rate:
        return []
    curve = learning_rate_curve(options, _ANY_LENGTH)
    return [] if curve is None or min(curve.values()) > 0 else [_zero_rate(kind)]


def _zero_rate(kind: OptimizerKind) -> Problem:
    return Problem(
        f"{kind.name} fails in a step with a learning rate of 0, and this schedule has such steps",
        where="--lr_scheduler, --lr_scheduler_type, --lr_warmup_steps, --learning_rate",
        remedy="Choose another schedule, leave the warm-up out, or choose another optimizer, for example DAdaptAdam.",
    )


def try_rates(options: RateOptions, device: "torch.device") -> None:
    """Try optimizer and schedule out on a throw-away weight on ``device``, before a model is loaded.

    Raises:
        UserError: The machine cannot run the optimizer, or a value is out of range.
    """
    optimizer = try_optimizer(options.optimizer, device)
    schedule = settled_schedule(options)
    if schedule.lr_scheduler_type:
        build_schedule_class(schedule, optimizer, total_steps=1)


def rehearse_rates(options: RateOptions, groups: Sequence[Mapping[str, Any]], total_steps: int) -> None:
    """Go through the rates of a run with the weights that it trains, before anything that takes long.

    Args:
        options: The options, tried out.
        groups: Parameter groups; they are not changed.
        total_steps: Length of the run.

    Raises:
        UserError: The optimizer cannot train these weights, or the schedule does not last, or has steps that the
            optimizer does not stand.
    """
    optimizer = rehearse_optimizer(options.optimizer, groups)
    schedule, kind = settled_schedule(options), kind_of(options.optimizer)
    # A group has no rate where the optimizer sets it itself.
    rates = (float(group["lr"]) for group in optimizer.param_groups)
    raise_if_any(_factor_problems(options, total_steps, rates))
    if not schedule.lr_scheduler_type:
        return
    made = build_schedule_class(schedule, optimizer, total_steps)
    if kind is None or kind.zero_rate:
        return
    for _ in range(total_steps):
        raise_if_any([] if any(group["lr"] for group in optimizer.param_groups) else [_zero_rate(kind)])
        advance(made, 1)


def rate_notices(options: RateOptions) -> list[str]:
    """What is without effect, or rarely meant."""
    optimizer, kind = options.optimizer, kind_of(options.optimizer)
    if kind is None:
        return []
    rate = optimizer.learning_rate
    if uses_relative_step(optimizer):
        unused = ["every learning rate", *_schedule_flags(options.scheduler)]
        return [f"without effect with AdaFactor, which sets the rate itself (relative_step=True): {', '.join(unused)}"]
    if kind.relative_step:
        return _fixed_rate_notices(options)
    if kind.schedule_free:
        unused = [*_schedule_flags(options.scheduler), *_warmup_flags(options.scheduler)]
        hint = f"; {kind.name} has the argument warmup_steps" if "--lr_warmup_steps" in unused else ""
        return [f"without effect with {kind.name}, which has no schedule: {', '.join(unused)}{hint}"] if unused else []
    if kind.finds_rate and rate <= _LOW:
        return [
            f"--learning_rate {rate:g} is very low for {kind.name}, which finds the rate itself and multiplies it by "
            "this one: 1.0 is usual"
        ]
    if kind.class_name.lower().startswith(("adam", "lion", "paged")) and rate >= _HIGH:
        return [f"--learning_rate {rate:g} is very high for {kind.name}: 1e-4 is usual for a network"]
    return []


def _schedule_flags(options: SchedulerOptions) -> list[str]:
    """The schedule where one was asked for."""
    if options.lr_scheduler_type:
        return [f"--lr_scheduler_type {options.lr_scheduler_type}"]
    usual = options.lr_scheduler == SchedulerOptions().lr_scheduler or is_relative_step(options.lr_scheduler)
    return [] if usual else [f"--lr_scheduler {options.lr_scheduler}"]


def _warmup_flags(options: SchedulerOptions) -> list[str]:
    return ["--lr_warmup_steps"] if options.lr_warmup_steps else []


def _fixed_rate_notices(options: RateOptions) -> list[str]:
    """What Adafactor with a given rate gets on with best (the recommendations of the transformers library)."""
    found = []
    arguments, _ = read_arguments(options.optimizer.optimizer_args, flag="--optimizer_args")
    if options.scheduler.lr_scheduler != "constant_with_warmup":
        found.append("AdaFactor with relative_step=False goes best with --lr_scheduler constant_with_warmup")
    if options.optimizer.max_grad_norm > 0:
        found.append("AdaFactor limits its steps itself: --max_grad_norm 0 is recommended")
    if arguments.get("clip_threshold", 1.0) != 1.0:
        found.append("AdaFactor with relative_step=False goes best with clip_threshold=1.0")
    return found


def recorded_rates(options: RateOptions) -> dict[str, object]:
    """Option values to put down in a result where they are not those given."""
    if not uses_relative_step(options.optimizer):
        return {}
    return {"learning_rate": None, "lr_scheduler": settled_schedule(options).lr_scheduler}


def learning_rate_curve(options: RateOptions, total_steps: int) -> dict[int, float] | None:
    """The learning rate by optimizer step, for what has none of its own; None where only the run can tell.

    Of a long run, steps are left out that show nothing new.

    Raises:
        UserError: The options contradict each other, or a rate cannot be one.
    """
    schedule = settled_schedule(options)
    if _has_no_factors(schedule):
        return None
    rate = options.optimizer.learning_rate
    raise_if_any(_factor_problems(options, total_steps, [rate]))
    factor = multiplier_for(schedule, total_steps, initial_lr=rate)
    return {step: rate * factor(step) for step in telling_steps(schedule, total_steps) if step < total_steps}


def curve_lines(options: RateOptions, total_steps: int) -> list[str]:
    """The curve on one line: the share of the learning rate at its ends, its quarters, and where a warm-up ends."""
    schedule = settled_schedule(options)
    name = schedule.lr_scheduler_type or schedule.lr_scheduler.partition(":")[0]
    curve = learning_rate_curve(options, total_steps)
    rate = options.optimizer.learning_rate
    if curve is None:
        return [f"learning rate: {name}, known while it runs"]
    if not rate:
        return [f"learning rate: that of each part ({name})"]
    if min(curve.values()) == max(curve.values()) == rate:
        return [f"learning rate: {rate:g} throughout ({name})"]
    places = {0, total_steps // 4, total_steps // 2, 3 * total_steps // 4, total_steps - 1}
    places.add(in_steps(schedule.lr_warmup_steps, total_steps))
    shown = (f"{_share(curve[place] / rate)} at step {place + 1}" for place in sorted(places) if place < total_steps)
    return [f"learning rate ({name}, of {rate:g} or the part's own): {', '.join(shown)}"]


def _share(factor: float) -> str:
    return f"{100 * factor:.3g} %"
