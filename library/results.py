"""What a run's result is: its kind, its file, and what is written into it beside the weights."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from library.data.setup import TrainingData
from library.data.summary import dataset_metadata
from library.diffusion.options import NoiseOptions
from library.inputs import Inputs
from library.options import flat_values
from library.start_screen import ScreenOptions
from library.task import DenoisingTask
from library.training.clock import now
from library.training.metadata import Kind, ModelFacts, RunFacts, file_metadata, modelspec, training_metadata
from library.training.options import RecordOptions
from library.training.rates import recorded_rates


class ResultOptions(ScreenOptions, Protocol):
    """The groups of a script's options that a result tells of."""

    @property
    def noise(self) -> NoiseOptions: ...  # noqa: D102


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """The result of a script.

    Attributes:
        script: Name of the script's file.
        kind: What it is, for its metadata.
        suffix: Suffix of its file; empty for a folder.
        tracker_name: Name of the log where the options give none.
        saved_values: Number of values in a file, where it is not that of the trained ones.
        record: How the training is recorded in the file; None gives it a model card alone.
        network_args: Arguments of the network module, for the record.
    """

    script: str
    kind: Kind
    suffix: str
    tracker_name: str
    saved_values: int | None = None
    record: RecordOptions | None = None
    network_args: Mapping[str, object] | None = None


def metadata_writer(
    result: Result,
    facts: RunFacts,
    task: DenoisingTask,
    *,
    options: ResultOptions,
    inputs: Inputs,
    data: TrainingData,
) -> Callable[[int, int], dict[str, str]]:
    """Gives the metadata of a file saved after some steps and epochs; only the process that saves calls it."""
    batches_per_step = task.runtime.world * options.length.gradient_accumulation_steps
    model = ModelFacts(
        kind=result.kind,
        base_model_version=task.model.variant.base_model_version,
        resolution=inputs.spec.datasets[0].resolution,
        output_name=options.save.output_name,
        min_timestep=options.noise.min_timestep,
        max_timestep=options.noise.max_timestep,
        clip_skip=options.prompts.clip_skip,
    )

    @functools.cache
    def recorded() -> dict[str, str]:
        # Hashes the base model, so not before a file is saved.
        of_data = dataset_metadata(inputs.spec, data, batches_per_step=batches_per_step)
        return training_metadata({**flat_values(options), **recorded_rates(options)}, facts, of_data)

    def describe(step: int, epoch: int) -> dict[str, str]:
        card = modelspec(options.metadata, model, timestamp=now())
        if result.record is None:
            return card
        return file_metadata(recorded(), card, step=step, epoch=epoch, no_metadata=result.record.no_metadata)

    return describe
