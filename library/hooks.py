"""What follows a training step: average, log, validation, models, states and previews, as the options ask for them."""

import logging
from collections.abc import Callable
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
        def generate(prompt: PreviewPrompt) -> "Image":
            shown = average.applied if average is not None and options.ema.ema_previews else result_weights
            with shown(), evaluating(method.module):
                return task.generate(prompt)

        runtime = task.runtime
        self._length = length
        saving = options.save
        assert saving.output_dir is not None, "checked with the inputs"
        names = OutputNames(folder=saving.output_dir, name=saving.output_name, suffix=suffix)
        plan = SavePlan.for_models(saving, length.epochs)
        best = BestModel(names.folder, names.name, continued=start_step > 0) if validator is not None else None
        self._average = average
        self.rescue = Rescue()
        self._manifest = manifest
        self.speed = Speed(images_of)
        self.tracker = Tracker(
            options.logging,
            tracker_name=tracker_name,
            config=flat_values(options),
            is_main=runtime.is_main,
            more=[] if history is None else [history],
            speed=self.speed,
            former=progress.log,
            continued_at=start_step,
        )
        progress.log = self.tracker.place
        self.validation: ValidationHook | None = None
        if validator is not None and best is not None:
            self.validation = ValidationHook(
                options.validation,
                plan,
                lambda: validator.measure(method.module),
                average=average,
                tracker=self.tracker,
                best=best,
                result_weights=result_weights,
            )
        if runtime.is_main:
            _sweep(names)
        self.uploads = uploads_to_hub(options.hub, is_main=runtime.is_main)
        self.models = [
            ModelSaver(
                plan,
                names if weights == "model" else names.of_average(),
                _save(method, describe, average if weights == "ema" else None, result_weights),
                is_main=runtime.is_main,
                best=best,
                weights=weights,
                uploads=self.uploads,
                saved=None if manifest is None else manifest.model,
                keep=self.rescue.keep,
            )
            for weights in options.ema.saved
        ]
        self.states = StateSaver(
            SavePlan.for_states(saving, length.epochs),
            names,
            progress.capture,
            saving,
            before=self.tracker.flush,
            is_main=runtime.is_main,
            uploads=self.uploads if options.hub.save_state_to_huggingface else None,
            saved=None if manifest is None else manifest.state,
            keep=self.rescue.keep,
        )
        self.previews = Previews(
            options.preview,
            inputs.prompts,
            generate,
            output_dir=saving.output_dir,
            output_name=saving.output_name,
            seed=runtime.seed,
            is_main=runtime.is_main,
            show=self.tracker.add_image,
            continued_at=start_step,
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
