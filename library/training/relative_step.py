"""Adafactor's own learning rate in the place of a schedule (Shazeer and Stern 2018, arXiv 1804.04235, section 8)."""

from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler


class RelativeStepReport(LRScheduler):
    """Shows the rate that Adafactor last used for the first weight of each group; it decides nothing.

    Args:
        optimizer: Adafactor with ``relative_step``.
        initial_lr: What is shown before the first step.
    """

    def __init__(self, optimizer: Optimizer, initial_lr: float) -> None:
        for group in optimizer.param_groups:
            group["lr"] = initial_lr
        super().__init__(optimizer)

    def get_lr(self) -> list[Any]:
        """The rates, by group."""
        optimizer: Any = self.optimizer
        return [
            float(optimizer._get_lr(group, state)) if state else base
            for base, group in zip(self.base_lrs, optimizer.param_groups, strict=True)
            for state in [optimizer.state.get(group["params"][0])]
        ]
