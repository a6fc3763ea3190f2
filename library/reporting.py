"""Gathers what the report of a run tells, and writes it at the end, however the run ends."""

import logging
import platform
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from library.data.setup import TrainingData
from library.data.spec import DataSpec, SubsetSpec
from library.errors import UserError
from library.inputs import Inputs
from library.messages import kept_messages
from library.option_fields import declarations
from library.options import SECRET_KEYS, flat_values
from library.runtime import Runtime
from library.start_screen import ScreenOptions
from library.training.charts import charts
from library.training.clock import iso_date, now
from library.training.environment import versions
from library.training.history import RunHistory
from library.training.previews import preview_place
from library.training.privacy import Scrubber, model_name, shareable, shown_path
from library.training.progress import RunLength
from library.training.report import (
    Failure,
    Message,
    Outcome,
    Report,
    Table,
    counted,
    preview_rows,
    report_path,
    write_report,
)
from library.training.speed import Speed, memory_figures

log = logging.getLogger(__name__)

_EXAMPLES: Final = 3
_LONGEST_VALUE: Final = 300

Results = Callable[[], Iterable[tuple[str, Path]]]
"""What was written, with what it is."""


class RunReport:
    """The context of a run that writes its report at the end, also when the run fails.

    Nothing is written for a mistake that is found before the first step: then there was no run.

    Args:
        options: The script's options.
        inputs: The checked inputs.
        data: The training set.
        runtime: Device, processes and seed; only the main process writes.
    """

    def __init__(self, options: ScreenOptions, inputs: Inputs, data: TrainingData, runtime: Runtime) -> None:
        self._options, self._inputs, self._data, self._runtime = options, inputs, data, runtime
        self._is_wanted = runtime.is_main and not options.logging.no_report
        self.history = RunHistory(inputs.prompts) if self._is_wanted else None
        self._started, self._clock = now(), time.monotonic()
        self._length: RunLength | None = None
        self._start_step = 0
        self._lacks_curves = False
        self._facts: tuple[tuple[str, str], ...] = ()
        self._speed: Speed | None = None
        self._results: Results = tuple

    def began(
        self,
        length: RunLength,
        *,
        start_step: int,
        speed: Speed,
        results: Results,
        facts: Sequence[tuple[str, str]] = (),
    ) -> None:
        """The run is about to take its first step.

        Args:
            length: Length of the run.
            start_step: Steps done by an earlier part of it.
            speed: How fast it is.
            results: What has been written when the report is made.
            facts: Further names and values for the head of the page.
        """
        self._length, self._start_step, self._speed, self._results = length, start_step, speed, results
        self._facts = tuple(facts)
        if start_step and self.history is not None:
            self._lacks_curves = not self.history.curves
            folder = self._options.save.output_dir
            assert folder is not None, "checked with the inputs"
            place = preview_place(folder, self._options.save.output_name)
            self.history.previews.add_files(*place, up_to=start_step)

    def __enter__(self) -> Self:
        """The report itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Write the report; what goes wrong with that is told and hides no error of the run."""
        is_no_run = self._length is None and (error is None or isinstance(error, UserError))
        folder = self._options.save.output_dir
        if self.history is None or is_no_run or folder is None:
            return
        path = report_path(folder, self._options.save.output_name)
        try:
            write_report(path, self._gathered(self.history, error))
            log.info("report: %s", shown_path(path))
        except Exception as failure:
            log.warning("the report could not be written: %s", failure)
            log.debug("report failed", exc_info=True)

    def _gathered(self, history: RunHistory, error: BaseException | None) -> Report:
        scrub = scrubber(self._options, self._inputs.spec)
        outcome = self._outcome(history, error)
        failure = _failure(error, scrub) if outcome == "failed" and error is not None else None
        return Report(
            title=self._options.save.output_name or "last",
            outcome=outcome,
            ending=self._ending(outcome, history),
            summary=tuple((name, scrub(value)) for name, value in self._summary(history)),
            failure=failure,
            charts=tuple(charts(history.curves)),
            previews=preview_rows(history.previews),
            data=_tables(self._inputs, self._data),
            captions=_captions(self._data, self._runtime.seed, self._length),
            options=_options(self._options, scrub),
            versions=_versions(),
            messages=counted(
                [Message(level=one.level, time=one.time, text=scrub(one.text)) for one in kept_messages()]
            ),
        )

    def _outcome(self, history: RunHistory, error: BaseException | None) -> Outcome:
        if error is not None:
            return "stopped" if isinstance(error, KeyboardInterrupt) else "failed"
        assert self._length is not None, "a run without an error has begun"
        return "finished" if history.step == self._length.total_steps else "stopped"

    def _ending(self, outcome: Outcome, history: RunHistory) -> str:
        total = f" of {self._length.total_steps:,}" if self._length is not None else ""
        done = f"{max(history.step, self._start_step):,}{total} steps"
        ending = {"finished": f"All {done} were done", "stopped": f"Stopped after {done}", "failed": f"After {done}"}
        took = _duration(time.monotonic() - self._clock)
        return f"{ending[outcome]}, in {took}; begun {iso_date(self._started).replace('T', ' ')}.{self._earlier()}"

    def _earlier(self) -> str:
        if not self._start_step:
            return ""
        unknown = ", whose curves are not known" if self._lacks_curves else ""
        return f" The first {self._start_step:,} steps belong to an earlier part of the run{unknown}."

    def _summary(self, history: RunHistory) -> Iterable[tuple[str, str]]:
        options, runtime = self._options, self._runtime
        yield "base model", model_name(options.model.pretrained_model_name_or_path or "")
        average = history.curves.get("loss/average")
        if average is not None and average.points:
            yield "average loss at the end", f"{average.points[-1][1]:.4g}"
        validation = history.curves.get("loss/validation/step_average")
        if validation is not None and validation.points:
            step, value = min(validation.points, key=lambda point: point[1])
            yield "lowest validation loss", f"{value:.4g} after step {step:,.0f}"
        if self._length is not None:
            yield "length", f"{self._length.total_steps:,} steps, {_count(self._length.epochs, 'epoch')}"
        yield "images in an epoch", f"{self._data.train_examples + self._data.reg_examples:,}"
        yield "batch", self._batch()
        if self._speed is not None and self._speed.images:
            yield "speed", f"{self._speed.images_per_second:.3g} images/s, {_duration(self._speed.seconds)} in steps"
        memory = memory_figures()
        yield "peak memory", ", ".join(f"{value:.2f} GB {_MEMORY[name]}" for name, value in memory.items())
        yield "device", _device(runtime)
        yield "seed", str(runtime.seed)
        yield from self._facts
        written = [path.name for what, path in self._results() if what in ("model", "state")]
        if written:
            yield "written", ", ".join(written)

    def _batch(self) -> str:
        sizes = ", ".join(str(size) for size in sorted({bucket.plan.batch_size for bucket in self._data.buckets}))
        accumulation = self._options.length.gradient_accumulation_steps
        more = f", {accumulation} accumulated" if accumulation > 1 else ""
        processes = f", {self._runtime.world} processes" if self._runtime.world > 1 else ""
        return f"{sizes}{more}{processes}"


_MEMORY: Final = {"memory/peak_ram_gb": "RAM", "memory/peak_gpu_gb": "GPU"}


def scrubber(options: ScreenOptions, spec: DataSpec) -> Scrubber:
    """Takes the paths and secrets of a run out of texts."""
    values = flat_values(options)
    paths: list[Path | str] = [value for value in values.values() if isinstance(value, Path)]
    paths += [str(subset.image_dir) for dataset in spec.datasets for subset in dataset.subsets]
    paths += [options.model.pretrained_model_name_or_path or "", options.model.vae or ""]
    return Scrubber([path for path in paths if str(path)], [str(values[key]) for key in SECRET_KEYS if values.get(key)])


def _failure(error: BaseException, scrub: Scrubber) -> Failure:
    if isinstance(error, UserError):
        return Failure(what=scrub(str(error)))
    return Failure(
        what=scrub(f"{type(error).__name__}: {error}"), trace=scrub("".join(traceback.format_exception(error)))
    )


def _options(options: object, scrub: Scrubber) -> tuple[tuple[str, str, str], ...]:
    values = shareable(flat_values(options))
    defaults = {name: one.default for name, one in declarations(type(options)).items()}
    given = flat_values(options)
    return tuple(
        (name, scrub(_shown(value)), _shown(defaults[name]))
        for name, value in values.items()
        if given[name] != defaults[name]
    )


def _shown(value: object) -> str:
    if value is None or value == ():
        return "–"
    if isinstance(value, bool):
        return "on" if value else "off"
    text = " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    return f"{text[:_LONGEST_VALUE]}…" if len(text) > _LONGEST_VALUE else text


def _versions() -> tuple[tuple[str, str], ...]:
    system = f"{platform.system()} {platform.machine()}"
    return (("Python", platform.python_version()), ("system", system), *versions().items())


def _device(runtime: Runtime) -> str:
    device = runtime.accelerator.device
    precision = runtime.accelerator.mixed_precision
    name = str(device)
    if device.type == "cuda":
        import torch

        name = torch.cuda.get_device_name(device)
    return f"{name}, {'fp32' if precision == 'no' else precision}"


def _tables(inputs: Inputs, data: TrainingData) -> tuple[Table, ...]:
    return (_folders(inputs, data), _buckets(data))


def _folders(inputs: Inputs, data: TrainingData) -> Table:
    several = len(inputs.spec.datasets) > 1
    rows = []
    for number, dataset in enumerate(inputs.spec.datasets):
        for position, subset in enumerate(dataset.subsets):
            own = [record for record in data.records if (record.dataset, record.subset) == (number, position)]
            captions = sum(record.has_caption_file for record in own)
            rows.append(
                (
                    *([str(number)] if several else []),
                    subset.name,
                    f"{len(own):,}",
                    str(subset.num_repeats),
                    f"{captions:,} of {len(own):,}",
                    "x".join(map(str, dataset.resolution)),
                    _remarks(subset),
                )
            )
    head = ("folder", "images", "repeats", "captions", "resolution", "remarks")
    shift = int(several)
    held_out = len(inputs.held_out.records) if inputs.held_out is not None else 0
    return Table(
        title="Folders" + (f" ({_count(held_out, 'image')} held out for validation)" if held_out else ""),
        head=(*(["data set"] if several else []), *head),
        rows=tuple(rows),
        number_columns=frozenset({1 + shift, 2 + shift, 3 + shift}),
    )


def _remarks(subset: SubsetSpec) -> str:
    augment, captions = subset.augment, subset.captions
    marks = {
        "regularisation": subset.is_reg,
        f"class tokens: {subset.class_tokens}": bool(subset.class_tokens),
        "mirrored": augment.flip_aug,
        "colour changed": augment.color_aug,
        "random crop": augment.random_crop,
        "tags shuffled": captions.shuffle_caption,
        "masked": subset.alpha_mask,
    }
    return ", ".join(mark for mark, holds in marks.items() if holds) or "–"


def _buckets(data: TrainingData) -> Table:
    rows = tuple(
        (
            f"{bucket.resolution[0]}x{bucket.resolution[1]}",
            f"{bucket.images:,}",
            f"{len(bucket.plan.examples):,}",
            str(bucket.plan.batch_size),
        )
        for bucket in data.buckets
    )
    head = ("bucket", "images", "in an epoch", "batch size")
    return Table(title="Buckets", head=head, rows=rows, number_columns=frozenset({1, 2, 3}))


def _captions(data: TrainingData, seed: int, length: RunLength | None) -> tuple[tuple[str, str], ...]:
    """File names and captions of the first, the middle and the last image that are trained on."""
    first: dict[int, int] = {}
    for example, number in enumerate(data.examples):
        if not data.records[number].is_reg:
            first.setdefault(number, example)
    numbers = list(first)
    spread = sorted({(len(numbers) - 1) * part // (_EXAMPLES - 1) for part in range(_EXAMPLES)}) if numbers else []
    steps = length.total_steps if length is not None else 1
    return tuple(
        (
            data.records[numbers[at]].path.name,
            data.caption(first[numbers[at]], seed=seed, epoch=1, step=0, total_steps=steps),
        )
        for at in spread
    )


def _duration(seconds: float) -> str:
    """As in "45 s", "12 min 5 s", "3 h 20 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}" + ("" if number == 1 else "s")
