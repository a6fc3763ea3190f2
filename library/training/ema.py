"""An exponential moving average of the trained weights: steadier than the weights themselves, and often better.

Polyak and Juditsky 1992, "Acceleration of Stochastic Approximation by Averaging"; for diffusion models Ho et al. 2020,
arXiv 2006.11239, appendix B.
"""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from library.errors import UserError
from library.training.options import EmaOptions

if TYPE_CHECKING:
    from library.training.progress import Moment

log = logging.getLogger(__name__)


class WeightAverage:
    """The hook that averages the trained parameters after every optimizer step; buffers are not averaged.

    Every process keeps the same average, in float32 whatever the dtype of the parameters.

    Attributes:
        decay: How much of the average stays at a step, below 1.
        updates: Optimizer steps taken in so far; those that were left out do not count.
    """

    def __init__(self, trained: nn.Module, *, decay: float, device: torch.device) -> None:
        """Begin with the present weights.

        Args:
            trained: The module whose parameters are averaged.
            decay: How much of the average stays at a step, in [0, 1).
            device: Where the average is kept.
        """
        self.decay = decay
        self.updates = 0
        self._device = device
        self._parameters = dict(trained.named_parameters())
        self._averages = {name: self._copied(parameter) for name, parameter in self._parameters.items()}

    @classmethod
    def of(cls, options: EmaOptions, trained: nn.Module, device: torch.device) -> "WeightAverage | None":
        """The average that the options ask for; ``device`` is that of the trained weights."""
        if not options.ema:
            return None
        return cls(
            trained,
            decay=options.ema_decay,
            device=torch.device("cpu") if options.ema_device == "cpu" else device,
        )

    def __call__(self, moment: "Moment") -> None:
        """Take in the step that ended at ``moment``."""
        if not moment.skipped:
            self.update()

    @torch.no_grad()
    def update(self) -> None:
        """Take in the present weights: average + (1 - d) (weight - average).

        After n updates, d = min(decay, (1 + n) / (10 + n)), so that the untrained weights are soon forgotten.
        """
        kept = min(self.decay, (1 + self.updates) / (10 + self.updates))
        for name, parameter in self._parameters.items():
            average = self._averages[name]
            average.lerp_(parameter.detach().to(average.device, torch.float32), 1 - kept)
        self.updates += 1

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The average in the place of the weights inside the block; afterwards the weights are back, bit by bit."""
        weights = {name: parameter.detach().to(self._device, copy=True) for name, parameter in self._parameters.items()}
        self._set(self._averages)
        try:
            yield
        finally:
            self._set(weights)

    def state_dict(self) -> dict[str, Tensor]:
        """The average by the names of the parameters, float32."""
        return dict(self._averages)

    def load(self, averages: Mapping[str, Tensor], updates: int) -> None:
        """Continue from a saved average.

        Raises:
            UserError: It is one of other weights.
        """
        shapes = {name: tuple(tensor.shape) for name, tensor in averages.items()}
        if shapes != {name: tuple(tensor.shape) for name, tensor in self._averages.items()}:
            raise UserError(
                "the average of the weights in the state is one of other weights",
                where="--resume",
                remedy="Continue with the rank and the trained parts that the state was saved with, or without --ema.",
            )
        for name, tensor in averages.items():
            self._averages[name].copy_(tensor)
        self.updates = updates

    def restart(self) -> None:
        """Begin again with the present weights."""
        self._averages = {name: self._copied(parameter) for name, parameter in self._parameters.items()}
        self.updates = 0

    def _copied(self, parameter: Tensor) -> Tensor:
        return parameter.detach().to(self._device, torch.float32, copy=True)

    @torch.no_grad()
    def _set(self, tensors: Mapping[str, Tensor]) -> None:
        for name, parameter in self._parameters.items():
            parameter.copy_(tensors[name])
