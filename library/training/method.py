"""What the loop asks of a training method and of a batch, and whom it tells after a step."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self

import torch
from torch import nn

from library.training.progress import Moment


class MicroBatch(Protocol):
    """A batch as the loop sees it: it belongs to a step and can be moved."""

    @property
    def step(self) -> int:
        """The optimizer step it belongs to, from 0."""

    @property
    def examples(self) -> tuple[int, ...]:
        """The numbers of its examples."""

    def to(self, device: torch.device) -> Self:
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

    def save(self, path: Path, metadata: Mapping[str, str], *, step: int, epoch: int) -> None:
        """Write the result after ``step`` steps to ``path``, with ``metadata`` where the format has a place for it.

        Args:
            path: The file, or the folder where the format is one.
            metadata: Texts by name.
            step: Finished optimizer steps.
            epoch: Finished epochs.
        """


@dataclass(frozen=True, kw_only=True, slots=True)
class StepShape:
    """How a step is put together.

    Attributes:
        micro_batches: Micro-batches this process runs in the step.
        examples: Examples of the step over all processes and micro-batches.
    """

    micro_batches: int
    examples: int


Hook = Callable[[Moment], None]
