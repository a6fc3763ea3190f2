"""One training run around a method: plan, optimizer, resuming, hooks, the loop, and what is said at the end."""

import hashlib
import logging
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

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
from library.inputs import InputOptions, Inputs
from library.models.latents import encoder_digest
from library.models.prompts import CaptionTokenizer
from library.options import flat_values
from library.runtime import Runtime
from library.start_screen import ScreenOptions, start_screen
from library.task import DenoisingTask, evaluating
from library.training.clock import now, session_id
from library.training.loop import Interruption, fit
from library.training.lr_schedulers import build_lr_scheduler
from library.training.metadata import Kind, ModelFacts, RunFacts, file_metadata, modelspec, training_metadata
from library.training.method import Hook, StepShape, TrainingMethod
from library.training.naming import OutputNames, SavePlan, SavePoint
from library.training.optimizers import build_optimizer
from library.training.previews import Previews
from library.training.progress import RunLength
from library.training.prompt_files import PreviewPrompt
from library.training.saving import ModelSaver, StateSaver
from library.training.states import TrainingState, fingerprint, fingerprint_differences, read_state, restore
from library.training.tracking import Tracker

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch.optim.lr_scheduler import LRScheduler

log = logging.getLogger(__name__)


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
        network_args: Arguments of the network module, for the metadata.

    Returns:
        The exit code: 0, or that of the signal that stopped the run.
    """
    runtime, started_at = task.runtime, now()
    cache = _filled_cache(task, options, data)
    plan = data.plan(runtime.seed, accumulation=options.length.gradient_accumulation_steps, world=runtime.world)
    length = RunLength.of(
        max_train_steps=options.length.max_train_steps,
        max_train_epochs=options.length.max_train_epochs,
        steps_per_epoch=plan.steps_per_epoch,
    )

    # The optimizer holds the parameters, so it is built before Accelerate wraps the module.
    built = build_optimizer(options.optimizer, method.param_groups())
    schedule = build_lr_scheduler(options.scheduler, built.optimizer, length.total_steps)
    method.module, optimizer = runtime.accelerator.prepare(method.module, built.optimizer)
    made_of = fingerprint({**flat_values(options), "seed": runtime.seed}, _digest(data))
    start_step = _resumed(method, optimizer, schedule, options, runtime, made_of)

    record = training_metadata(
        flat_values(options),
        RunFacts(
            session_id=session_id(runtime.seed),
            started_at=started_at,
            seed=runtime.seed,
            train_images=data.train_examples,
            reg_images=data.reg_examples,
            batches_per_epoch=-(-plan.batches_per_epoch // runtime.world),
            epochs=length.epochs,
            total_steps=length.total_steps,
            optimizer=built.description,
            base_model_version=task.model.variant.base_model_version,
            model=options.model.pretrained_model_name_or_path or "",
            vae=options.model.vae,
            network_args=network_args,
        ),
        dataset_metadata(
            inputs.spec, data, batches_per_step=runtime.world * options.length.gradient_accumulation_steps
        ),
    )

    def save(path: Path, step: int, epoch: int) -> None:
        card = modelspec(options.metadata, _model_facts(options, inputs, task, kind), timestamp=now())
        no_metadata = options.metadata.no_metadata
        method.save(path, file_metadata(record, card, step=step, epoch=epoch, no_metadata=no_metadata))

    capture = partial(_captured, method, optimizer, schedule, runtime, made_of)

    def generate(prompt: PreviewPrompt) -> "Image":
        with evaluating(method.module):
            return task.generate(prompt)

    hooks = Hooks(
        options,
        inputs,
        length,
        runtime,
        save=save,
        capture=capture,
        generate=generate,
        suffix=suffix,
        tracker_name=tracker_name,
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
    )
    log.info("%s", "\n".join(["what will be done", *screen]))
    if start_step == 0:
        hooks.previews.before_training()
    dataset = TrainingDataset(
        data=data,
        seed=runtime.seed,
        total_steps=length.total_steps,
        tokenize=caption_tokenizer(task, options),
        cache=cache,
        masks=None if cache is None else MaskCache.fill(data),
        prior_loss_weight=options.source.prior_loss_weight,
    )
    batches = build_loader(
        dataset,
        lambda: plan.micro_batches(start_step, length.total_steps, runtime.rank),
        options.loader,
        pin_memory=runtime.device.type == "cuda",
    )
    with Interruption().watched() as interruption, hooks.tracker:
        step = fit(
            method,
            batches,
            length=length,
            shape_of=lambda step: StepShape(micro_batches=plan.slots(step), examples=plan.step_size(step)),
            optimizer=optimizer,
            schedule=schedule,
            runtime=runtime,
            start_step=start_step,
            max_grad_norm=options.optimizer.max_grad_norm,
            hooks=hooks.in_order,
            name_examples=data.names,
            interruption=interruption,
        )
    if step < length.total_steps:
        hooks.save_interrupted(step, length)
    hooks.say_what_was_written()
    return interruption.exit_code


class Hooks:
    """What happens after a step, in order: log, model, state, previews."""

    def __init__(
        self,
        options: RunOptions,
        inputs: Inputs,
        length: RunLength,
        runtime: Runtime,
        *,
        save: Callable[[Path, int, int], None],
        capture: Callable[[int, int], TrainingState],
        generate: Callable[[PreviewPrompt], "Image"],
        suffix: str,
        tracker_name: str,
    ) -> None:
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
            capture,
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


def caption_tokenizer(task: DenoisingTask, options: InputOptions) -> CaptionTokenizer:
    """Turns captions into tokens as the options say."""
    return CaptionTokenizer(
        task.model.tokenizer,
        max_token_length=options.prompts.max_token_length,
        weighted=options.prompts.weighted_captions,
    )


def _filled_cache(task: DenoisingTask, options: RunOptions, data: TrainingData) -> LatentSource | None:
    cache, runtime = options.cache, task.runtime
    if not cache.cache_latents:
        return None
    with task.vae_in_use():
        if not cache.cache_latents_to_disk:
            return LatentCache.fill(data, task.posterior, batch_size=cache.vae_batch_size, progress=runtime.is_main)
        return DiskLatentCache.fill(
            data,
            task.posterior,
            vae=encoder_digest(task.model.vae),
            batch_size=cache.vae_batch_size,
            trust_names=cache.skip_cache_check,
            share=Share(rank=runtime.rank, world=runtime.world, wait=runtime.accelerator.wait_for_everyone),
            progress=runtime.is_main,
        )


def _resumed(
    method: TrainingMethod,
    optimizer: Any,
    schedule: "LRScheduler",
    options: RunOptions,
    runtime: Runtime,
    made_of: Mapping[str, object],
) -> int:
    """Continue from ``--resume``; the number of steps already done, 0 for a new run."""
    folder = options.resume.resume
    if folder is None:
        return 0
    state = read_state(folder)
    method.trained.load_state_dict(dict(state.tensors))
    restore(state, optimizer=optimizer, scheduler=schedule, scaler=runtime.accelerator.scaler)
    for difference in fingerprint_differences(state.fingerprint, made_of):
        log.warning("changed since the state was saved, so the run will differ: %s", difference)
    log.info("resuming at step %d from %s", state.step, folder.name)
    return state.step


def _captured(
    method: TrainingMethod,
    optimizer: Any,
    schedule: "LRScheduler",
    runtime: Runtime,
    made_of: Mapping[str, object],
    step: int,
    epoch: int,
) -> TrainingState:
    scaler = runtime.accelerator.scaler
    return TrainingState(
        step=step,
        epoch=epoch,
        tensors=method.trained.state_dict(),
        optimizer=optimizer.state_dict(),
        scheduler=schedule.state_dict(),
        scaler=scaler.state_dict() if scaler is not None else None,
        fingerprint=made_of,
    )


def _digest(data: TrainingData) -> str:
    """A digest of what is trained on: names, sizes, captions and repeats of the images."""
    digest = hashlib.blake2b(digest_size=16)
    for record in data.records:
        digest.update(repr((record.path.name, record.size, record.caption, record.repeats, record.is_reg)).encode())
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
