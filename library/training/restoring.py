"""From a state into the objects of a run: optimizer, schedule and scaler, where the state left them."""

from collections.abc import Collection, Mapping
from typing import Any, Final

import torch
from torch import Tensor

from library.errors import Problem, UserError, raise_if_any
from library.training.schedule_classes import restore_schedule, use_rates
from library.training.states import TrainingState
from library.training.updates import raw_optimizer

_PAGED: Final = frozenset({"state1", "state2"})
"""What bitsandbytes pages of the state of a weight."""


def restore(
    state: TrainingState,
    *,
    optimizer: Any,
    scheduler: Any,
    scaler: Any = None,
    at: int | None = None,
    anew: Collection[str] = (),
) -> None:
    """Put optimizer, schedule and scaler where ``state`` left them; its tensors are the method's to load.

    The learning rates are those of this run, at the step of the state: a changed one holds from here on.

    Args:
        state: The state.
        optimizer: The prepared optimizer.
        scheduler: The learning rates.
        scaler: The gradient scaler, if there is one.
        at: Go through the schedule of this run for so many steps, instead of taking it over: it has changed.
        anew: Settings of the optimizer that are this run's, whatever the state says.

    Raises:
        UserError: The state belongs to a run with other parameters.
    """
    rates = list(scheduler.base_lrs)
    fresh = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
    if state.optimizer is not None:
        raise_if_any(_other_optimizer(optimizer, state.optimizer))
    try:
        if state.optimizer is not None:
            _load(optimizer, state.optimizer)
            _keep_dtypes(optimizer, state.optimizer)
        if at is None:
            restore_schedule(optimizer, scheduler, state.scheduler, fresh, at=state.step)
        else:
            restore_schedule(optimizer, scheduler, None, fresh, at=at)
        if scaler is not None and state.scaler is not None:
            scaler.load_state_dict(dict(state.scaler))
    except (ValueError, KeyError, RuntimeError) as error:
        raise UserError(
            f"the state does not fit this run: {error}",
            where="--resume",
            remedy="Continue with the network, the optimizer and the trained parts the state was saved with.",
        ) from error
    for group, own in zip(optimizer.param_groups, fresh, strict=True):
        group.update({name: own[name] for name in anew if name in own})
    use_rates(optimizer, scheduler, rates)


def _other_optimizer(optimizer: Any, saved: Mapping[str, Any]) -> list[Problem]:
    """The settings of an optimizer are in its groups; one of another kind lacks some."""
    names = set().union(*saved.get("param_groups", [{}]))
    settings = set(optimizer.defaults).intersection(*optimizer.param_groups)
    missing = sorted(settings - names - {"lr"})
    if not missing:
        return []
    return [
        Problem(
            f"the state is one of another optimizer: it lacks {', '.join(missing)}",
            where="--resume, --optimizer_type",
            remedy="Continue with the optimizer that the state was saved with.",
        )
    ]


def _load(optimizer: Any, saved: Mapping[str, Any]) -> None:
    raw: Any = raw_optimizer(optimizer)
    if not getattr(raw, "is_paged", False):
        optimizer.load_state_dict(dict(saved))
        return
    # Moved by bitsandbytes, all of it would lie on the GPU, which may not have the room.
    raw.load_state_dict(dict(saved), move_to_device=False)
    for parameter in (parameter for group in raw.param_groups for parameter in group["params"]):
        state = raw.state.get(parameter, {})
        tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
        state.update({name: _placed(raw, parameter, name, value) for name, value in tensors.items()})


def _placed(optimizer: Any, parameter: Tensor, name: str, value: Tensor) -> Tensor:
    """``value`` where a new state of ``optimizer``, of bitsandbytes, would have it: paged or beside the parameter."""
    # It can make no pages of another kind; the average of two moments has another shape.
    is_pageable = value.dtype in (torch.float32, torch.uint8) and value.shape == parameter.shape
    if name not in _PAGED or not is_pageable:
        return value.to(parameter.device)
    buffer: Tensor = optimizer.get_state_buffer(parameter, dtype=value.dtype)
    return buffer.copy_(value)


def _keep_dtypes(optimizer: Any, saved: Mapping[str, Any]) -> None:
    """Give state tensors the dtype they were saved in: torch casts them to that of their parameter while loading."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for number, entries in saved["state"].items():
        state = optimizer.state.get(parameters[number], {})
        for name, value in entries.items():
            present = state.get(name)
            if hasattr(value, "dtype") and hasattr(present, "dtype") and present.dtype != value.dtype:
                state[name] = value.to(present.device)
