"""One training run around a method: plan, optimizer, resuming, hooks, the loop, and what is said at the end."""

import functools
import hashlib
import logging
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any, Protocol

from library.data.dataset import TrainingDataset
from library.data.disk_cache import DiskLatentCache, Share
from library.data.latent_cache import LatentCache
from library.data.latent_encoding import LatentSource
from library.data.loader import build_loader
from library.data.mask_cache import MaskCache
from library.data.options import LoaderOptions
from library.data.setup import TrainingData
from library.data.summary import dataset_metadata
from library.diffusion.options import NoiseOptions
from library.errors import UserError, raise_if_any
from library.hooks import Hooks
from library.inputs import Inputs
from library.models.latents import encoder_digest
from library.options import flat_values
from library.reporting import RunReport
from library.resuming import Progress
from library.runtime import Runtime
from library.start_screen import ScreenOptions, start_screen
from library.task import DenoisingTask
from library.training.clock import now, session_id
from library.training.ema import WeightAverage
from library.training.loop import Interruption, fit
from library.training.lr_schedulers import build_lr_scheduler
from library.training.metadata import Kind, ModelFacts, RunFacts, file_metadata, modelspec, training_metadata
from library.training.method import StepShape, TrainingMethod
from library.training.optimizers import build_optimizer, check_groups, result_weights
from library.training.options import OptimizerOptions, RecordOptions
from library.training.progress import RunLength
from library.training.rates import recorded_rates, settled_schedule
from library.training.states import fingerprint
from library.training.updates import FusedUpdate, Update, WholeUpdate
from library.validation import ValidationSet, Validator, validation_timesteps

log = logging.getLogger(__name__)

STOPPED = 130
"""Exit code of a run that another process's signal has stopped."""


class RunOptions(ScreenOptions, Protocol):
    """The groups of a script's options that a run needs."""

    @property
    def noise(self) -> NoiseOptions: ...  # noqa: D102
    @property
    def loader(self) -> LoaderOptions: ...  # noqa: D102


def train(
    method: TrainingMethod,
    task: DenoisingTask,
    *,
    options: RunOptions,
    inputs: Inputs,
    data: TrainingData,
    kind: Kind,
    suffix: str,
    tracker_name: str,
    saved_values: int | None = None,
    record: RecordOptions | None = None,
    network_args: Mapping[str, object] | None = None,
) -> int:
    """Train ``method`` and save what the options ask for.

    Args:
        method: What is trained.
        task: Its losses and previews.
        options: The script's options.
        inputs: The checked inputs.
        data: The training set.
        kind: What the result is, for its metadata.
        suffix: Suffix of the result's file.
        tracker_name: Name of the log where the options give none.
        saved_values: Number of values in a saved model, where it is not that of the trained ones.
        record: How the training is recorded in the result; None gives it a model card alone.
        network_args: Arguments of the network module, for the record.

    Returns:
        The exit code: 0, or that of the signal that stopped the run.
    """
    with RunReport(options, inputs, data, task.runtime) as report:
        return _train(
            method,
            task,
            report,
            options=options,
            inputs=inputs,
            data=data,
            kind=kind,
            suffix=suffix,
            tracker_name=tracker_name,
            saved_values=saved_values,
            record=record,
            network_args=network_args,
        )


def _train(
    method: TrainingMethod,
    task: DenoisingTask,
    report: RunReport,
    *,
    options: RunOptions,
    inputs: Inputs,
    data: TrainingData,
    kind: Kind,
    suffix: str,
    tracker_name: str,
    saved_values: int | None,
    record: RecordOptions | None,
    network_args: Mapping[str, object] | None,
) -> int:
    runtime, started_at = task.runtime, now()
    raise_if_any(check_groups(options.optimizer, method.param_groups()))
    held_out = _validation_set(options, inputs, data)
    cached = data if held_out is None else held_out.data
    latents = _filled_cache(task, options, cached)
    masks = None if latents is None else MaskCache.fill(cached, latents)
    plan = data.plan(runtime.seed, accumulation=options.length.gradient_accumulation_steps, world=runtime.world)
    length = RunLength.of(
        max_train_steps=options.length.max_train_steps,
        max_train_epochs=options.length.max_train_epochs,
        steps_per_epoch=plan.steps_per_epoch,
    )

    # The optimizer tries itself out where it will run, and holds the parameters before Accelerate wraps the module.
    method.module.to(runtime.device)
    runtime.compile(task.model.unet, task.model.text_encoder)
    built = build_optimizer(options.optimizer, method.param_groups())
    schedule = build_lr_scheduler(settled_schedule(options), built.optimizer, length.total_steps)
    method.module, optimizer = runtime.prepare(method.module, built.optimizer)
    average = WeightAverage.of(options.ema, method.trained, runtime.device)
    progress = Progress(method, optimizer, schedule, runtime, _made_of(options, runtime, data), average)
    start_step = progress.resume(inputs.state, length)

    facts = RunFacts(
        session_id=session_id(runtime.seed),
        started_at=started_at,
        seed=runtime.seed,
        train_images=data.train_examples,
        reg_images=data.reg_examples,
        validation_images=0 if held_out is None else len(held_out.images),
        batches_per_epoch=-(-plan.batches_per_epoch // runtime.world),
        epochs=length.epochs,
        total_steps=length.total_steps,
        optimizer=built.description,
        base_model_version=task.model.variant.base_model_version,
        model=options.model.pretrained_model_name_or_path or "",
        vae=options.model.vae,
        network_args=network_args,
    )
    describe = _metadata_writer(options, inputs, task, data, facts, kind, record)
    validator = None
    if held_out is not None:
        validator = Validator(task, held_out, validation_timesteps(options.noise), cache=latents, masks=masks)
    hooks = Hooks(
        options,
        inputs,
        method,
        task,
        length,
        progress,
        describe,
        suffix=suffix,
        tracker_name=tracker_name,
        average=average,
        validator=validator,
        images_of=plan.step_size,
        start_step=start_step,
        history=report.history,
        result_weights=lambda: result_weights(built.optimizer),
    )
    report.began(
        length,
        start_step=start_step,
        speed=hooks.speed,
        results=lambda: hooks.written,
        facts=(("optimizer", _short_name(built.description)), ("schedule", options.scheduler.lr_scheduler)),
    )
    screen = start_screen(
        options,
        inputs,
        data,
        seed=runtime.seed,
        world=runtime.world,
        suffix=suffix,
        start_step=start_step,
        trained_values=sum(tensor.numel() for tensor in method.trained.state_dict().values()),
        saved_values=saved_values,
    )
    log.info("%s", "\n".join(["what will be done", *screen]))
    if start_step == 0:
        hooks.previews.before_training()
    dataset = TrainingDataset(
        data=data,
        seed=runtime.seed,
        total_steps=length.total_steps,
        tokenize=task.text.tokenize,
        cache=latents,
        masks=None if latents is None else MaskCache.fill(data, latents),
        prior_loss_weight=options.source.prior_loss_weight,
    )
    batches = build_loader(
        dataset,
        lambda: plan.micro_batches(start_step, length.total_steps, runtime.rank),
        options.loader,
        pin_memory=runtime.device.type == "cuda",
    )
    with hooks.uploads or nullcontext():
        with Interruption().watched() as interruption, hooks.tracker:
            step = fit(
                method,
                batches,
                length=length,
                shape_of=lambda step: StepShape(micro_batches=plan.slots(step), examples=plan.step_size(step)),
                optimizer=optimizer,
                schedule=schedule,
                update=_update(optimizer, options.optimizer, runtime, coupled=built.coupled),
                runtime=runtime,
                start_step=start_step,
                hooks=hooks.in_order,
                name_examples=data.names,
                interruption=interruption,
            )
        finished = step == length.total_steps
        if not finished and step > start_step:
            hooks.save_interrupted(step, length)
        hooks.say_what_was_written()
        runtime.accelerator.end_training()
    # Another process may have been the one that was asked to stop.
    return 0 if finished else interruption.exit_code or STOPPED


def _short_name(description: str) -> str:
    """An optimizer's class and arguments without the class's module."""
    name, bracket, arguments = description.partition("(")
    return f"{name.rpartition('.')[2]}{bracket}{arguments}"


def _validation_set(options: RunOptions, inputs: Inputs, data: TrainingData) -> ValidationSet | None:
    if inputs.held_out is None:
        return None
    return ValidationSet.of(inputs.spec, data, inputs.held_out, options.validation)


def _filled_cache(task: DenoisingTask, options: RunOptions, data: TrainingData) -> LatentSource | None:
    cache, runtime = options.cache, task.runtime
    if not cache.cache_latents and not data.has_latent_files:
        task.model.vae.to(runtime.device)
        return None
    filled: LatentSource
    with task.vae_in_use():
        if cache.cache_latents_to_disk:
            filled = DiskLatentCache.fill(
                data,
                task.posterior,
                vae=encoder_digest(task.model.vae),
                batch_size=cache.vae_batch_size,
                trust_names=cache.skip_cache_check,
                share=Share(rank=runtime.rank, world=runtime.world, wait=runtime.accelerator.wait_for_everyone),
                progress=runtime.is_main,
            )
        else:
            filled = LatentCache.fill(data, task.posterior, batch_size=cache.vae_batch_size, progress=runtime.is_main)
    runtime.release_memory()
    return filled


def _update(optimizer: Any, options: OptimizerOptions, runtime: Runtime, *, coupled: bool) -> Update:
    """How gradients change the weights.

    Raises:
        UserError: Several processes would each use a gradient that has not been exchanged yet.
    """
    if not options.fused_backward_pass:
        return WholeUpdate(optimizer, runtime, max_grad_norm=options.max_grad_norm, coupled=coupled)
    if runtime.world > 1:
        raise UserError(
            f"--fused_backward_pass works in one process only, and there are {runtime.world}",
            where="--fused_backward_pass",
            remedy="Start one process, or leave it out.",
        )
    return FusedUpdate(optimizer, seed=runtime.seed)


def _made_of(options: RunOptions, runtime: Runtime, data: TrainingData) -> dict[str, object]:
    return fingerprint({**flat_values(options), "seed": runtime.seed}, _digest(data))


def _metadata_writer(
    options: RunOptions,
    inputs: Inputs,
    task: DenoisingTask,
    data: TrainingData,
    facts: RunFacts,
    kind: Kind,
    record: RecordOptions | None,
) -> Callable[[int, int], dict[str, str]]:
    """Gives the metadata of a file saved after some steps and epochs; only the process that saves calls it."""
    batches_per_step = task.runtime.world * options.length.gradient_accumulation_steps

    @functools.cache
    def recorded() -> dict[str, str]:
        # Hashes the base model, so not before a file is saved.
        of_data = dataset_metadata(inputs.spec, data, batches_per_step=batches_per_step)
        return training_metadata({**flat_values(options), **recorded_rates(options)}, facts, of_data)

    def describe(step: int, epoch: int) -> dict[str, str]:
        card = modelspec(options.metadata, _model_facts(options, inputs, task, kind), timestamp=now())
        if record is None:
            return card
        return file_metadata(recorded(), card, step=step, epoch=epoch, no_metadata=record.no_metadata)

    return describe


def _digest(data: TrainingData) -> str:
    """A digest of what is trained on: names, sizes, captions and repeats of the images."""
    digest = hashlib.blake2b(digest_size=16)
    for record in data.records:
        facts = (record.path.name, record.size, record.bucket, record.caption, record.repeats, record.is_reg)
        digest.update(repr((*facts, record.mask and record.mask.name)).encode())
    return digest.hexdigest()


def _model_facts(options: RunOptions, inputs: Inputs, task: DenoisingTask, kind: Kind) -> ModelFacts:
    return ModelFacts(
        kind=kind,
        base_model_version=task.model.variant.base_model_version,
        resolution=inputs.spec.datasets[0].resolution,
        output_name=options.save.output_name,
        min_timestep=options.noise.min_timestep,
        max_timestep=options.noise.max_timestep,
        clip_skip=options.prompts.clip_skip,
    )
