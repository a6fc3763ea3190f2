"""What a run tells while it trains: the average loss, and figures for TensorBoard."""

import importlib.util
import json
import logging
import math
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from library.errors import Problem
from library.training.options import LoggingOptions
from library.training.privacy import shareable, shown_path

if TYPE_CHECKING:
    from library.training.progress import Moment

logger = logging.getLogger(__name__)


class LossAverage:
    """Mean over the latest loss of each step of an epoch: smooth, and never older than an epoch."""

    def __init__(self) -> None:
        self._losses: dict[int, float] = {}
        self._total = 0.0

    def add(self, *, epoch: int, step: int, loss: float) -> None:
        """Take in the loss of step ``step``, from 0, of its epoch; it replaces that of the epoch before."""
        if step == 0:
            # Summed anew once an epoch: rounding errors of a running sum would pile up.
            self._total = math.fsum(self._losses.values())
        self._total += loss - self._losses.get(step, 0.0)
        self._losses[step] = loss

    @property
    def value(self) -> float:
        """The mean; NaN before the first loss."""
        return self._total / len(self._losses) if self._losses else math.nan


def check_logging(options: LoggingOptions) -> list[Problem]:
    """What stands against logging as asked; imports nothing heavy."""
    if options.logging_dir is None or importlib.util.find_spec("tensorboard") is not None:
        return []
    return [
        Problem(
            "--logging_dir needs the package tensorboard, which is not installed",
            where="--logging_dir",
            remedy="pip install tensorboard   (or leave --logging_dir out)",
        )
    ]


class Tracker:
    """The hook that writes figures for TensorBoard, and the context that closes their file.

    The x axis is the number of finished steps; that of ``loss/epoch_average`` is the epoch.

    Args:
        options: Folder and names; without a folder nothing is written.
        tracker_name: Name of the log within its folder where the options give none.
        config: Option values, shown in the log with --log_config, without secrets and paths.
        is_main: Only the main process writes.
    """

    def __init__(
        self,
        options: LoggingOptions,
        *,
        tracker_name: str,
        config: Mapping[str, object] | None = None,
        is_main: bool = True,
    ) -> None:
        self._writer: Any = None
        self.folder: Path | None = None
        if options.logging_dir is None or not is_main:
            return
        from torch.utils.tensorboard import SummaryWriter

        session = (options.log_prefix or "") + time.strftime("%Y%m%d%H%M%S")
        self.folder = options.logging_dir / session / (options.log_tracker_name or tracker_name)
        self._writer = SummaryWriter(str(self.folder))
        logger.info("logging to %s", shown_path(self.folder))
        if options.log_config and config is not None:
            self._writer.add_text("config", _as_text(config))

    def __call__(self, moment: "Moment") -> None:
        """Write the figures of ``moment``."""
        if self._writer is None:
            return
        figures = {"loss/current": moment.loss, "loss/average": moment.average_loss, **moment.metrics}
        figures |= {f"lr/{name}": rate for name, rate in moment.learning_rates.items()}
        for tag, value in figures.items():
            self._writer.add_scalar(tag, value, moment.step)
        if moment.epoch_ended or moment.finished:
            self._writer.add_scalar("loss/epoch_average", moment.average_loss, moment.epoch)

    def __enter__(self) -> Self:
        """The hook itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Write what is left, also when the run failed."""
        if self._writer is not None:
            self._writer.close()


def _as_text(config: Mapping[str, object]) -> str:
    """Option values as an indented block."""
    lines = json.dumps(shareable(config), indent=2, sort_keys=True, default=str).splitlines()
    return "\n".join(f"    {line}" for line in lines)
