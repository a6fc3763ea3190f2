"""What is checked before the model itself is trained, and what a dry run tells of it."""

from typing import Protocol

from library.data.support import DataSupport
from library.full_model_options import ModelFileOptions, TrainedParts, target_problems
from library.inputs import Inputs, check_inputs
from library.inspection import InspectionOptions, dry_run
from library.models.formats import ModelFormat, suffix_of
from library.models.size import size_of_model


class FullModelOptions(InspectionOptions, Protocol):
    """What a script that trains the model itself knows of its options."""

    @property
    def file(self) -> ModelFileOptions: ...  # noqa: D102
    @property
    def parts(self) -> TrainedParts: ...  # noqa: D102
    @property
    def caches_text(self) -> bool: ...  # noqa: D102


def format_of(options: FullModelOptions) -> ModelFormat:
    """What results are saved as."""
    return options.file.format(options.model.pretrained_model_name_or_path)


def full_model_inputs(options: FullModelOptions, *, support: DataSupport) -> Inputs:
    """Everything that is read, and the places of the results; see :func:`library.inputs.check_inputs`.

    Raises:
        UserError: With every problem found.
    """
    more = target_problems(options.save, format_of(options), options.ema)
    return check_inputs(options, more=more, support=support, captions_once=options.caches_text)


def full_model_dry_run(options: FullModelOptions, inputs: Inputs) -> int:
    """Print what a run would do; returns the exit code."""
    size = size_of_model(options.model.pretrained_model_name_or_path)
    return dry_run(
        options,
        inputs,
        suffix=suffix_of(format_of(options)),
        trained_values=None if size is None else options.parts.values_of(size),
        saved_values=None if size is None else size.total,
    )
