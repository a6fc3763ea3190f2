"""States that other programs have saved with Accelerate: taken over as far as their contents go."""

import logging
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from library.errors import UserError
from library.files import read_tensors
from library.training.states import (
    OPTIMIZER,
    PROGRESS,
    SCALER,
    SCHEDULER,
    TrainingState,
    count_in,
    model_files,
    read_json,
    read_pickle,
)

if TYPE_CHECKING:
    from torch import Tensor, nn

log = logging.getLogger(__name__)

_PARTS: Final = ("unet", "text_encoder")
"""What the files hold where the model itself is trained, in that order."""
_ROWS: Final = "weight"
_EMBEDDING: Final = "embeddings.token_embedding.weight"


def read_foreign(folder: Path, trained: "nn.Module", optimizer: Any, *, asked: int | None = None) -> TrainingState:
    """What the state of another program has of ``trained`` and its ``optimizer``; tells what it lacks.

    Its random numbers are not taken over: here they follow from the seed. Nothing vouches for its files being whole.

    Args:
        folder: The state.
        trained: What is trained.
        optimizer: Its optimizer.
        asked: The step to go on from; as the state says when absent.

    Raises:
        UserError: It is one of other weights, or does not say where it stopped.
    """
    moments = _optimizer(folder, optimizer)
    progress = read_json(folder / PROGRESS)
    step = told = count_in(progress, "current_step") if asked is None else asked
    if step is None:
        step = _steps_of(folder, read_pickle(folder / SCHEDULER) if (folder / SCHEDULER).is_file() else {})
    if step is None:
        raise UserError(
            "the state of another program does not say at which step it was saved",
            where=f"--resume {folder}",
            remedy="Add --initial_step with the number of steps that were done.",
        )
    if told is None:
        log.warning("the state does not say at which step it was saved: by its learning rates, after %s", step)
    log.warning(
        "%s is a state of another program: its weights%s are taken over; the order of images and all random numbers "
        "are those of this program, and the mean loss begins anew",
        folder.name,
        "" if moments is None else " and the optimizer's moments",
    )
    return TrainingState(
        step=step,
        epoch=count_in(progress, "current_epoch") or 1,
        tensors=_tensors(folder, trained),
        optimizer=moments,
        scheduler=None,
        scaler=read_pickle(folder / SCALER) if (folder / SCALER).is_file() else None,
    )


def _tensors(folder: Path, trained: "nn.Module") -> "dict[str, Tensor]":
    """The tensors of the files by the names that they have in ``trained``."""
    files = [read_tensors(path).tensors for path in model_files(folder)]
    own = trained.state_dict()
    if set(own) == {_ROWS} and own[_ROWS].dim() == 2:
        return {_ROWS: _last_rows(files[0], own[_ROWS])}
    if any(name.startswith(f"{part}.") for name in own for part in _PARTS):
        by_part = dict(zip(_PARTS, files, strict=False))
        return {f"{part}.{name}": tensor for part, file in by_part.items() for name, tensor in _flat(file)}
    return files[0]


def _flat(tensors: "Mapping[str, Tensor]") -> "Iterator[tuple[str, Tensor]]":
    """Names of today's text encoder, which has no "text_model" and computes the numbers of its positions."""
    for name, tensor in tensors.items():
        short = name.removeprefix("text_model.")
        if not short.endswith("position_ids"):
            yield short, tensor


def _last_rows(tensors: "Mapping[str, Tensor]", own: "Tensor") -> "Tensor":
    """The rows of new words: they stand behind all others in the table of the whole text encoder."""
    tables = [tensor for name, tensor in tensors.items() if re.search(f"(^|[.]){re.escape(_EMBEDDING)}$", name)]
    return tables[0][-len(own) :] if tables else own.new_empty(0)


def _optimizer(folder: Path, optimizer: Any) -> dict[str, Any] | None:
    """The saved optimizer where its numbered entries have the shapes of this one's weights; None, and told, otherwise.

    Weights have no names there. Programs that take the parts of a model in another order are told by the shapes.
    """
    if not (folder / OPTIMIZER).is_file():
        log.warning("the state holds no optimizer: its moments begin anew")
        return None
    found = read_pickle(folder / OPTIMIZER)
    if not _is_whole(found):
        log.warning("the state's optimizer does not say which weights it holds: its moments begin anew")
        return None
    own = [tuple(parameter.shape) for group in optimizer.param_groups for parameter in group["params"]]
    saved = [_shape_of(found["state"].get(number, {})) for group in found["param_groups"] for number in group["params"]]
    fits = len(own) == len(saved) and all(one in (None, other) for one, other in zip(saved, own, strict=True))
    sizes = [len(group["params"]) for group in found["param_groups"]]
    if not fits or sizes != [len(group["params"]) for group in optimizer.param_groups]:
        log.warning("the state's optimizer holds other weights, or in another order: its moments begin anew")
        return None
    return found


def _is_whole(found: Mapping[str, Any]) -> bool:
    """Whether what was read is the state of an optimizer, with its groups and the entries of their weights."""
    entries, groups = found.get("state"), found.get("param_groups")
    return (
        isinstance(entries, dict)
        and isinstance(groups, list)
        and all(isinstance(one, dict) for one in (*entries.values(), *groups))
        and all(isinstance(group.get("params"), list) for group in groups)
    )


def _shape_of(entries: Mapping[str, Any]) -> tuple[int, ...] | None:
    """The shape of a weight's moments; None where it has none."""
    return next((tuple(value.shape) for value in entries.values() if getattr(value, "ndim", 0) > 0), None)


def _steps_of(folder: Path, scheduler: Mapping[str, Any]) -> int | None:
    """Optimizer steps, as the learning rates count them, or Adam and its relatives; None where neither does."""
    if isinstance(scheduler.get("last_epoch"), int):
        return int(scheduler["last_epoch"])
    found = read_pickle(folder / OPTIMIZER) if (folder / OPTIMIZER).is_file() else {}
    states = found["state"].values() if _is_whole(found) else ()
    return max((int(entries["step"]) for entries in states if "step" in entries), default=None)
