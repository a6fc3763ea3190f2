"""A module that takes its weights when it is first used; until then they stay in their file, if that is mapped."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


class DeferredModule:
    """A module whose structure is known and whose weights can wait.

    Attributes:
        structure: The module, with weights on the meta device before :attr:`module` is first asked for. Its
            configuration, and settings that say how it computes, are read and set here.
        memory_format: How the weights of convolutions are laid out once they are taken.
    """

    def __init__(self, structure: Any, weights: Mapping[str, Tensor], dtype: torch.dtype) -> None:
        """Keep ``weights`` for later.

        Args:
            structure: The module, on the meta device.
            weights: All of its weights, in its shapes.
            dtype: What they become.
        """
        self.structure = structure
        self.memory_format = torch.preserve_format
        self._waiting: dict[str, Tensor] | None = dict(weights)
        self._dtype = dtype

    @classmethod
    def of(cls, module: Any) -> "DeferredModule":
        """``module``, which has its weights."""
        made = cls(module, {}, torch.float32)
        made._waiting = None
        return made

    @property
    def dtype(self) -> torch.dtype:
        """What the weights are, or will be."""
        if self._waiting is not None:
            return self._dtype
        dtype: torch.dtype = self.structure.dtype
        return dtype

    @property
    def module(self) -> Any:
        """The module with its weights."""
        if self._waiting is not None:
            waiting, self._waiting = self._waiting, None
            # One by one, so that a weight is not held twice.
            ready = {name: waiting.pop(name).to(self._dtype) for name in list(waiting)}
            self.structure.load_state_dict(ready, strict=True, assign=True)
            self.structure.to(memory_format=self.memory_format)
        return self.structure

    def state_dict(self) -> dict[str, Tensor]:
        """The weights as the module has them, or will."""
        if self._waiting is None:
            state: dict[str, Tensor] = self.structure.state_dict()
            return state
        return {name: tensor.to(self._dtype) for name, tensor in self._waiting.items()}
