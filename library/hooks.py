"""What follows a training step: log, models, states and previews, as the options ask for them."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from library.inputs import InputOptions, Inputs
from library.options import flat_values
from library.resuming import Progress
from library.task import DenoisingTask, evaluating
from library.training.method import Hook, TrainingMethod
from library.training.naming import OutputNames, SavePlan, SavePoint
from library.training.previews import Previews
from library.training.progress import RunLength
from library.training.prompt_files import PreviewPrompt
from library.training.saving import ModelSaver, StateSaver
from library.training.tracking import Tracker

if TYPE_CHECKING:
    from PIL.Image import Image

log = logging.getLogger(__name__)


class Hooks:
    """What happens after a step, in order: log, model, state, previews."""

    def __init__(
        self,
        options: InputOptions,
        inputs: Inputs,
        method: TrainingMethod,
        task: DenoisingTask,
        length: RunLength,
        progress: Progress,
        describe: Callable[[int, int], dict[str, str]],
        *,
        suffix: str,
        tracker_name: str,
    ) -> None:
        def save(path: Path, step: int, epoch: int) -> None:
            method.save(path, describe(step, epoch), step=step, epoch=epoch)

        def generate(prompt: PreviewPrompt) -> "Image":
            with evaluating(method.module):
                return task.generate(prompt)

        runtime = task.runtime
        saving = options.save
        assert saving.output_dir is not None, "checked with the inputs"
        names = OutputNames(folder=saving.output_dir, name=saving.output_name, suffix=suffix)
        self._keeps_states = saving.save_state or saving.save_state_on_train_end
        self.tracker = Tracker(
            options.logging, tracker_name=tracker_name, config=flat_values(options), is_main=runtime.is_main
        )
        self.models = ModelSaver(SavePlan.for_models(saving, length.epochs), names, save, is_main=runtime.is_main)
        self.states = StateSaver(
            SavePlan.for_states(saving, length.epochs),
            names,
            progress.capture,
            every_time=saving.save_state,
            is_main=runtime.is_main,
        )
        self.previews = Previews(
            options.preview,
            inputs.prompts,
            generate,
            output_dir=saving.output_dir,
            output_name=saving.output_name,
            seed=runtime.seed,
            is_main=runtime.is_main,
        )

    @property
    def in_order(self) -> list[Hook]:
        """The hooks as the loop calls them."""
        states: list[Hook] = [self.states] if self._keeps_states else []
        return [self.tracker, self.models, *states, self.previews]

    def save_interrupted(self, step: int, length: RunLength) -> None:
        """Save the model, and the state if states are asked for, where the run was stopped."""
        point = SavePoint(kind="step", number=step)
        self.models.save(point, step=step, epoch=step // length.steps_per_epoch)
        if self._keeps_states:
            self.states.save(point, step=step, epoch=length.epoch_of(step - 1))

    def say_what_was_written(self) -> None:
        """Name the results."""
        for what, path in (
            ("model", self.models.last_saved),
            ("state", self.states.last_saved),
            ("previews", self.previews.written[-1].parent if self.previews.written else None),
            ("log", self.tracker.folder),
        ):
            if path is not None:
                log.info("%s: %s", what, path)
