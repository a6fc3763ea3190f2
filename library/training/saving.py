"""Hooks that save: the model so far, and the state of the run."""

import logging
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from library.disk_space import CannotWriteError, room_for
from library.files import read_header
from library.training.best import BestModel
from library.training.naming import END, OutputNames, SavePlan, SavePoint, finished_epochs
from library.training.privacy import shown_path
from library.training.rescue import Keep, keep_or_fail
from library.training.states import TrainingState, write_state
from library.training.uploads import Uploads

if TYPE_CHECKING:
    from library.training.progress import Moment

logger = logging.getLogger(__name__)

SaveModel = Callable[[Path, int, int], None]
CaptureState = Callable[[int, int], TrainingState]


class ModelSaver:
    """The hook that writes models: what is due by the plan, and the final one.

    Args:
        plan: When to save and what stays.
        names: Names of the files.
        save: ``save(path, step, epoch)`` writes the model, whole or not at all.
        is_main: Only the main process writes.
        best: Told of every saved model; the best one is not removed.
        weights: What is saved, as :class:`BestModel` calls it.
        uploads: Told of every saved model.
        keep: Writes below the folder of the results, or sees to what follows from its failing.
    """

    def __init__(
        self,
        plan: SavePlan,
        names: OutputNames,
        save: SaveModel,
        *,
        is_main: bool = True,
        best: BestModel | None = None,
        weights: str = "model",
        uploads: Uploads | None = None,
        keep: Keep = keep_or_fail,
    ) -> None:
        self._plan = plan
        self._names = names
        self._save = save
        self._is_main = is_main
        self._best = best
        self._weights = weights
        self._uploads = uploads
        self._keep = keep
        self.last_saved: Path | None = None

    def __call__(self, moment: "Moment") -> None:
        """Save what is due at ``moment``."""
        for point in self._plan.due(moment):
            epoch = finished_epochs(moment) if point.kind == "step" else moment.epoch
            self.save(point, step=moment.step, epoch=epoch, last=point == END)

    def save(self, point: SavePoint = END, *, step: int, epoch: int, last: bool = True) -> None:
        """Save the model under the name of ``point``, then remove the one it replaces.

        Args:
            point: The occasion.
            step: Finished steps.
            epoch: Finished epochs.
            last: The run ends with it.

        Raises:
            UserError: A weight is not finite; nothing is removed then.
        """
        if not self._is_main:
            return

        def write(folder: Path) -> Path:
            path = folder / self._names.model(point).name
            logger.info("saving checkpoint: %s", shown_path(path))
            self._save(path, step, epoch)
            _verify_model(path)
            return path

        path = self._keep(self._names.folder, write, last=last)
        if path is None:
            return
        self.last_saved = path
        if self._uploads is not None:
            self._uploads.add(path)
        if path.parent != self._names.folder:
            return
        try:
            self._remove_outdated(point, path, step)
        except CannotWriteError as error:
            logger.error("%s; no older checkpoint is removed", error.problems[0].what)

    def _remove_outdated(self, point: SavePoint, path: Path, step: int) -> None:
        surpassed = self._best.saved(path, step, self._weights) if self._best is not None else None
        outdated = self._plan.outdated(point)
        for old in (surpassed, self._names.model(outdated) if outdated is not None else None):
            if old is not None and not (self._best is not None and self._best.outlives(old)):
                _remove(old, "removing old checkpoint: %s", self._uploads)


class StateSaver:
    """The hook that writes states: together with models, or only at the end.

    Args:
        plan: When to save and what stays.
        names: Names of the folders.
        capture: ``capture(step, epoch)`` gives the state of the run.
        every_time: Save whenever the plan says so; otherwise only at the end.
        is_main: Only the main process writes.
        uploads: Told of every saved state.
        keep: As for models.
    """

    def __init__(
        self,
        plan: SavePlan,
        names: OutputNames,
        capture: CaptureState,
        *,
        every_time: bool,
        is_main: bool = True,
        uploads: Uploads | None = None,
        keep: Keep = keep_or_fail,
    ) -> None:
        self._plan = plan
        self._names = names
        self._capture = capture
        self._every_time = every_time
        self._is_main = is_main
        self._uploads = uploads
        self._keep = keep
        self.last_saved: Path | None = None

    def __call__(self, moment: "Moment") -> None:
        """Save what is due at ``moment``."""
        for point in self._plan.due(moment):
            if self._every_time or point == END:
                self.save(point, step=moment.step, epoch=moment.epoch, last=point == END)

    def save(self, point: SavePoint = END, *, step: int, epoch: int, last: bool = True) -> None:
        """Save the state under the name of ``point``, then remove the one it replaces.

        Args:
            point: The occasion.
            step: Finished steps.
            epoch: The epoch of the last of them.
            last: The run ends with it.

        Raises:
            UserError: A weight is not finite; nothing is removed then.
        """
        if not self._is_main:
            return

        def write(folder: Path) -> Path:
            path = folder / self._names.state(point).name
            logger.info("saving state: %s", shown_path(path))
            write_state(path, self._capture(step, epoch))
            return path

        path = self._keep(self._names.folder, write, last=last)
        if path is None:
            return
        self.last_saved = path
        if self._uploads is not None:
            self._uploads.add(path)
        outdated = self._plan.outdated(point) if path.parent == self._names.folder else None
        if outdated is not None:
            _remove(self._names.state(outdated), "removing old state: %s", self._uploads)


def _verify_model(path: Path) -> None:
    """Refuse to go on as if ``path`` were saved when it is missing, empty or cut off: it cannot be written then."""
    with room_for(path):
        files = [file for file in (path, *path.rglob("*")) if file.is_file()]
        if not files or any(file.stat().st_size < _least_size(file) for file in files):
            raise OSError(f"{path.name} is not whole after saving")


def _least_size(path: Path) -> int:
    """Bytes a file must have: what the header of a safetensors file promises, one byte of any other."""
    header = read_header(path)
    if not header:
        return 1
    with path.open("rb") as file:
        (header_size,) = struct.unpack("<Q", file.read(8))
    ends = [facts["data_offsets"][1] for name, facts in header.items() if name != "__metadata__"]
    return 8 + int(header_size) + int(max(ends, default=0))


def _remove(path: Path, message: str, uploads: Uploads | None = None) -> None:
    """Remove a model or a state that is no longer kept, once it need not be uploaded; one that resists is mentioned."""
    if not path.exists() or (uploads is not None and uploads.keeps(path, lambda late: _remove(late, message))):
        return
    logger.info(message, shown_path(path))
    try:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    except OSError as error:
        logger.warning("%s could not be removed: %s", shown_path(path), error.strerror or error)
