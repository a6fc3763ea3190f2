"""One training run around a method: plan, optimizer, resuming, hooks, the loop, and what is said at the end."""

import logging
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Final, Protocol

from library.breakdowns import breakdowns_explained
from library.data.dataset import Batch, TrainingDataset
from library.data.disk_cache import DiskLatentCache, Share
from library.data.epoch_plan import EpochPlan
from library.data.identity import identity
from library.data.latent_cache import LatentCache
from library.data.latent_encoding import LatentSource
from library.data.loader import build_loader
from library.data.mask_cache import MaskCache
from library.data.options import CacheOptions, CaptionOptions, ImageOptions, LoaderOptions, SourceOptions
from library.data.setup import TrainingData
from library.errors import UserError
from library.hooks import Hooks
from library.inputs import Inputs
from library.manifest import RunManifest
from library.models.identity import frozen_digest
from library.models.latents import encoder_digest
from library.options import flat_values
from library.reporting import RunReport
from library.results import Result, ResultOptions, metadata_writer
from library.resuming import Progress
from library.runtime import Runtime
from library.start_screen import start_screen
from library.task import DenoisingTask
from library.training.clock import now, session_id
from library.training.ema import WeightAverage
from library.training.fingerprint import fingerprint
from library.training.loop import fit
from library.training.lr_schedulers import build_lr_scheduler
from library.training.metadata import RunFacts
from library.training.method import StepShape, TrainingMethod
from library.training.optimizers import BuiltOptimizer, build_optimizer, result_weights
from library.training.options import OptimizerOptions
from library.training.progress import RunLength
from library.training.rates import rehearse_rates, settled_schedule
from library.training.signals import Interruption
from library.training.updates import FusedUpdate, Update, WholeUpdate
from library.validation import ValidationSet, Validator, validation_timesteps

if TYPE_CHECKING:
    from torch.optim.lr_scheduler import LRScheduler

log = logging.getLogger(__name__)

STOPPED = 130
"""Exit code of a run that another process's signal has stopped."""


# What the options for data come to is compared in their place; these two say how the data are used.
_TOLD_BY_DATA: Final = frozenset(
    item.name for group in (SourceOptions, ImageOptions, CaptionOptions) for item in fields(group)
) - {"masked_loss", "prior_loss_weight"}


class RunOptions(ResultOptions, Protocol):
    """The groups of a script's options that a run needs."""

    @property
    def loader(self) -> LoaderOptions: ...  # noqa: D102


@dataclass(frozen=True, kw_only=True, slots=True)
class _Images:
    """What images are read from.

    Attributes:
        held_out: The images that are held out, if there are any.
        latents: Filled caches of latents; None where images are encoded as they are used.
        masks: Masks beside them.
    """

    held_out: ValidationSet | None
    latents: LatentSource | None
    masks: MaskCache | None


@dataclass(frozen=True, kw_only=True, slots=True)
class _Learning:
    """What changes the weights.

    Attributes:
        built: The optimizer as it was made.
        optimizer: The same, prepared by Accelerate.
        schedule: The learning rates.
        average: The average of the weights, if one is kept.
    """

    built: BuiltOptimizer
    optimizer: Any
    schedule: "LRScheduler"
    average: WeightAverage | None


def train(
    method: TrainingMethod,
    task: DenoisingTask,
    result: Result,
    *,
    options: RunOptions,
    inputs: Inputs,
    data: TrainingData,
) -> int:
    """Train ``method`` and save what the options ask for.

    Args:
        method: What is trained.
        task: Its losses and previews.
        result: What comes of it.
        options: The script's options.
        inputs: The checked inputs.
        data: The training set.

    Returns:
        The exit code: 0, or that of the signal that stopped the run.
    """
    explained = breakdowns_explained(
        flat_values(options),
        largest_batch=max(bucket.plan.batch_size for bucket in data.buckets),
        world=task.runtime.world,
        where=str(task.runtime.device),
    )
    with (
        RunReport(options, inputs, data, task.runtime) as report,
        RunManifest(options, inputs, data, task.runtime, script=result.script) as manifest,
        explained,
    ):
        return _Run(method, task, result, options, inputs, data).train(report, manifest)


class _Run:
    """One run: what its stages have in common."""

    def __init__(
        self,
        method: TrainingMethod,
        task: DenoisingTask,
        result: Result,
        options: RunOptions,
        inputs: Inputs,
        data: TrainingData,
    ) -> None:
        self._method = method
        self._task = task
        self._result = result
        self._options = options
        self._inputs = inputs
        self._data = data
        self._runtime = task.runtime
        self._started_at = now()
        length = options.length
        self._plan: EpochPlan = data.plan(
            task.runtime.seed, accumulation=length.gradient_accumulation_steps, world=task.runtime.world
        )
        self._length = RunLength.of(
            max_train_steps=length.max_train_steps,
            max_train_epochs=length.max_train_epochs,
            steps_per_epoch=self._plan.steps_per_epoch,
        )

    def train(self, report: RunReport, manifest: RunManifest) -> int:
        """The whole run; returns its exit code."""
        rehearse_rates(self._options, self._method.param_groups(), self._length.total_steps)
        images = self._images()
        learning = self._learning()
        progress = Progress(
            self._method,
            learning.optimizer,
            learning.schedule,
            self._runtime,
            self._made_of(),
            learning.average,
            report.history,
        )
        start_step = progress.resume(self._inputs.state, self._options.resume, self._length)
        hooks = self._hooks(images, learning, progress, report, manifest, start_step)
        if start_step == self._length.total_steps:
            hooks.save_what_is_missing()
            return 0
        description = _short_name(learning.built.description)
        report.began(
            self._length,
            start_step=start_step,
            speed=hooks.speed,
            results=lambda: hooks.written,
            facts=(
                ("optimizer", description),
                ("schedule", self._options.scheduler.lr_scheduler),
                *manifest.facts,
            ),
        )
        self._say_what_will_be_done(start_step)
        manifest.began(self._length, start_step=start_step)
        hooks.previews.before_training(self._length)
        with hooks.uploads or nullcontext():
            code = self._fit(self._batches(images, start_step), learning, hooks, progress, start_step)
            hooks.say_what_was_written()
            self._runtime.accelerator.end_training()
        hooks.rescue.settle()
        return code

    def _images(self) -> _Images:
        """Caches filled, for training and held-out images together."""
        options, held_out = self._options, None
        if self._inputs.held_out is not None:
            held_out = ValidationSet.of(self._inputs.spec, self._data, self._inputs.held_out, options.validation)
        every = self._data if held_out is None else held_out.data
        latents = _filled_cache(self._task, options.cache, every)
        return _Images(
            held_out=held_out, latents=latents, masks=None if latents is None else MaskCache.fill(every, latents)
        )

    def _learning(self) -> _Learning:
        """The optimizer and what belongs to it, around the prepared module."""
        method, runtime, options = self._method, self._runtime, self._options
        # The optimizer tries itself out where it will run, and holds the parameters before Accelerate wraps the module.
        method.module.to(runtime.device)
        runtime.compile(self._task.model.unet, self._task.model.text_encoder)
        built = build_optimizer(options.optimizer, method.param_groups())
        schedule = build_lr_scheduler(settled_schedule(options), built.optimizer, self._length.total_steps)
        method.module, optimizer = runtime.prepare(method.module, built.optimizer)
        average = WeightAverage.of(options.ema, method.trained, runtime.device)
        return _Learning(built=built, optimizer=optimizer, schedule=schedule, average=average)

    def _hooks(
        self,
        images: _Images,
        learning: _Learning,
        progress: Progress,
        report: RunReport,
        manifest: RunManifest,
        start_step: int,
    ) -> Hooks:
        """What follows each step."""
        facts = self._facts(images, learning)
        validator = None
        if images.held_out is not None:
            timesteps = validation_timesteps(self._options.noise)
            validator = Validator(self._task, images.held_out, timesteps, cache=images.latents, masks=images.masks)
        return Hooks(
            self._options,
            self._inputs,
            self._method,
            self._task,
            self._length,
            progress,
            metadata_writer(
                self._result, facts, self._task, options=self._options, inputs=self._inputs, data=self._data
            ),
            suffix=self._result.suffix,
            tracker_name=self._result.tracker_name,
            average=learning.average,
            validator=validator,
            images_of=self._plan.step_size,
            start_step=start_step,
            history=report.history,
            manifest=manifest,
            result_weights=lambda: result_weights(learning.built.optimizer),
        )

    def _facts(self, images: _Images, learning: _Learning) -> RunFacts:
        options, runtime, data = self._options, self._runtime, self._data
        return RunFacts(
            session_id=session_id(runtime.seed),
            started_at=self._started_at,
            seed=runtime.seed,
            train_images=data.train_examples,
            reg_images=data.reg_examples,
            validation_images=0 if images.held_out is None else len(images.held_out.images),
            batches_per_epoch=-(-self._plan.batches_per_epoch // runtime.world),
            epochs=self._length.epochs,
            total_steps=self._length.total_steps,
            optimizer=learning.built.description,
            base_model_version=self._task.model.variant.base_model_version,
            model=options.model.pretrained_model_name_or_path or "",
            vae=options.model.vae,
            network_args=self._result.network_args,
        )

    def _say_what_will_be_done(self, start_step: int) -> None:
        screen = start_screen(
            self._options,
            self._inputs,
            self._data,
            seed=self._runtime.seed,
            world=self._runtime.world,
            suffix=self._result.suffix,
            start_step=start_step,
            trained_values=sum(tensor.numel() for tensor in self._method.trained.state_dict().values()),
            saved_values=self._result.saved_values,
        )
        log.info("%s", "\n".join(["what will be done", *screen]))

    def _batches(self, images: _Images, start_step: int) -> Iterable[Batch]:
        dataset = TrainingDataset(
            data=self._data,
            seed=self._runtime.seed,
            total_steps=self._length.total_steps,
            tokenize=self._task.text.tokenize,
            cache=images.latents,
            masks=images.masks,
            prior_loss_weight=self._options.source.prior_loss_weight,
        )
        return build_loader(
            dataset,
            lambda: self._plan.micro_batches(start_step, self._length.total_steps, self._runtime.rank),
            self._options.loader,
            pin_memory=self._runtime.device.type == "cuda",
        )

    def _made_of(self) -> dict[str, object]:
        """What states tell of the run, so that it is not continued as another one."""
        plan, model, vae = self._plan, self._task.model, self._task.model.deferred_vae
        options = {name: value for name, value in flat_values(self._options).items() if name not in _TOLD_BY_DATA}
        return fingerprint(
            {**options, "seed": self._runtime.seed},
            data=identity(
                self._inputs.spec,
                self._data,
                batches_per_step=self._options.length.gradient_accumulation_steps * self._runtime.world,
                steps_per_epoch=plan.steps_per_epoch,
            ),
            model={
                "U-Net": frozen_digest(model.unet),
                "text encoder": frozen_digest(model.text_encoder),
                "VAE": frozen_digest(vae.structure, vae.state_dict()),
            },
            total_steps=self._length.total_steps,
        )

    def _fit(
        self, batches: Iterable[Batch], learning: _Learning, hooks: Hooks, progress: Progress, start_step: int
    ) -> int:
        """Train to the end or until asked to stop, and save then; returns the exit code."""
        plan, optimizer = self._plan, learning.optimizer
        # After resuming, which gives the optimizer new groups.
        update = _update(optimizer, self._options.optimizer, self._runtime, coupled=learning.built.coupled)
        with Interruption().watched() as interruption, hooks.tracker:
            with _keeping_what_was_done(update, hooks, self._runtime, start_step):
                step = fit(
                    self._method,
                    batches,
                    length=self._length,
                    shape_of=lambda step: StepShape(micro_batches=plan.slots(step), examples=plan.step_size(step)),
                    optimizer=optimizer,
                    schedule=learning.schedule,
                    update=update,
                    runtime=self._runtime,
                    start_step=start_step,
                    hooks=hooks.in_order,
                    name_examples=self._data.names,
                    interruption=interruption,
                    losses=progress.losses,
                )
            if step == self._length.total_steps:
                return 0
            if step > start_step:
                hooks.save_now(step, last=True)
        # Another process may have been the one that was asked to stop.
        return interruption.exit_code or STOPPED


@contextmanager
def _keeping_what_was_done(update: Update, hooks: Hooks, runtime: Runtime, start_step: int) -> Iterator[None]:
    """Save model and state when an error ends the loop and the weights are those of a finished step."""
    try:
        yield
    except Exception as error:
        if update.done > start_step and not update.has_begun:
            log.error("the run ends after step %d, where model and state are saved", update.done)
            # The variables of the step that failed hold its activations, and saving may need their memory.
            traceback.clear_frames(error.__traceback__)
            runtime.release_memory()
            hooks.save_after_failure(update.done)
        raise


def _short_name(description: str) -> str:
    """An optimizer's class and arguments without the class's module."""
    name, bracket, arguments = description.partition("(")
    return f"{name.rpartition('.')[2]}{bracket}{arguments}"


def _filled_cache(task: DenoisingTask, cache: CacheOptions, data: TrainingData) -> LatentSource | None:
    runtime = task.runtime
    if not cache.cache_latents and not data.has_latent_files:
        task.model.vae.to(runtime.device)
        return None
    vae = task.model.deferred_vae
    filled: LatentSource
    with task.encoding() as encode:
        if cache.cache_latents_to_disk:
            filled = DiskLatentCache.fill(
                data,
                encode,
                vae=encoder_digest(vae.structure, vae.state_dict()),
                batch_size=cache.vae_batch_size,
                trust_names=cache.skip_cache_check,
                share=Share(rank=runtime.rank, world=runtime.world, wait=runtime.accelerator.wait_for_everyone),
                progress=runtime.is_main,
            )
        else:
            filled = LatentCache.fill(data, encode, batch_size=cache.vae_batch_size, progress=runtime.is_main)
    runtime.release_memory()
    return filled


def _update(optimizer: Any, options: OptimizerOptions, runtime: Runtime, *, coupled: bool) -> Update:
    """How gradients change the weights.

    Raises:
        UserError: Several processes would each use a gradient that has not been exchanged yet.
    """
    if not options.fused_backward_pass:
        return WholeUpdate(
            optimizer,
            runtime,
            max_grad_norm=options.max_grad_norm,
            coupled=coupled,
            skips=options.on_nonfinite == "skip",
        )
    if runtime.world > 1:
        raise UserError(
            f"--fused_backward_pass works in one process only, and there are {runtime.world}",
            where="--fused_backward_pass",
            remedy="Start one process, or leave it out.",
        )
    return FusedUpdate(optimizer, seed=runtime.seed)
