"""Measuring what is trained on images held out of training: the same loss on the same images every time."""

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Final

import torch
from torch import nn

from library.data.dataset import TrainingDataset
from library.data.epoch_plan import MicroBatch
from library.data.latent_encoding import LatentSource
from library.data.mask_cache import MaskCache
from library.data.options import ValidationOptions
from library.data.setup import TrainingData, prepare_data
from library.data.spec import DataSpec
from library.data.validation import DEFAULT_SEED, HeldOut, relative_name
from library.diffusion.options import NoiseOptions
from library.diffusion.schedule import TRAIN_TIMESTEPS
from library.randomness import python_random, seeded_globals
from library.task import DenoisingTask, evaluating
from library.training.best import BestModel
from library.training.ema import WeightAverage
from library.training.naming import SavePlan
from library.training.optimizers import ResultWeights
from library.training.progress import Moment
from library.training.tracking import Tracker

log = logging.getLogger(__name__)

_PARTS: Final = 5
"""Timesteps are measured at 1/5 to 4/5 of the range that is trained."""


def validation_timesteps(noise: NoiseOptions) -> tuple[int, ...]:
    """The timesteps that are measured: 200, 400, 600 and 800 of the full range."""
    low = noise.min_timestep or 0
    high = TRAIN_TIMESTEPS if noise.max_timestep is None else noise.max_timestep
    return tuple(dict.fromkeys(low + (high - low) * part // _PARTS for part in range(1, _PARTS)))


@dataclass(frozen=True, slots=True, kw_only=True)
class ValidationLoss:
    """The plain loss of the held-out images.

    Attributes:
        by_timestep: Mean over the images at each timestep.
    """

    by_timestep: Mapping[int, float]

    @property
    def mean(self) -> float:
        """Mean over images and timesteps."""
        return sum(self.by_timestep.values()) / len(self.by_timestep)


@dataclass(frozen=True, slots=True, kw_only=True)
class ValidationSet:
    """Held-out images beside those that are trained on, so that both share caches.

    Attributes:
        data: Training images first, as they are without validation, then the held-out ones.
        batches: The batches of a validation, over all processes, in order.
        images: Seed and number of the image of each held-out example.
        seed: Seed of what is not keyed by an image.
    """

    data: TrainingData
    batches: tuple[MicroBatch, ...]
    images: Mapping[int, tuple[int, int]]
    seed: int

    @classmethod
    def of(
        cls, spec: DataSpec, training: TrainingData, held_out: HeldOut, options: ValidationOptions
    ) -> "ValidationSet":
        """Held-out images of the data sets ``spec`` beside ``training``."""
        first = len(spec.datasets)
        seed = DEFAULT_SEED if options.validation_seed is None else options.validation_seed
        records = [
            replace(
                record,
                dataset=record.dataset + first,
                caption=_reworded(training, held_out, number),
            )
            for number, record in enumerate(held_out.records)
        ]
        data = prepare_data(
            DataSpec(datasets=spec.datasets + held_out.spec.datasets, where=spec.where), (*training.records, *records)
        )
        examples = range(len(training.examples), len(data.examples))
        batches = [
            MicroBatch(1, 0, bucket.plan.examples[start : start + bucket.plan.batch_size])
            for bucket in data.buckets
            if bucket.dataset >= first
            for start in range(0, len(bucket.plan.examples), bucket.plan.batch_size)
        ]
        # Where their number is limited, all buckets should have a share.
        python_random(seed, "validation order").shuffle(batches)
        return cls(
            data=data,
            batches=tuple(batches[: options.max_validation_steps]),
            images={
                example: (held_out.seed(record), held_out.image_key(record))
                for example, record in zip(examples, held_out.records, strict=True)
            },
            seed=seed,
        )


def _reworded(training: TrainingData, held_out: HeldOut, number: int) -> str:
    """The caption of a held-out record as the method changes captions, the same way every time."""
    record = held_out.records[number]
    if training.reword is None:
        return record.caption
    subset = held_out.spec.datasets[record.dataset].subsets[record.subset]
    rng = python_random(held_out.seed(record), "validation template", relative_name(record, subset))
    return training.reword(record.caption, record, rng)


class Validator:
    """Measures the present weights; it changes nothing of the training.

    Args:
        task: The losses.
        images: What they are taken of.
        timesteps: Where.
        cache: Latents of all images of ``images.data``, if they are cached.
        masks: Their masks, if those are cached.
    """

    def __init__(
        self,
        task: DenoisingTask,
        images: ValidationSet,
        timesteps: Sequence[int],
        *,
        cache: LatentSource | None = None,
        masks: MaskCache | None = None,
    ) -> None:
        self._task = task
        self._images = images
        self._timesteps = tuple(timesteps)
        self._dataset = TrainingDataset(
            data=images.data, seed=images.seed, total_steps=1, tokenize=task.text.tokenize, cache=cache, masks=masks
        )

    def measure(self, module: nn.Module) -> ValidationLoss:
        """The loss of the held-out images with ``module`` in evaluation mode; every process has to call it.

        Raises:
            UserError: An image cannot be read.
        """
        runtime = self._task.runtime
        total = torch.zeros(len(self._timesteps) + 1, dtype=torch.float64)
        with evaluating(module), seeded_globals(self._images.seed, "validation"):
            for key in self._images.batches[runtime.rank :: runtime.world]:
                batch = self._dataset[key].to(runtime.device)
                images = [self._images.images[example] for example in key.examples]
                losses = self._task.losses_at(batch, self._timesteps, images=images)
                total[:-1] += losses.cpu().double().sum(dim=1)
                total[-1] += len(key.examples)
        if runtime.world > 1:
            total = runtime.accelerator.reduce(total.to(runtime.device), reduction="sum").cpu()
        means = (total[:-1] / total[-1]).tolist()
        return ValidationLoss(by_timestep=dict(zip(self._timesteps, means, strict=True)))


class ValidationHook:
    """The hook that validates: when it is due, and before a model is saved, so that every model has its figure.

    Args:
        options: When it is due.
        saving: When models are saved.
        measure: Measures the present weights; called by every process.
        average: The average of the weights, measured as well.
        tracker: Where figures are logged.
        best: Told all figures.
        result_weights: Puts those weights in place that the optimizer means as its result.
    """

    def __init__(
        self,
        options: ValidationOptions,
        saving: SavePlan,
        measure: Callable[[], ValidationLoss],
        *,
        average: WeightAverage | None,
        tracker: Tracker,
        best: BestModel,
        result_weights: ResultWeights = nullcontext,
    ) -> None:
        self._result_weights = result_weights
        self._every_steps = options.validate_every_n_steps
        self._every_epochs = options.validate_every_n_epochs or 1
        self._saving = saving
        self._measure = measure
        self._average = average
        self._tracker = tracker
        self._best = best

    def __call__(self, moment: Moment) -> None:
        """Validate if it is due at ``moment``."""
        if moment.interrupted or not self._is_due(moment):
            # Whoever stops a run waits for it.
            return
        weights = {"model": self._result_weights()}
        if self._average is not None:
            weights["ema"] = self._average.applied()
        found: dict[str, float] = {}
        for name, in_place in weights.items():
            with in_place:
                loss = self._measure()
            self._report("" if name == "model" else f"_{name}", loss, moment)
            found[name] = loss.mean
        self._best.measured(moment.step, found)

    def _is_due(self, moment: Moment) -> bool:
        by_steps = self._every_steps is not None and moment.step % self._every_steps == 0
        by_epochs = moment.epoch_ended and moment.epoch % self._every_epochs == 0
        return by_steps or by_epochs or bool(self._saving.due(moment))

    def _report(self, suffix: str, loss: ValidationLoss, moment: Moment) -> None:
        tag = f"loss/validation{suffix}"
        divergence = loss.mean - moment.average_loss
        figures = {f"{tag}/step_average": loss.mean, f"{tag}/step_divergence": divergence}
        figures |= {f"{tag}/t{timestep}": value for timestep, value in loss.by_timestep.items()}
        self._tracker.add(figures, moment.step)
        if moment.epoch_ended:
            figures = {f"{tag}/epoch_average": loss.mean, f"{tag}/epoch_divergence": divergence}
            self._tracker.add(figures, moment.epoch)
        log.info(
            "validation%s after step %d: loss %.5f (%s)",
            " of the average" if suffix else "",
            moment.step,
            loss.mean,
            ", ".join(f"t{timestep} {value:.5f}" for timestep, value in loss.by_timestep.items()),
        )
