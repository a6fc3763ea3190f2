"""What the loop asks of a training method, of a batch, and what it tells after a step."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, Self

import torch
from torch import nn


class MicroBatch(Protocol):
    """A batch as the loop sees it: it belongs to a step and can be moved."""

    @property
    def step(self) -> int:
        """The optimizer step it belongs to, from 0."""

    @property
    def examples(self) -> tuple[int, ...]:
        """The numbers of its examples."""

    def to(self, device: torch.device, *, non_blocking: bool = False) -> Self:
        """The same batch on ``device``."""


class TrainingMethod(Protocol):
    """One way to train; every script has its own. No base class: what methods share, they hold.

    Attributes:
        module: The trained computation; ``module(batch)`` returns one weighted loss an example, shape (B,).
        trained: The module whose ``state_dict`` a state keeps: what training changes, and nothing else.
    """

    module: nn.Module
    trained: nn.Module

    def param_groups(self) -> list[dict[str, Any]]:
        """Parameter groups for the optimizer, each with ``params``, ``lr`` and ``name``."""

    def after_step(self, step: int) -> dict[str, float]:
        """Whatever must follow the optimizer's step (number of finished steps given); returns figures to log."""

    def save(self, path: Path, metadata: Mapping[str, str]) -> None:
        """Write the result so far to ``path``, with ``metadata`` where the format has a place for it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepShape:
    """How a step is put together.

    Attributes:
        micro_batches: Micro-batches this process runs in the step.
        examples: Examples of the step over all processes and micro-batches.
    """

    micro_batches: int
    examples: int


@dataclass(frozen=True, kw_only=True, slots=True)
class RunLength:
    """The length of a run in optimizer steps, to which epochs and ratios are converted once.

    Attributes:
        total_steps: Optimizer steps of the whole run.
        steps_per_epoch: Optimizer steps of a full epoch; the last epoch of a run may be shorter.
    """

    total_steps: int
    steps_per_epoch: int

    @classmethod
    def of(cls, *, max_train_steps: int, max_train_epochs: int | None, steps_per_epoch: int) -> "RunLength":
        """The length that the options ask for; epochs win over steps."""
        total = max_train_steps if max_train_epochs is None else max_train_epochs * steps_per_epoch
        return cls(total_steps=total, steps_per_epoch=steps_per_epoch)

    @property
    def epochs(self) -> int:
        """Number of epochs begun."""
        return -(-self.total_steps // self.steps_per_epoch)

    def epoch_of(self, step: int) -> int:
        """The epoch, from 1, that the optimizer step with the index ``step``, from 0, belongs to."""
        return step // self.steps_per_epoch + 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Moment:
    """A finished optimizer step, as hooks see it.

    Attributes:
        step: Number of finished steps, at least 1.
        epoch: The epoch, from 1, the step belonged to.
        epoch_ended: The step was the last of its epoch.
        finished: The step was the last of the run.
        loss: Mean loss over the examples of the step, all processes included.
        average_loss: Mean over the latest loss of each step of an epoch.
        learning_rates: The rate the step used, by the name of the parameter group.
        metrics: Further figures to log, by tag.
    """

    step: int
    epoch: int
    epoch_ended: bool
    finished: bool
    loss: float
    average_loss: float
    learning_rates: dict[str, float]
    metrics: dict[str, float] = field(default_factory=dict)


Hook = Callable[[Moment], None]
