"""Which of the saved models did best in validation, marked in a small JSON file beside them."""

import logging
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from library.disk_space import room_for
from library.documents import read_table
from library.files import write_json
from library.training.privacy import shown_path

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Mark:
    """The best model so far, as the JSON file holds it.

    Attributes:
        file: Its name, in the folder of the results.
        step: Finished steps when it was saved.
        loss: Its validation loss.
        outlived: It would be gone by now, had it not been the best.
    """

    file: str
    step: int
    loss: float
    outlived: bool = False


class BestModel:
    """Keeps the mark of the best saved model; it names only files that exist, for the best model is never removed.

    Args:
        folder: The folder of the results.
        name: Base name of the results: the mark is ``<name>-best.json``, or ``best.json`` without one.
        continued: Go on with the mark that an earlier part of the run has left.
    """

    def __init__(self, folder: Path, name: str | None, *, continued: bool = False) -> None:
        self.path = folder / (f"{name}-best.json" if name else "best.json")
        self._mark = self._read() if continued else None
        self._measured: tuple[int, Mapping[str, float]] = (-1, {})

    @property
    def mark(self) -> Mark | None:
        """The best model so far."""
        return self._mark

    def measured(self, step: int, losses: Mapping[str, float]) -> None:
        """Take in validation losses after ``step`` steps, by what was measured ("model", "ema")."""
        self._measured = step, losses

    def saved(self, path: Path, step: int, weights: str) -> Path | None:
        """Take in a model saved after ``step`` steps; the model that need not be kept any longer, if there is one."""
        former = self._mark
        if former is not None and former.file == path.name:
            # What the mark tells of has been replaced.
            former = self._mark = None
        measured_at, losses = self._measured
        loss = losses.get(weights, math.nan) if measured_at == step else math.nan
        if not math.isfinite(loss) or (former is not None and loss >= former.loss):
            if self._mark is None:
                with room_for(self.path):
                    self.path.unlink(missing_ok=True)
            return None
        self._write(Mark(file=path.name, step=step, loss=loss))
        log.info("best so far: %s (validation loss %.5f)", shown_path(path), loss)
        return self.path.parent / former.file if former is not None and former.outlived else None

    def outlives(self, path: Path) -> bool:
        """Whether the model at ``path``, which is due to be removed, stays because it is the best."""
        if self._mark is None or self._mark.file != path.name:
            return False
        self._write(Mark(file=self._mark.file, step=self._mark.step, loss=self._mark.loss, outlived=True))
        log.info("keeping the best checkpoint: %s", shown_path(path))
        return True

    def _write(self, mark: Mark) -> None:
        write_json(self.path, asdict(mark))
        self._mark = mark

    def _read(self) -> Mark | None:
        try:
            mark = Mark(**read_table(self.path))
            # What is beside the mark may be removed later, and nothing else.
            is_beside = mark.file == Path(mark.file).name and mark.file not in ("", "..")
        except (OSError, ValueError, TypeError):
            return None
        return mark if is_beside and (self.path.parent / mark.file).exists() else None
