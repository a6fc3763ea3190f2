"""Writes the manifest of a run beside its result, from the first step on, however the run ends."""

import logging
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from library.data.fingerprint import data_fingerprint
from library.data.setup import TrainingData
from library.disk_space import bytes_of
from library.files import write_json
from library.inputs import Inputs
from library.provenance import hub_models, told_dataset, told_inputs, told_options
from library.reporting import scrubber
from library.runtime import Runtime
from library.start_screen import ScreenOptions
from library.training.clock import iso_date, now
from library.training.environment import environment
from library.training.manifest import (
    FORMAT,
    manifest_path,
    part_before,
    parts_so_far,
    state_hash,
    tensor_hash,
)
from library.training.placeholders import Placeholders
from library.training.privacy import shown_path
from library.training.progress import Moment, RunLength
from library.training.prompt_files import as_table

log = logging.getLogger(__name__)


class RunManifest:
    """The context of a run that keeps its manifest; a mistake before the first step leaves none.

    What goes wrong with it is told, and ends no run.

    Args:
        options: The script's options.
        inputs: The checked inputs.
        data: The training set.
        runtime: Device, processes and seed; only the main process writes.
        script: Name of the script's file.
    """

    def __init__(
        self, options: ScreenOptions, inputs: Inputs, data: TrainingData, runtime: Runtime, *, script: str
    ) -> None:
        self._options, self._inputs, self._data, self._runtime = options, inputs, data, runtime
        self._script = script
        self._is_wanted = runtime.is_main and not options.logging.no_manifest
        self._began_at = now()
        self._content: dict[str, Any] | None = None

    @property
    def facts(self) -> tuple[tuple[str, str], ...]:
        """Its name, for the report; nothing where none is written."""
        return (("manifest", self._path.name),) if self._is_wanted else ()

    def began(self, length: RunLength, *, start_step: int) -> None:
        """The run is about to take its first step.

        Args:
            length: Length of the run.
            start_step: Steps done by an earlier part of it.
        """
        if self._is_wanted:
            self._guarded(lambda: self._gather(length, start_step))

    def __call__(self, moment: Moment) -> None:
        """Take note of a finished step."""
        if self._content is not None:
            self._content["steps"]["done"] = moment.step

    def model(self, path: Path, step: int, epoch: int) -> None:
        """Take note of a model that is complete under its name."""

        def note() -> dict[str, Any]:
            return {"step": step, "epoch": epoch, "bytes": bytes_of(path), "tensors": tensor_hash(path)}

        self._note("results", path, note)

    def state(self, path: Path, step: int, epoch: int) -> None:
        """Take note of a state that is complete under its name."""
        self._note("states", path, lambda: {"step": step, "epoch": epoch, "sha256": state_hash(path)})

    def __enter__(self) -> Self:
        """The manifest itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Write how the run ended."""
        if self._content is None:
            return
        steps = self._content["steps"]
        is_failure = error is not None and not isinstance(error, KeyboardInterrupt)
        is_whole = error is None and steps["done"] == steps["total"]
        outcome = "failed" if is_failure else "finished" if is_whole else "stopped"
        self._content |= {"outcome": outcome, "ended": iso_date(now())}
        self._guarded(self._write)
        if error is None:
            log.info("manifest: %s", shown_path(self._path))

    @property
    def _path(self) -> Path:
        folder = self._options.save.output_dir
        assert folder is not None, "checked with the inputs"
        return manifest_path(folder, self._options.save.output_name)

    def _gather(self, length: RunLength, start_step: int) -> None:
        options, inputs, runtime = self._options, self._inputs, self._runtime
        names, scrub = Placeholders(), scrubber(options, inputs.spec)
        told = told_options(options, names, scrub)
        file = options.source.dataset_config
        content: dict[str, Any] = {
            "format": FORMAT,
            "script": self._script,
            "options": told,
            "dataset": None if file is None else told_dataset(file, names, scrub),
            "prompts": [as_table(prompt) for prompt in inputs.prompts],
            "inputs": told_inputs(names, hub_models(told)),
            "data": data_fingerprint(inputs.spec, self._data.records, progress=True),
            "seed": runtime.seed,
            "processes": runtime.world,
            "precision": str(runtime.accelerator.mixed_precision),
            "device": runtime.device.type,
            "environment": environment(),
            "steps": {"done": start_step, "total": length.total_steps, "per_epoch": length.steps_per_epoch},
            "outcome": "running",
            "begun": iso_date(self._began_at),
            "ended": None,
            "parts": [],
            "results": {},
            "states": {},
        }
        if start_step:
            content |= self._continued(content, start_step)
        self._content = content
        self._write()

    def _continued(self, content: dict[str, Any], start_step: int) -> dict[str, Any]:
        """What a run that goes on takes over from the part before it."""
        state = self._inputs.state
        assert state is not None, "steps were done before"
        before = part_before(state, own=self._path, seed=self._runtime.seed)
        if before is None:
            return {"parts": [_UNKNOWN | {"steps": [0, start_step]}]}
        return {
            "parts": parts_so_far(before, content, start_step),
            "results": {name: one for name, one in before["results"].items() if one["step"] <= start_step},
            "states": {name: one for name, one in before["states"].items() if one["step"] <= start_step},
        }

    def _note(self, kind: str, path: Path, facts: Callable[[], dict[str, Any]]) -> None:
        if self._content is None:
            return
        content = self._content

        def note() -> None:
            content[kind][_name_below(path, self._path.parent)] = facts()
            self._write()

        self._guarded(note)

    def _write(self) -> None:
        write_json(self._path, self._content)

    def _guarded(self, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as failure:
            log.warning("the manifest could not be written: %s", failure)
            log.debug("manifest failed", exc_info=True)


_UNKNOWN: Final[dict[str, Any]] = {"outcome": "unknown"}


def _name_below(path: Path, folder: Path) -> str:
    return path.relative_to(folder).as_posix() if path.is_relative_to(folder) else path.name
