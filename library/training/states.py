"""State folders: what a run needs to continue exactly, written whole or not at all.

A state holds tensors, optimizer, schedule, scaler and the step; the random numbers of a run are addressed, so none are
kept. Its manifest, written last, lists size and hash of every file; a folder without a valid one is never read.
"""

import json
import logging
import pickle
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from library.documents import DocumentError, read_table
from library.errors import Problem, UserError, raise_if_any
from library.files import (
    REPLACED_MARK,
    folder_written_whole,
    is_temporary,
    read_tensors,
    recover,
    sha256_of_file,
    write_json,
    write_tensors,
    write_text,
    written_whole,
)
from library.torch_files import load_plain
from library.training.clock import now

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)

MANIFEST: Final = "manifest.json"
MODEL: Final = "model.safetensors"
OPTIMIZER: Final = "optimizer.bin"
SCHEDULER: Final = "scheduler.bin"
SCALER: Final = "scaler.pt"
EMA: Final = "ema.safetensors"
PROGRESS: Final = "train_state.json"
FINGERPRINT: Final = "fingerprint.json"
CURVES: Final = "curves.json"

_RANDOM: Final = "random_states_0.pkl"
"""Accelerate always writes it, and this program never does."""
_MODELS: Final = ((MODEL, "model_1.safetensors"), ("pytorch_model.bin", "pytorch_model_1.bin"))

_FORMAT: Final = 1
_EMA_UPDATES: Final = "updates"
_NEEDED: Final = (MODEL, OPTIMIZER, SCHEDULER, PROGRESS, FINGERPRINT)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingState:
    """A run between two optimizer steps.

    Attributes:
        step: Number of finished optimizer steps.
        epoch: The epoch, from 1, of the last finished step.
        tensors: What training changes, by name.
        optimizer: ``state_dict`` of the optimizer; None where it begins anew.
        scheduler: ``state_dict`` of the learning-rate schedule; None where it is to be gone through.
        scaler: ``state_dict`` of the gradient scaler, if there is one.
        ema: Average of the trained weights by name, if one is kept.
        ema_updates: Optimizer steps that the average has taken in.
        losses: The mean loss so far, as :class:`library.training.tracking.LossAverage` keeps it.
        log: Where the run is logged, as :class:`library.training.tracking.Tracker` tells it.
        curves: What has been logged, as :class:`library.training.history.RunHistory` keeps it for the report.
        fingerprint: What the run was made of, see :func:`library.training.fingerprint.fingerprint`.
    """

    step: int
    epoch: int
    tensors: "Mapping[str, Tensor]"
    optimizer: Mapping[str, Any] | None
    scheduler: Mapping[str, Any] | None
    scaler: Mapping[str, Any] | None = None
    ema: "Mapping[str, Tensor] | None" = None
    ema_updates: int = 0
    losses: Mapping[str, Any] = field(default_factory=dict)
    log: Mapping[str, str] = field(default_factory=dict)
    curves: Mapping[str, Any] = field(default_factory=dict)
    fingerprint: Mapping[str, Any] = field(default_factory=dict)


def write_state(folder: Path, state: TrainingState) -> None:
    """Write ``state`` to ``folder``, whole or not at all; a state of that name stays until the new one is complete.

    Raises:
        CannotWriteError: The folder cannot be written to; a former state is kept.
        UserError: A tensor is not finite; or another program holds the name, and the state is kept under the one that
            is told.
    """
    with folder_written_whole(folder, may_replace=lambda _: True, size=size_of(state)) as temporary:
        _write_contents(temporary, state)
        reason = _incompleteness(temporary)
        raise_if_any([_not_a_state(temporary, reason)] if reason else [])


def size_of(state: TrainingState) -> int:
    """Bytes of the tensors in ``state``, which is nearly all that is written of it."""
    parts = (state.tensors, state.optimizer, state.scheduler, state.scaler, state.ema)
    return sum(tensor.numel() * tensor.itemsize for part in parts for tensor in _tensors_in(part))


def _tensors_in(content: Any) -> "Iterator[Tensor]":
    import torch

    if isinstance(content, torch.Tensor):
        yield content
    elif isinstance(content, Mapping):
        for value in content.values():
            yield from _tensors_in(value)
    elif isinstance(content, list | tuple):
        for value in content:
            yield from _tensors_in(value)


def _write_contents(folder: Path, state: TrainingState) -> None:
    assert state.optimizer is not None, "a run has one"
    assert state.scheduler is not None, "a run has one"
    write_tensors(folder / MODEL, state.tensors)
    _write_pickle(folder / OPTIMIZER, state.optimizer)
    _write_pickle(folder / SCHEDULER, state.scheduler)
    if state.scaler is not None:
        _write_pickle(folder / SCALER, state.scaler)
    if state.ema is not None:
        write_tensors(folder / EMA, state.ema, metadata={_EMA_UPDATES: str(state.ema_updates)})
    place = {"current_epoch": state.epoch, "current_step": state.step}
    write_json(folder / PROGRESS, {**place, "saved_at": now(), "losses": state.losses, "log": state.log})
    write_json(folder / FINGERPRINT, state.fingerprint)
    if state.curves:
        # Thousands of numbers, which nobody reads line by line.
        write_text(folder / CURVES, json.dumps(state.curves))
    files = {
        path.name: {"size": path.stat().st_size, "sha256": sha256_of_file(path)} for path in sorted(folder.iterdir())
    }
    write_json(folder / MANIFEST, {"format": _FORMAT, "files": files})


def _write_pickle(path: Path, content: Mapping[str, Any]) -> None:
    import torch

    size = sum(tensor.numel() * tensor.itemsize for tensor in _tensors_in(content))
    # Given a name, the library would put it into the file, and not say what the system says.
    with written_whole(path, size=size) as temporary, temporary.open("wb") as file:
        torch.save(dict(content), file)


def find_states(folder: Path) -> list[Path]:
    """The states directly below ``folder`` whose files are all there, in the order in which they were saved."""
    if not folder.is_dir():
        return []
    for cut_off in folder.glob(f"{REPLACED_MARK}*-state"):
        recover(cut_off.with_name(cut_off.name.removeprefix(REPLACED_MARK)))
    found = [
        path
        for path in sorted(folder.iterdir())
        if path.is_dir() and not is_temporary(path.name) and not _incompleteness(path)
    ]
    return sorted(found, key=_age)


def _age(folder: Path) -> tuple[float, int]:
    """When a state was saved, and after how many steps."""
    progress = read_json(folder / PROGRESS)
    saved_at = progress.get("saved_at")
    return float(saved_at) if isinstance(saved_at, int | float) else 0.0, count_in(progress, "current_step") or 0


def newest_state(folder: Path, belongs: Callable[[str], bool]) -> Path | None:
    """The newest whole state directly below ``folder`` whose name ``belongs``; None without any.

    Every file is read and compared with its hash: the state is one to rely on.
    """
    for path in reversed(find_states(folder)):
        if not belongs(path.name):
            continue
        damage = _damage(path)
        if not damage:
            return path
        log.warning("passing over a state: %s", damage[0].what)
    return None


def seed_of(folder: Path) -> int | None:
    """The seed of the run that the state in ``folder`` is of; None where it does not say."""
    options = read_json(folder / FINGERPRINT).get("options")
    seed = options.get("seed") if isinstance(options, dict) else None
    return seed if isinstance(seed, int) else None


def check_state(folder: Path) -> list[Problem]:
    """What stands against continuing from ``folder``, by names and sizes; quick, and imports nothing heavy."""
    recover(folder)
    if not folder.is_dir():
        what = "is a file, not a state folder" if folder.exists() else "does not exist"
        return [
            Problem(f"the state {folder.name} {what}", where=f"--resume {folder}", remedy=_states_nearby(folder.parent))
        ]
    reason = _foreign_objection(folder) if is_foreign(folder) else _incompleteness(folder)
    return [_not_a_state(folder, reason)] if reason else []


def is_foreign(folder: Path) -> bool:
    """Whether ``folder`` is a state that another program has saved with Accelerate."""
    return (folder / _RANDOM).is_file() and not (folder / MANIFEST).exists()


def model_files(folder: Path) -> list[Path]:
    """The model files in a state of another program, in their order."""
    return next((found for names in _MODELS if (found := [folder / n for n in names if (folder / n).is_file()])), [])


def _foreign_objection(folder: Path) -> str | None:
    """Why nothing can be taken from a state of another program; None where something can."""
    return None if model_files(folder) else f"missing: {_MODELS[0][0]}"


def _incompleteness(folder: Path) -> str | None:
    """Why ``folder`` is no complete state, by names and sizes; None when it is one."""
    manifest = read_json(folder / MANIFEST)
    if not manifest:
        return f"it has no readable {MANIFEST}"
    files = _listed_files(manifest)
    missing = [name for name in _NEEDED if name not in files] or [
        name for name in files if not (folder / name).is_file()
    ]
    if missing:
        return f"missing: {', '.join(missing)}"
    wrong = [name for name, facts in files.items() if (folder / name).stat().st_size != facts.get("size")]
    return f"wrong size: {', '.join(wrong)}" if wrong else None


def files_of(folder: Path) -> list[str]:
    """Names of the files that the manifest in ``folder`` lists; none without a manifest."""
    return list(_listed_files(read_json(folder / MANIFEST)))


def _listed_files(manifest: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The manifest's files; names that lead out of the folder are no files of a state."""
    files = manifest.get("files")
    if manifest.get("format") != _FORMAT or not isinstance(files, dict):
        return {}
    return {name: facts for name, facts in files.items() if Path(name).name == name and isinstance(facts, dict)}


def _damage(folder: Path) -> list[Problem]:
    """Problems of a state by names, sizes and hashes."""
    reason = _incompleteness(folder)
    if reason:
        return [_not_a_state(folder, reason)]
    files = _listed_files(read_json(folder / MANIFEST))
    damaged = [name for name, facts in files.items() if sha256_of_file(folder / name) != facts.get("sha256")]
    return [_not_a_state(folder, f"damaged: {', '.join(damaged)}")] if damaged else []


def _not_a_state(folder: Path, reason: str) -> Problem:
    below = find_states(folder)
    return Problem(
        f"{folder.name or folder} is not a complete state ({reason})",
        where=f"--resume {folder}",
        remedy=_states_nearby(folder if below else folder.parent),
    )


def _states_nearby(folder: Path) -> str:
    states = find_states(folder)
    if not states:
        return "Give a folder that --save_state wrote; its name ends with -state."
    return "Complete states there: " + ", ".join(str(folder / state.name) for state in states) + "."


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty where there is none."""
    try:
        return read_table(path)
    except (OSError, DocumentError):
        return {}


def count_in(progress: Mapping[str, Any], name: str) -> int | None:
    """A count, such as that of finished steps, that the progress file of a state names; None where it names none."""
    count = progress.get(name)
    return count if isinstance(count, int) and count >= 0 else None


def read_state(folder: Path) -> TrainingState:
    """Read the state in ``folder`` to the CPU, after checking size and hash of every file.

    Raises:
        UserError: It is not a complete state; the message lists those nearby.
    """
    raise_if_any(check_state(folder))
    raise_if_any(_damage(folder))
    progress = read_json(folder / PROGRESS)
    step = count_in(progress, "current_step")
    if step is None:
        raise UserError.of([_not_a_state(folder, f"{PROGRESS} names no step")])
    scaler = folder / SCALER
    average = read_tensors(folder / EMA) if (folder / EMA).exists() else None
    return TrainingState(
        step=step,
        epoch=count_in(progress, "current_epoch") or 1,
        tensors=read_tensors(folder / MODEL).tensors,
        optimizer=read_pickle(folder / OPTIMIZER),
        scheduler=read_pickle(folder / SCHEDULER),
        scaler=read_pickle(scaler) if scaler.exists() else None,
        ema=average.tensors if average else None,
        ema_updates=int(average.metadata[_EMA_UPDATES]) if average else 0,
        losses=progress.get("losses", {}),
        log=progress.get("log", {}),
        curves=read_json(folder / CURVES),
        fingerprint=read_json(folder / FINGERPRINT),
    )


def read_pickle(path: Path) -> dict[str, Any]:
    """A stored ``state_dict``; anything beyond tensors and plain values is refused."""
    try:
        content = load_plain(path)
        if not isinstance(content, dict):
            raise pickle.UnpicklingError("it is no state_dict")
    except Exception as error:  # whatever the bytes make the reader stumble over
        raise UserError(
            f"{path.name} of the state cannot be read", where=str(path), remedy="Continue from another state."
        ) from error
    return content
