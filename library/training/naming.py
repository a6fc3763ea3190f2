"""Names of results and states, when they are due, and which older ones they replace."""

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from library.disk_space import may_write, nearest
from library.errors import Problem
from library.training.options import SaveOptions
from library.training.progress import Moment


@dataclass(frozen=True, kw_only=True, slots=True)
class SavePoint:
    """One occasion to save.

    Attributes:
        kind: After a number of epochs, after a number of steps, at the end of the run, or because of the time.
        number: The epoch (from 1) or the number of steps; 0 for the others.
    """

    kind: Literal["epoch", "step", "last", "timed"]
    number: int = 0


END = SavePoint(kind="last")
TIMED = SavePoint(kind="timed")


@dataclass(frozen=True, kw_only=True, slots=True)
class OutputNames:
    """Names of everything a run writes below its output folder.

    Attributes:
        folder: The output folder.
        name: Base name; without one the names are "epoch", "at" and "last".
        suffix: Suffix of a model file; empty for a model that is a folder.
    """

    folder: Path
    name: str | None
    suffix: str

    def model(self, point: SavePoint) -> Path:
        """Path of the model saved at ``point``."""
        return self.folder / f"{self._stem(point)}{self.suffix}"

    def state(self, point: SavePoint) -> Path:
        """Folder of the state saved at ``point``."""
        return self.folder / f"{self._stem(point)}-state"

    def of_average(self) -> "OutputNames":
        """The same names, for the average of the weights: ``-ema`` stands before the suffix."""
        return replace(self, suffix=f"-ema{self.suffix}")

    def owns(self, file: str) -> bool:
        """Whether a file or folder of that name, directly below the folder, is one that such a run writes."""
        numbered = r"-\d{6,}|-step\d{8,}|-timed"
        stem = f"{re.escape(self.name)}({numbered})?" if self.name else r"(epoch-\d{6,}|at-step\d{8,}|timed|last|\w+)"
        return re.fullmatch(rf"{stem}(-ema|-best|-report)?(-state|(\.\w+)*)", file) is not None

    def _stem(self, point: SavePoint) -> str:
        if point.kind == "epoch":
            return f"{self.name or 'epoch'}-{point.number:06d}"
        if point.kind == "step":
            return f"{self.name or 'at'}-step{point.number:08d}"
        if point.kind == "timed":
            return f"{self.name}-timed" if self.name else "timed"
        return self.name or "last"


def epoch_to_remove(epoch: int, *, every: int, last: int) -> int | None:
    """The epoch whose file goes once that of ``epoch`` is saved, when ``last`` files are kept; None for none."""
    outdated = epoch - every * last
    return outdated if outdated >= 0 else None


def step_to_remove(step: int, *, every: int, last: int) -> int | None:
    """The step whose file goes once that of ``step`` is saved, when those of ``last`` steps are kept; None for none."""
    outdated = step - last - 1
    return outdated - outdated % every if outdated >= 0 else None


@dataclass(frozen=True, kw_only=True, slots=True)
class SavePlan:
    """When a run saves and how much of it stays; None switches a rule off.

    Attributes:
        every_epochs: Save after each multiple of so many epochs, the last epoch of the run excepted.
        every_steps: Save after each multiple of so many steps.
        keep_epochs: Number of epoch files that stay.
        keep_steps: Files of so many last steps stay.
    """

    every_epochs: int | None = None
    every_steps: int | None = None
    keep_epochs: int | None = None
    keep_steps: int | None = None

    @classmethod
    def for_models(cls, options: SaveOptions, epochs: int) -> "SavePlan":
        """The plan for models in a run of ``epochs`` epochs."""
        every_epochs = options.save_every_n_epochs
        if options.save_n_epoch_ratio:
            every_epochs = max(1, epochs // options.save_n_epoch_ratio)
        return cls(
            every_epochs=every_epochs,
            every_steps=options.save_every_n_steps,
            keep_epochs=options.save_last_n_epochs,
            keep_steps=options.save_last_n_steps,
        )

    @classmethod
    def for_states(cls, options: SaveOptions, epochs: int) -> "SavePlan":
        """The plan for states: that of the models, with limits of its own where they are given."""
        models = cls.for_models(options, epochs)
        return cls(
            every_epochs=models.every_epochs,
            every_steps=models.every_steps,
            keep_epochs=options.save_last_n_epochs_state or models.keep_epochs,
            keep_steps=options.save_last_n_steps_state or models.keep_steps,
        )

    def due(self, moment: Moment) -> tuple[SavePoint, ...]:
        """The occasions to save at ``moment``."""
        points = []
        if self.every_steps and moment.step % self.every_steps == 0:
            points.append(SavePoint(kind="step", number=moment.step))
        if self.every_epochs and moment.epoch_ended and not moment.finished and moment.epoch % self.every_epochs == 0:
            points.append(SavePoint(kind="epoch", number=moment.epoch))
        if moment.finished:
            points.append(END)
        return tuple(points)

    def outdated(self, point: SavePoint) -> SavePoint | None:
        """The occasion whose file goes once that of ``point`` is safe."""
        number = None
        if point.kind == "epoch" and self.every_epochs and self.keep_epochs:
            number = epoch_to_remove(point.number, every=self.every_epochs, last=self.keep_epochs)
        elif point.kind == "step" and self.every_steps and self.keep_steps:
            number = step_to_remove(point.number, every=self.every_steps, last=self.keep_steps)
        return SavePoint(kind=point.kind, number=number) if number is not None else None


def finished_epochs(moment: Moment) -> int:
    """Number of complete epochs at ``moment``."""
    return moment.epoch if moment.epoch_ended else moment.epoch - 1


def check_saving(options: SaveOptions) -> list[Problem]:
    """What stands against writing to the output folder; imports nothing heavy."""
    if options.output_dir is None:
        return [
            Problem(
                "there is no folder for the results", where="--output_dir", remedy="For instance --output_dir outputs."
            )
        ]
    folder = options.output_dir
    existing = nearest(folder)
    if existing.is_dir() and not may_write(folder):
        return [
            Problem(
                f"{existing} cannot be written to", where="--output_dir", remedy="Choose another folder, or allow it."
            )
        ]
    if existing.exists() and not existing.is_dir():
        return [
            Problem(
                f"{existing} is a file, not a folder", where="--output_dir", remedy="Choose a name that is not taken."
            )
        ]
    return []
