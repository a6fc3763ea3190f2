"""What a run is about to do, on one screen: the data as the model will see it, the arithmetic, the files, the disk."""

from collections import Counter
from typing import Final, Protocol

from library.data.epoch_plan import EpochPlan
from library.data.setup import TrainingData
from library.data.summary import startup_table
from library.inputs import InputOptions, Inputs
from library.training.forecast import preview_lines, saving_lines
from library.training.naming import OutputNames
from library.training.options import EmaOptions, LengthOptions
from library.training.progress import RunLength
from library.training.rates import curve_lines
from library.training.startup import StartFacts, startup_lines

_PLACES: Final = {"device": "the device", "cpu": "the CPU"}


class ScreenOptions(InputOptions, Protocol):
    """The groups of a script's options that decide what is shown."""

    @property
    def length(self) -> LengthOptions: ...  # noqa: D102
    @property
    def ema(self) -> EmaOptions: ...  # noqa: D102


def start_screen(
    options: ScreenOptions,
    inputs: Inputs,
    data: TrainingData,
    *,
    seed: int,
    world: int,
    suffix: str,
    start_step: int = 0,
    trained_values: int | None = None,
    saved_values: int | None = None,
) -> list[str]:
    """The screen, line by line; it imports nothing heavy and computes nothing that the run does not use.

    Args:
        options: The script's options.
        inputs: The checked inputs.
        data: The training set.
        seed: Seed of the run.
        world: Number of processes.
        suffix: Suffix of the result's file.
        start_step: Steps already done by an earlier run.
        trained_values: Number of trained weights, where it is known.
        saved_values: Number of weights in a saved model, where it is another.
    """
    plan = data.plan(seed, accumulation=options.length.gradient_accumulation_steps, world=world)
    length = RunLength.of(
        max_train_steps=options.length.max_train_steps,
        max_train_epochs=options.length.max_train_epochs,
        steps_per_epoch=plan.steps_per_epoch,
    )

    def caption_of(example: int) -> str:
        return data.caption(example, seed=seed, epoch=1, step=0, total_steps=length.total_steps)

    saving = options.save
    assert saving.output_dir is not None, "checked with the inputs"
    names = OutputNames(folder=saving.output_dir, name=saving.output_name, suffix=suffix)
    return [
        *startup_table(inputs.spec, data, caption_of).splitlines(),
        *startup_lines(_facts(options, inputs, data, plan, length, world=world, start_step=start_step)),
        *curve_lines(options, length.total_steps),
        *_validation_lines(options, inputs),
        *_average_lines(options.ema),
        *saving_lines(
            saving,
            names,
            length,
            start_step=start_step,
            trained_values=trained_values,
            saved_values=saved_values,
            ema=options.ema,
            keeps_best=inputs.held_out is not None,
        ),
        *preview_lines(options.preview, inputs.prompts, length, start_step=start_step),
    ]


def _facts(
    options: ScreenOptions,
    inputs: Inputs,
    data: TrainingData,
    plan: EpochPlan,
    length: RunLength,
    *,
    world: int,
    start_step: int,
) -> StartFacts:
    """The arithmetic of the run."""
    return StartFacts(
        train_images=data.train_examples,
        reg_images=data.reg_examples,
        validation_images=len(inputs.held_out.records) if inputs.held_out is not None else 0,
        batches_per_epoch=plan.batches_per_epoch,
        epochs=length.epochs,
        batch_sizes=tuple(sorted({bucket.plan.batch_size for bucket in data.buckets})),
        accumulation=options.length.gradient_accumulation_steps,
        processes=world,
        steps_per_epoch=plan.steps_per_epoch,
        total_steps=length.total_steps,
        start_step=start_step,
        epochs_asked=options.length.max_train_epochs,
    )


def _validation_lines(options: InputOptions, inputs: Inputs) -> list[str]:
    """How many images are held out of which folder, and when they are measured."""
    if inputs.held_out is None:
        return []
    counts = Counter((record.dataset, record.subset) for record in inputs.held_out.records)
    folders = (
        f"{inputs.spec.datasets[dataset].subsets[subset].name} {count}"
        for (dataset, subset), count in sorted(counts.items())
    )
    validation = options.validation
    times = [f"after every {_counted(validation.validate_every_n_epochs or 1, 'epoch')}"]
    if validation.validate_every_n_steps:
        times.append(f"after every {_counted(validation.validate_every_n_steps, 'step')}")
    limit = f"; batches: at most {validation.max_validation_steps}" if validation.max_validation_steps else ""
    return [
        f"validation: images held out: {len(inputs.held_out.records)} ({', '.join(folders)})",
        f"  {', '.join(times)}, and of every saved model{limit}",
    ]


def _average_lines(options: EmaOptions) -> list[str]:
    if not options.ema:
        return []
    return [f"average of the weights (EMA): decay {options.ema_decay:g}, kept on {_PLACES[options.ema_device]}"]


def _counted(number: int, what: str) -> str:
    """As in "every epoch", "every 2 epochs"."""
    return what if number == 1 else f"{number} {what}s"
