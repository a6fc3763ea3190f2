"""Learning-rate schedules by class: those of ``torch.optim.lr_scheduler`` by name, others by import path."""

import importlib
import inspect
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, cast

from library.errors import Problem, UserError
from library.options import choose_from
from library.training.arguments import read_arguments, unknown_names
from library.training.options import SchedulerOptions
from library.training.source_classes import exported_classes, find_class, is_import_path, is_installed

if TYPE_CHECKING:
    import torch
    from torch.optim.lr_scheduler import LRScheduler

_FLAG: Final = "--lr_scheduler_type"
_ARGS_FLAG: Final = "--lr_scheduler_args"
_TORCH: Final = "torch.optim.lr_scheduler"

# Why a class of torch.optim.lr_scheduler cannot be used here.
_UNSUITED: Final = {
    "ReduceLROnPlateau": "follows a figure that is measured, not the step",
    "LambdaLR": "needs a function, which an option cannot hold",
    "MultiplicativeLR": "needs a function, which an option cannot hold",
    "SequentialLR": "is made of other schedules, which an option cannot hold",
    "ChainedScheduler": "is made of other schedules, which an option cannot hold",
}


def check_schedule_class(options: SchedulerOptions) -> list[Problem]:
    """What is wrong with a class of schedules or its arguments; imports nothing heavy."""
    given, problems = read_arguments(options.lr_scheduler_args, flag=_ARGS_FLAG)
    if options.lr_warmup_steps:
        problems.append(
            Problem(
                f"a schedule of --lr_scheduler_type has no warm-up from --lr_warmup_steps {options.lr_warmup_steps}",
                where="--lr_warmup_steps",
                remedy="Leave it out, or use --lr_scheduler.",
            )
        )
    module, name = _place(options.lr_scheduler_type)
    wrong = _wrong_class(options.lr_scheduler_type, module, name)
    if wrong is not None:
        return [*problems, wrong]
    found = find_class(module, name)
    if found is None or found.arguments is None:
        return problems
    accepted = [argument for argument in found.arguments if argument != "optimizer"]
    return problems + unknown_names(given, accepted, flag=_ARGS_FLAG, owner=options.lr_scheduler_type)


def _place(text: str) -> tuple[str, str]:
    """Module and class."""
    module, _, name = text.rpartition(".")
    return module or _TORCH, name


def _wrong_class(text: str, module: str, name: str) -> Problem | None:
    if "." in text and not is_import_path(text):
        remedy = "Write package.module.Class, or the name alone for one of torch.optim.lr_scheduler."
        return Problem(f"{text!r} is no import path of a schedule", where=_FLAG, remedy=remedy)
    if not is_installed(module):
        what = f"{text} needs the module {module.partition('.')[0]}, which is not installed"
        return Problem(what, where=_FLAG, remedy="Install the package that has it, or check the spelling.")
    if module != _TORCH:
        return None
    if name in _UNSUITED:
        return Problem(f"{name} {_UNSUITED[name]}", where=_FLAG, remedy="Choose another, or use --lr_scheduler.")
    known = sorted(name for name, origin in exported_classes(_TORCH).items() if origin == _TORCH and name[0] != "_")
    usable = [known_name for known_name in known if known_name not in _UNSUITED and known_name != "LRScheduler"]
    if name in usable:
        return None
    return Problem(
        f"the schedule {text!r} is not known",
        where=_FLAG,
        remedy=f"{choose_from(name, usable, 'Available')} Or give the import path of a class: package.module.Class.",
    )


def build_schedule_class(
    options: SchedulerOptions, optimizer: "torch.optim.Optimizer", total_steps: int
) -> "LRScheduler":
    """The schedule over all groups of ``optimizer``, its options checked before.

    Raises:
        UserError: The class cannot be loaded, refuses its arguments, or ends before the run of ``total_steps``.
    """
    module, name = _place(options.lr_scheduler_type)
    given, _ = read_arguments(options.lr_scheduler_args, flag=_ARGS_FLAG)
    try:
        factory = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, OSError, RuntimeError) as error:
        raise UserError(
            f"{options.lr_scheduler_type} cannot be loaded: {error}",
            where=_FLAG,
            remedy="Check the spelling, and that its package works.",
        ) from error
    try:
        _rehearse(factory, given, optimizer, total_steps)
        return cast("LRScheduler", factory(optimizer, **given))
    except (TypeError, ValueError, KeyError, AttributeError, AssertionError) as error:
        raise UserError(
            f"{options.lr_scheduler_type} refuses its arguments: {error or 'a value is out of range'}",
            where=f"{_FLAG}, {_ARGS_FLAG}",
            remedy=f"It accepts: {', '.join(list(inspect.signature(factory).parameters)[1:])}. "
            f"It has to last for {total_steps} steps.",
        ) from error


def _rehearse(factory: Any, arguments: Mapping[str, Any], optimizer: "torch.optim.Optimizer", total_steps: int) -> None:
    """Go through a schedule with a stand-in for ``optimizer``, so that what goes wrong does so at the start."""
    import torch

    weight = torch.zeros(1)
    groups = [{**group, "params": [weight.clone()]} for group in optimizer.param_groups]
    stand_in = torch.optim.Optimizer(groups, dict(optimizer.defaults))

    def check(step: int) -> None:
        for group in stand_in.param_groups:
            if not math.isfinite(group["lr"]):
                raise ValueError(f"the learning rate is {group['lr']} after {step} steps")

    advance(factory(stand_in, **arguments), total_steps, check)


def advance(schedule: Any, steps: int, follow: Callable[[int], None] = lambda step: None) -> None:
    """Let ``schedule`` pass ``steps`` steps that were made elsewhere; ``follow`` is told of each, from 1."""
    with warnings.catch_warnings():
        # It is not told of steps that an optimizer has made elsewhere.
        warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
        for step in range(steps):
            schedule.step()
            follow(step + 1)


def restore_schedule(
    optimizer: Any, schedule: Any, saved: Mapping[str, Any] | None, fresh: Sequence[Mapping[str, Any]], *, at: int
) -> None:
    """Put ``schedule`` where ``saved`` left it; one of another kind goes as many steps as that had gone.

    Args:
        optimizer: The optimizer, restored.
        schedule: The new schedule.
        saved: ``state_dict`` of the former one; None where the new one is to be gone through.
        fresh: The groups of the optimizer as the new schedule made them, without ``params``.
        at: Steps that were made.
    """
    for group, before in zip(optimizer.param_groups, fresh, strict=True):
        for name, value in before.items():
            group.setdefault(name, value)
    if saved is not None and saved.keys() == schedule.state_dict().keys():
        schedule.load_state_dict(dict(saved))
        return
    for group, before in zip(optimizer.param_groups, fresh, strict=True):
        group.update({name: before[name] for name in ("lr", "initial_lr")})
    advance(schedule, at)


def use_rates(optimizer: Any, schedule: Any, rates: Sequence[float]) -> None:
    """Continue a restored ``schedule`` with ``rates``, one a group, in place of those it had."""
    former, schedule.base_lrs = list(schedule.base_lrs), list(rates)
    factors = getattr(schedule, "lr_lambdas", None)
    for number, (group, rate) in enumerate(zip(optimizer.param_groups, rates, strict=True)):
        group["initial_lr"] = rate
        if factors is not None:
            group["lr"] = rate * factors[number](schedule.last_epoch)
        elif former[number] and former[number] != rate:
            # Such a schedule makes each rate from the one before.
            group["lr"] *= rate / former[number]
