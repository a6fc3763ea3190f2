"""What follows a training step: average, log, validation, models, states and previews, as the options ask for them."""

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from library.files import sweep
from library.inputs import Inputs
from library.manifest import RunManifest
from library.options import flat_values
from library.resuming import Progress
from library.start_screen import ScreenOptions
from library.task import DenoisingTask, evaluating
from library.training.best import BestModel
from library.training.ema import WeightAverage
from library.training.history import RunHistory
from library.training.hub import uploads_to_hub
from library.training.method import Hook, TrainingMethod
from library.training.naming import END, OutputNames, SavePlan, SavePoint
from library.training.optimizers import ResultWeights
from library.training.previews import Previews, preview_place
from library.training.privacy import shown_path
from library.training.progress import RunLength
from library.training.prompt_files import PreviewPrompt
from library.training.rescue import Rescue
from library.training.saving import ModelSaver, StateSaver
from library.training.speed import Speed
from library.training.tracking import Tracker
from library.validation import ValidationHook, Validator

if TYPE_CHECKING:
    from PIL.Image import Image

    from library.training.progress import Moment

log = logging.getLogger(__name__)

Describe = Callable[[int, int], dict[str, str]]
"""Finished steps and epochs -> metadata of a file saved then."""


class Hooks:
    """What happens after a step, in order: average, log, validation, models, state, previews.

    Args:
        options: The script's options.
        inputs: The checked inputs.
        method: What is trained.
        task: Its previews.
        length: Length of the run.
        progress: What states keep.
        describe: Gives the metadata of results.
        suffix: Suffix of results.
        tracker_name: Name of the log where the options give none.
        images_of: Number of images of a step, from 0, over all processes.
        start_step: Steps that an earlier part of the run has done.
        history: Takes in all that is logged, for the report.
        manifest: Takes note of what is saved.
        average: The average of the weights, if one is kept.
        validator: Measures held-out images, if there are any.
        result_weights: Puts those weights in place that the optimizer means as its result.
    """

    def __init__(
        self,
        options: ScreenOptions,
        inputs: Inputs,
        method: TrainingMethod,
        task: DenoisingTask,
        length: RunLength,
        progress: Progress,
        describe: Describe,
        *,
        suffix: str,
        tracker_name: str,
        images_of: Callable[[int], int],
        start_step: int = 0,
        history: RunHistory | None = None,
        manifest: RunManifest | None = None,
        average: WeightAverage | None = None,
        validator: Validator | None = None,
        result_weights: ResultWeights = nullcontext,
    ) -> None:
        self._options, self._method, self._runtime = options, method, task.runtime
        self._length, self._start_step = length, start_step
        self._average, self._result_weights, self._manifest = average, result_weights, manifest
        saving = options.save
        assert saving.output_dir is not None, "checked with the inputs"
        names = OutputNames(folder=saving.output_dir, name=saving.output_name, suffix=suffix)
        plan = SavePlan.for_models(saving, length.epochs)
        best = BestModel(names.folder, names.name, continued=start_step > 0) if validator is not None else None
        self.rescue = Rescue()
        self.speed = Speed(images_of)
        self.tracker = self._tracker(tracker_name, history, progress.log)
        progress.log = self.tracker.place
        self.validation = (
            self._validation(validator, plan, best) if validator is not None and best is not None else None
        )
        if self._runtime.is_main:
            _sweep(names)
        self.uploads = uploads_to_hub(options.hub, is_main=self._runtime.is_main)
        self.models = self._model_savers(plan, names, best, describe)
        self.states = self._state_saver(names, progress)
        self.previews = self._previews(task, inputs.prompts, names)

    def _tracker(self, name: str, history: RunHistory | None, former: Mapping[str, str]) -> Tracker:
        return Tracker(
            self._options.logging,
            tracker_name=name,
            config=flat_values(self._options),
            is_main=self._runtime.is_main,
            more=[] if history is None else [history],
            speed=self.speed,
            former=former,
            continued_at=self._start_step,
        )

    def _validation(self, validator: Validator, plan: SavePlan, best: BestModel) -> ValidationHook:
        return ValidationHook(
            self._options.validation,
            plan,
            lambda: validator.measure(self._method.module),
            average=self._average,
            tracker=self.tracker,
            best=best,
            result_weights=self._result_weights,
        )

    def _model_savers(
        self, plan: SavePlan, names: OutputNames, best: BestModel | None, describe: Describe
    ) -> list[ModelSaver]:
        return [
            ModelSaver(
                plan,
                names if weights == "model" else names.of_average(),
                _save(self._method, describe, self._average if weights == "ema" else None, self._result_weights),
                is_main=self._runtime.is_main,
                best=best,
                weights=weights,
                uploads=self.uploads,
                saved=None if self._manifest is None else self._manifest.model,
                keep=self.rescue.keep,
            )
            for weights in self._options.ema.saved
        ]

    def _state_saver(self, names: OutputNames, progress: Progress) -> StateSaver:
        saving = self._options.save
        return StateSaver(
            SavePlan.for_states(saving, self._length.epochs),
            names,
            progress.capture,
            saving,
            before=self.tracker.flush,
            is_main=self._runtime.is_main,
            uploads=self.uploads if self._options.hub.save_state_to_huggingface else None,
            saved=None if self._manifest is None else self._manifest.state,
            keep=self.rescue.keep,
        )

    def _previews(self, task: DenoisingTask, prompts: Sequence[PreviewPrompt], names: OutputNames) -> Previews:
        average = self._average if self._options.ema.ema_previews else None
        shown = average.applied if average is not None else self._result_weights

        def generate(prompt: PreviewPrompt) -> "Image":
            with shown(), evaluating(self._method.module):
                return task.generate(prompt)

        return Previews(
            self._options.preview,
            prompts,
            generate,
            output_dir=names.folder,
            output_name=names.name,
            seed=self._runtime.seed,
            is_main=self._runtime.is_main,
            show=self.tracker.add_image,
            continued_at=self._start_step,
        )

    @property
    def in_order(self) -> list[Hook]:
        """The hooks as the loop calls them."""
        averages: list[Hook] = [self._average] if self._average is not None else []
        validations: list[Hook] = [self.validation] if self.validation is not None else []
        manifests: list[Hook] = [self._manifest] if self._manifest is not None else []
        # A state says that everything before it is done, so it comes last.
        saving: list[Hook] = [*self.models, self.previews, self._save_if_asked, self.states]
        return [*manifests, *averages, self.tracker, *validations, *saving, self.speed.start]

    def save_now(self, step: int, *, last: bool) -> None:
        """Save model and state after ``step`` steps, whatever the options say; ``last`` says that the run ends then."""
        for save in self._saves(step, last=last):
            save()

    def save_after_failure(self, step: int) -> None:
        """Save model and state after ``step`` steps, where an error ends the run, which is not hidden by another."""
        for save in self._saves(step, last=True):
            try:
                save()
            except Exception as error:
                log.error("%s", error)
                log.debug("saving failed", exc_info=True)
        if self.states.last_saved is not None:
            log.warning("to continue when the cause is mended: --resume %s", shown_path(self.states.last_saved))

    def _saves(self, step: int, *, last: bool) -> list[Callable[[], None]]:
        point, length = SavePoint(kind="step", number=step), self._length
        finished, begun = step // length.steps_per_epoch, length.epoch_of(step - 1)
        return [
            *(partial(saver.save, point, step=step, epoch=finished, last=last) for saver in self.models),
            partial(self.states.save, point, step=step, epoch=begun, last=last),
        ]

    def save_what_is_missing(self) -> None:
        """Save what a run that has made its last step was killed before it could save."""
        step, epochs = self._length.total_steps, self._length.epochs
        savers: list[ModelSaver | StateSaver] = [*self.models, self.states]
        for saver in savers:
            if not saver.has_ended:
                saver.save(END, step=step, epoch=epochs)
        self.rescue.settle()

    def _save_if_asked(self, moment: "Moment") -> None:
        if moment.save_requested and not moment.interrupted:
            self.save_now(moment.step, last=False)

    @property
    def written(self) -> list[tuple[str, Path]]:
        """The latest results, with what they are."""
        found = (
            *(("model", saver.last_saved) for saver in self.models),
            ("state", self.states.last_saved),
            ("previews", self.previews.written[-1].parent if self.previews.written else None),
            ("log", self.tracker.folder),
        )
        return [(what, path) for what, path in found if path is not None]

    def say_what_was_written(self) -> None:
        """Name the results."""
        for what, path in self.written:
            log.info("%s: %s", what, path)


def _sweep(names: OutputNames) -> None:
    """Mend what a killed run of the same name left in the output folder."""
    sweep(names.folder, names.owns)
    previews, prefix = preview_place(names.folder, names.name)
    sweep(previews, lambda name: name.startswith(prefix) and name.endswith(".png"))


def _save(
    method: TrainingMethod, describe: Describe, average: WeightAverage | None, result_weights: ResultWeights
) -> Callable[[Path, int, int], None]:
    """Writes the weights, or their average where it is given."""

    def save(path: Path, step: int, epoch: int) -> None:
        metadata = describe(step, epoch)
        if average is not None and "ss_steps" in metadata:
            metadata = {**metadata, "ss_ema_decay": str(average.decay)}
        with average.applied() if average is not None else result_weights():
            method.save(path, metadata, step=step, epoch=epoch)

    return save
