"""Hooks that save: the model so far, and the state of the run."""

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from library.disk_space import CannotWriteError, room_for
from library.errors import UserError
from library.files import discard, read_header
from library.training.best import BestModel
from library.training.naming import END, TIMED, OutputNames, SavePlan, SavePoint, finished_epochs
from library.training.options import SaveOptions
from library.training.privacy import shown_path
from library.training.rescue import Keep, keep_or_fail
from library.training.states import TrainingState, write_state
from library.training.uploads import Uploads

if TYPE_CHECKING:
    from library.training.progress import Moment

logger = logging.getLogger(__name__)

SaveModel = Callable[[Path, int, int], None]
Saved = Callable[[Path, int, int], None]
"""Told of what is complete under its name, with the finished steps and epochs."""
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
        saved: Told of every saved model.
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
        saved: Saved | None = None,
        keep: Keep = keep_or_fail,
    ) -> None:
        self._plan = plan
        self._names = names
        self._save = save
        self._is_main = is_main
        self._best = best
        self._weights = weights
        self._uploads = uploads
        self._saved = saved
        self._keep = keep
        self.last_saved: Path | None = None

    @property
    def has_ended(self) -> bool:
        """Whether the final model is there."""
        return self._names.model(END).exists()

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
        if self._saved is not None:
            self._saved(path, step, epoch)
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
    """The hook that writes states: together with models, only at the end, or after some time.

    Args:
        plan: When to save and what stays.
        names: Names of the folders.
        capture: ``capture(step, epoch)`` gives the state of the run.
        options: Which of the plan's occasions are used, and after how many minutes a state is saved anyway.
        before: Called before a state is saved: what it is to be continued with must be on the disk by then.
        is_main: Only the main process writes.
        uploads: Told of every saved state.
        saved: Told of every saved state.
        keep: As for models.
        clock: Seconds, whatever the time of day does; for tests.
    """

    def __init__(
        self,
        plan: SavePlan,
        names: OutputNames,
        capture: CaptureState,
        options: SaveOptions,
        *,
        before: Callable[[], None] = lambda: None,
        is_main: bool = True,
        uploads: Uploads | None = None,
        saved: Saved | None = None,
        keep: Keep = keep_or_fail,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._plan = plan
        self._names = names
        self._capture = capture
        self._options = options
        self._before = before
        self._is_main = is_main
        self._uploads = uploads
        self._saved = saved
        self._keep = keep
        self._clock = clock
        self._since = clock()
        self.last_saved: Path | None = None

    @property
    def has_ended(self) -> bool:
        """Whether the final state is there, or none is asked for."""
        return not self._at_end or self._names.state(END).exists()

    @property
    def _at_end(self) -> bool:
        return self._options.save_state or self._options.save_state_on_train_end

    def __call__(self, moment: "Moment") -> None:
        """Save what is due at ``moment``."""
        due = [
            point for point in self._plan.due(moment) if (self._at_end if point == END else self._options.save_state)
        ]
        minutes = self._options.save_state_every_minutes
        if not due and not moment.finished and minutes is not None and self._clock() - self._since >= 60 * minutes:
            due = [TIMED]
        for point in due:
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
        self._before()

        def write(folder: Path) -> Path:
            path = folder / self._names.state(point).name
            logger.info("saving state: %s", shown_path(path))
            write_state(path, self._capture(step, epoch))
            return path

        path = self._keep(self._names.folder, write, last=last)
        if path is None:
            return
        self.last_saved = path
        self._since = self._clock()
        if self._saved is not None:
            self._saved(path, step, epoch)
        if self._uploads is not None:
            self._uploads.add(path)
        outdated = self._plan.outdated(point) if path.parent == self._names.folder else None
        if outdated is not None:
            _remove(self._names.state(outdated), "removing old state: %s", self._uploads)


def _verify_model(path: Path) -> None:
    """Refuse to go on as if ``path`` were saved when it is missing, empty or cut off: it cannot be written then."""
    with room_for(path):
        files = [file for file in (path, *path.rglob("*")) if file.is_file()]
        if not files or not all(_is_whole(file) for file in files):
            raise OSError(f"{path.name} is not whole after saving")


def _is_whole(path: Path) -> bool:
    """Whether a safetensors file holds what its header promises, and any other file something."""
    try:
        read_header(path)
    except UserError:
        return False
    return path.stat().st_size > 0


def _remove(path: Path, message: str, uploads: Uploads | None = None) -> None:
    """Remove a model or a state that is no longer kept, once it need not be uploaded; one that resists is mentioned."""
    if not path.exists() or (uploads is not None and uploads.keeps(path, lambda late: _remove(late, message))):
        return
    logger.info(message, shown_path(path))
    try:
        discard(path)
    except OSError as error:
        logger.warning("%s could not be removed: %s", shown_path(path), error.strerror or error)
