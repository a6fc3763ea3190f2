"""What a run will write and when, told before it begins: models, states, previews, and the disk they need."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from library.disk_space import free_bytes, shown_size
from library.training.naming import OutputNames, SavePlan, SavePoint
from library.training.options import EmaOptions, PreviewOptions, SaveOptions
from library.training.privacy import shown_path
from library.training.progress import Moment, RunLength
from library.training.prompt_files import PreviewPrompt

_MOST_NAMED: Final = 4
_BYTES_OF: Final = {None: 4, "float": 4, "fp16": 2, "bf16": 2}
# A state keeps the weights, and of Adam, whose states are the largest, two averages of each; with --ema, one more.
_VALUES_IN_STATE: Final = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveForecast:
    """What is saved in a run.

    Attributes:
        points: Every occasion, in order.
        kept: Those whose files are there at the end.
        most: The most files that are there at a time.
    """

    points: tuple[SavePoint, ...] = ()
    kept: tuple[SavePoint, ...] = ()
    most: int = 0


def forecast(plan: SavePlan, length: RunLength, *, start_step: int = 0) -> SaveForecast:
    """The occasions on which ``plan`` saves in the steps behind ``start_step``, and which files it leaves."""
    # A long run has millions of steps and epochs in which nothing is due.
    steps = {length.total_steps}
    for every in (plan.every_steps, (plan.every_epochs or 0) * length.steps_per_epoch):
        if every:
            steps |= set(range(every, length.total_steps + 1, every))
    points: list[SavePoint] = []
    kept: dict[SavePoint, None] = {}
    most = 0
    for step in sorted(step for step in steps if step > start_step):
        for point in plan.due(_moment(step, length)):
            points.append(point)
            kept[point] = None
            # A file is removed only after the one that replaces it is safe.
            most = max(most, len(kept))
            outdated = plan.outdated(point)
            if outdated is not None:
                kept.pop(outdated, None)
    return SaveForecast(points=tuple(points), kept=tuple(kept), most=most)


def _moment(step: int, length: RunLength) -> Moment:
    return Moment(
        step=step,
        epoch=length.epoch_of(step - 1),
        epoch_ended=step % length.steps_per_epoch == 0,
        finished=step == length.total_steps,
        loss=0.0,
        average_loss=0.0,
        learning_rates={},
    )


def saving_lines(
    options: SaveOptions,
    names: OutputNames,
    length: RunLength,
    *,
    start_step: int = 0,
    trained_values: int | None = None,
    saved_values: int | None = None,
    ema: EmaOptions | None = None,
    keeps_best: bool = False,
) -> list[str]:
    """What is saved when, and the disk it needs.

    Args:
        options: When to save.
        names: Names of the files.
        length: Length of the run.
        start_step: Steps already done.
        trained_values: Number of trained weights, where it is known: it decides the size of the files.
        saved_values: Number of weights in a saved model, where it is another.
        ema: Whether the average of the weights is saved, too, or instead.
        keeps_best: The best model stays, however old.
    """
    ema = ema or EmaOptions()
    models = forecast(SavePlan.for_models(options, length.epochs), length, start_step=start_step)
    states = _state_forecast(options, length, start_step)
    lines = [f"saving in {shown_path(names.folder)}:"]
    if "model" in ema.saved:
        lines.append(_files_line("models", models, names.model))
    if "ema" in ema.saved:
        lines.append(_files_line("averages", models, names.of_average().model))
    if states.points:
        lines.append(_files_line("states", states, names.state))
    best = int(keeps_best and len(models.kept) < len(models.points))
    disk = _Disk(
        models=models.most * len(ema.saved) + best,
        states=states.most,
        model=None if trained_values is None else (saved_values or trained_values) * _BYTES_OF[options.save_precision],
        state=None if trained_values is None else trained_values * 4 * (_VALUES_IN_STATE + ema.ema),
    )
    return [*lines, disk.line(names.folder)]


def _state_forecast(options: SaveOptions, length: RunLength, start_step: int) -> SaveForecast:
    if options.save_state:
        return forecast(SavePlan.for_states(options, length.epochs), length, start_step=start_step)
    return forecast(SavePlan(), length, start_step=start_step) if options.save_state_on_train_end else SaveForecast()


def _files_line(kind: str, saves: SaveForecast, path_of: Callable[[SavePoint], Path]) -> str:
    names = [path_of(point).name for point in saves.points]
    shown = names if len(names) <= _MOST_NAMED else [*names[: _MOST_NAMED - 1], "…", names[-1]]
    removed = len(saves.points) - len(saves.kept)
    kept = f", {len(saves.kept)} stay" if removed else ""
    return f"  {kind}: {', '.join(shown)} ({len(names)} saved{kept})"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Disk:
    """The most models and states that are there at a time, and the bytes of each, where they are known."""

    models: int
    states: int
    model: int | None
    state: int | None

    def line(self, folder: Path) -> str:
        free = free_bytes(folder)
        room = "free space unknown" if free is None else f"{shown_size(free)} free"
        models, states = _counted(self.models, "model"), _counted(self.states, "state")
        if self.model is None or self.state is None:
            return f"  disk: {models} and {states} at most, of unknown size; {room}"
        need = self.models * self.model + self.states * self.state
        parts = f"{models} of {shown_size(self.model)}"
        if self.states:
            parts += f", {states} of up to {shown_size(self.state)}"
        return f"  disk: about {shown_size(need)} at most ({parts}); {room}"


def preview_lines(
    options: PreviewOptions, prompts: Sequence[PreviewPrompt], length: RunLength, *, start_step: int = 0
) -> list[str]:
    """When previews are made, with which samplers, and how many; nothing where none are."""
    if not prompts:
        return []
    settled = options.settled()
    times, occasions = 0, []
    if settled.sample_at_first and not start_step:
        occasions.append("before training")
        times += 1
    every, steps = settled.sample_every_n_epochs, settled.sample_every_n_steps
    if every:
        occasions.append(f"after every {_ordinal(every)}epoch")
        done = start_step // length.steps_per_epoch
        times += length.total_steps // length.steps_per_epoch // every - done // every
    elif steps:
        occasions.append(f"after every {_ordinal(steps)}step")
        times += length.total_steps // steps - start_step // steps
    when = " and ".join(occasions) or "never"
    samplers = ", ".join(dict.fromkeys(prompt.sampler for prompt in prompts))
    prompted, timed = _counted(len(prompts), "prompt"), _counted(times, "time")
    return [f"previews of {prompted} ({samplers}) {when}: {timed}, {_counted(times * len(prompts), 'image')}"]


def _counted(number: int, what: str) -> str:
    return f"{number} {what}" + ("" if number == 1 else "s")


def _ordinal(number: int) -> str:
    if number == 1:
        return ""
    ending = "th" if number % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{ending} "
