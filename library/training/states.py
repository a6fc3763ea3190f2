"""State folders: what a run needs to continue exactly, written whole or not at all.

A state holds tensors, optimizer, schedule, scaler and the step; the random numbers of a run are addressed, so none are
kept. Its manifest, written last, lists size and hash of every file; a folder without a valid one is never read.
"""

import json
import os
import pickle
import shutil
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from library.disk_space import room_for
from library.errors import Problem, UserError, raise_if_any
from library.files import read_tensors, sha256_of_file, sync_folder, write_json, write_tensors, written_whole
from library.training.privacy import shareable
from library.training.schedule_classes import restore_schedule, use_rates

if TYPE_CHECKING:
    from torch import Tensor

MANIFEST: Final = "manifest.json"
MODEL: Final = "model.safetensors"
OPTIMIZER: Final = "optimizer.bin"
SCHEDULER: Final = "scheduler.bin"
SCALER: Final = "scaler.pt"
EMA: Final = "ema.safetensors"
PROGRESS: Final = "train_state.json"
FINGERPRINT: Final = "fingerprint.json"

_FORMAT: Final = 1
_EMA_UPDATES: Final = "updates"
_NEEDED: Final = (MODEL, OPTIMIZER, SCHEDULER, PROGRESS, FINGERPRINT)
_WRITING: Final = ".writing-"
_REPLACED: Final = ".replaced-"
# What neither data nor mathematics of a run depend on, and every run may change. A cache holds what would be encoded.
_FREE_OPTIONS: Final = (
    "async_", "cache_latents", "console_", "ema_device", "ema_previews", "ema_save", "huggingface_", "initial_",
    "log_", "logging_dir", "max_data_loader_n_workers", "max_validation_steps", "metadata_", "no_metadata", "no_report",
    "on_nonfinite", "output_", "persistent_", "resume", "sample_", "save_", "skip_cache_check",
    "skip_until_initial_step", "tokenizer_cache_dir", "training_comment", "use_safetensors", "vae_batch_size",
    "validate_", "wandb_",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingState:
    """A run between two optimizer steps.

    Attributes:
        step: Number of finished optimizer steps.
        epoch: The epoch, from 1, of the last finished step.
        tensors: What training changes, by name.
        optimizer: ``state_dict`` of the optimizer.
        scheduler: ``state_dict`` of the learning-rate schedule.
        scaler: ``state_dict`` of the gradient scaler, if there is one.
        ema: Average of the trained weights by name, if one is kept.
        ema_updates: Optimizer steps that the average has taken in.
        fingerprint: What the run was made of, see :func:`fingerprint`.
    """

    step: int
    epoch: int
    tensors: "Mapping[str, Tensor]"
    optimizer: Mapping[str, Any]
    scheduler: Mapping[str, Any]
    scaler: Mapping[str, Any] | None = None
    ema: "Mapping[str, Tensor] | None" = None
    ema_updates: int = 0
    fingerprint: Mapping[str, Any] = field(default_factory=dict)


def fingerprint(options: Mapping[str, object], data: str) -> dict[str, object]:
    """What a run is made of, without secrets and paths: its option values, and ``data``, a digest of its data set."""
    return {"options": json.loads(json.dumps(shareable(options), default=str)), "data": data}


def fingerprint_differences(saved: Mapping[str, Any], current: Mapping[str, Any]) -> tuple[str, ...]:
    """What of a run changed since a state was saved, one line each; saving, previews and logs may change freely."""
    before, now = saved.get("options", {}), current.get("options", {})
    changed = [
        f"{name}: {before.get(name)!r} -> {now.get(name)!r}"
        for name in sorted({*before, *now})
        if before.get(name) != now.get(name) and not name.startswith(_FREE_OPTIONS)
    ]
    if saved.get("data") != current.get("data"):
        changed.append("the images or captions")
    return tuple(changed)


def write_state(folder: Path, state: TrainingState) -> None:
    """Write ``state`` to ``folder``, whole or not at all; a state of that name stays until the new one is complete.

    Raises:
        CannotWriteError: The folder cannot be written to; a former state is kept.
        UserError: A tensor is not finite.
    """
    temporary = folder.with_name(f"{_WRITING}{uuid.uuid4().hex[:8]}-{folder.name}")
    with room_for(folder, size_of(state)):
        try:
            _recover(folder)
            for leftover in folder.parent.glob(f"{_WRITING}*-{folder.name}"):
                shutil.rmtree(leftover, ignore_errors=True)
            temporary.mkdir(parents=True)
            _write_contents(temporary, state)
            reason = _incompleteness(temporary)
            raise_if_any([_not_a_state(temporary, reason)] if reason else [])
            _put_in_place(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


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
    write_tensors(folder / MODEL, state.tensors)
    _write_pickle(folder / OPTIMIZER, state.optimizer)
    _write_pickle(folder / SCHEDULER, state.scheduler)
    if state.scaler is not None:
        _write_pickle(folder / SCALER, state.scaler)
    if state.ema is not None:
        write_tensors(folder / EMA, state.ema, metadata={_EMA_UPDATES: str(state.ema_updates)})
    write_json(folder / PROGRESS, {"current_epoch": state.epoch, "current_step": state.step})
    write_json(folder / FINGERPRINT, state.fingerprint)
    files = {
        path.name: {"size": path.stat().st_size, "sha256": sha256_of_file(path)} for path in sorted(folder.iterdir())
    }
    write_json(folder / MANIFEST, {"format": _FORMAT, "files": files})


def _write_pickle(path: Path, content: Mapping[str, Any]) -> None:
    import torch

    size = sum(tensor.numel() * tensor.itemsize for tensor in _tensors_in(content))
    # Given a name, the library would not say what the system says.
    with written_whole(path, size=size) as temporary, temporary.open("wb") as file:
        torch.save(dict(content), file)


def _put_in_place(temporary: Path, folder: Path) -> None:
    """Give the complete ``temporary`` its final name; what had it goes afterwards."""
    replaced = folder.with_name(_REPLACED + folder.name)
    if folder.exists():
        os.replace(folder, replaced)
    os.replace(temporary, folder)
    sync_folder(folder.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _recover(folder: Path) -> None:
    """Undo a replacement that was cut off between its two renames; finish one that was cut off after them."""
    replaced = folder.with_name(_REPLACED + folder.name)
    if replaced.is_dir() and not folder.exists():
        os.replace(replaced, folder)
    shutil.rmtree(replaced, ignore_errors=True)


def find_states(folder: Path) -> list[Path]:
    """The states directly below ``folder`` whose files are all there, in the order of their steps."""
    if not folder.is_dir():
        return []
    found = [
        path
        for path in sorted(folder.iterdir())
        if path.is_dir() and not path.name.startswith((_WRITING, _REPLACED)) and not _incompleteness(path)
    ]
    return sorted(found, key=lambda path: _read_json(path / PROGRESS).get("current_step", 0))


def check_state(folder: Path) -> list[Problem]:
    """What stands against continuing from ``folder``, by names and sizes; quick, and imports nothing heavy."""
    _recover(folder)
    if not folder.is_dir():
        what = "is a file, not a state folder" if folder.exists() else "does not exist"
        return [
            Problem(f"the state {folder.name} {what}", where=f"--resume {folder}", remedy=_states_nearby(folder.parent))
        ]
    reason = _incompleteness(folder)
    return [_not_a_state(folder, reason)] if reason else []


def _incompleteness(folder: Path) -> str | None:
    """Why ``folder`` is no complete state, by names and sizes; None when it is one."""
    manifest = _read_json(folder / MANIFEST)
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
    return list(_listed_files(_read_json(folder / MANIFEST)))


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
    files = _listed_files(_read_json(folder / MANIFEST))
    damaged = [name for name, facts in files.items() if sha256_of_file(folder / name) != facts.get("sha256")]
    return [_not_a_state(folder, f"damaged: {', '.join(damaged)}")] if damaged else []


def _not_a_state(folder: Path, reason: str) -> Problem:
    if (folder / "random_states_0.pkl").exists():
        reason += "; it seems to be a state of another program, which does not say where in the data it stopped"
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


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty where there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def read_state(folder: Path) -> TrainingState:
    """Read the state in ``folder`` to the CPU, after checking size and hash of every file.

    Raises:
        UserError: It is not a complete state; the message lists those nearby.
    """
    raise_if_any(check_state(folder))
    raise_if_any(_damage(folder))
    progress = _read_json(folder / PROGRESS)
    scaler = folder / SCALER
    average = read_tensors(folder / EMA) if (folder / EMA).exists() else None
    return TrainingState(
        step=int(progress["current_step"]),
        epoch=int(progress["current_epoch"]),
        tensors=read_tensors(folder / MODEL).tensors,
        optimizer=_read_pickle(folder / OPTIMIZER),
        scheduler=_read_pickle(folder / SCHEDULER),
        scaler=_read_pickle(scaler) if scaler.exists() else None,
        ema=average.tensors if average else None,
        ema_updates=int(average.metadata[_EMA_UPDATES]) if average else 0,
        fingerprint=_read_json(folder / FINGERPRINT),
    )


def _read_pickle(path: Path) -> dict[str, Any]:
    """A stored ``state_dict``; anything beyond tensors and plain values is refused."""
    import torch

    try:
        content = torch.load(str(path), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise UserError(
            f"{path.name} of the state cannot be read", where=str(path), remedy="Continue from another state."
        ) from error
    assert isinstance(content, dict), "a state_dict is a dictionary"
    return content


def restore(state: TrainingState, *, optimizer: Any, scheduler: Any, scaler: Any = None) -> None:
    """Put optimizer, schedule and scaler where ``state`` left them; its tensors are the method's to load.

    The learning rates are those of this run, at the step of the state: a changed one holds from here on.

    Raises:
        UserError: The state belongs to a run with other parameters.
    """
    rates = list(scheduler.base_lrs)
    fresh = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
    raise_if_any(_other_optimizer(optimizer, state.optimizer))
    try:
        optimizer.load_state_dict(dict(state.optimizer))
        _keep_dtypes(optimizer, state.optimizer)
        restore_schedule(optimizer, scheduler, state.scheduler, fresh)
        if scaler is not None and state.scaler is not None:
            scaler.load_state_dict(dict(state.scaler))
    except (ValueError, KeyError, RuntimeError) as error:
        raise UserError(
            f"the state does not fit this run: {error}",
            where="--resume",
            remedy="Continue with the network, the optimizer and the trained parts the state was saved with.",
        ) from error
    use_rates(optimizer, scheduler, rates)


def _other_optimizer(optimizer: Any, saved: Mapping[str, Any]) -> list[Problem]:
    """The settings of an optimizer are in its groups; one of another kind lacks some."""
    names = set().union(*saved.get("param_groups", [{}]))
    settings = set(optimizer.defaults).intersection(*optimizer.param_groups)
    missing = sorted(settings - names - {"lr"})
    if not missing:
        return []
    return [
        Problem(
            f"the state is one of another optimizer: it lacks {', '.join(missing)}",
            where="--resume, --optimizer_type",
            remedy="Continue with the optimizer that the state was saved with.",
        )
    ]


def _keep_dtypes(optimizer: Any, saved: Mapping[str, Any]) -> None:
    """Give state tensors the dtype they were saved in: torch casts them to that of their parameter while loading."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for number, entries in saved["state"].items():
        state = optimizer.state.get(parameters[number], {})
        for name, value in entries.items():
            present = state.get(name)
            if hasattr(value, "dtype") and hasattr(present, "dtype") and present.dtype != value.dtype:
                state[name] = value.to(present.device)
