"""From the keys of a plan to batches. A batch depends on its key alone: no clock, no counter, no global generator."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from library.data.epoch_plan import MicroBatch
from library.data.face_crop import crop_around
from library.data.images import ImageView, Pixels, crop_origin, jitter_colour, load_image, load_view, to_tensor
from library.data.latent_encoding import LatentSource
from library.data.latent_files import is_latent_file, picture_of
from library.data.mask_cache import MaskCache
from library.data.masks import load_mask
from library.data.setup import TrainingData
from library.data.spec import Size
from library.randomness import python_random

Tokenize: TypeAlias = Callable[[str], tuple[Tensor, Tensor | None]]
"""Caption -> token ids (chunks, 77) int64, and token weights (chunks, 77) float32 where captions are weighted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Examples of one bucket, ready for the model: either ``pixels`` or both ``latent_*``.

    Attributes:
        epoch: From 1.
        step: The optimizer step it belongs to, from 0.
        examples: Numbers of the examples, B of them.
        pixels: (B, 3, H, W) float32 in -1..1.
        latent_mean: (B, C, h, w) float32, mean of the VAE's posterior, not scaled.
        latent_std: (B, C, h, w) float32, its standard deviation.
        input_ids: (B, chunks, 77) int64.
        token_weights: (B, chunks, 77) float32, where captions are weighted.
        captions: The captions as they were tokenized.
        loss_weight: (B,) float32; the prior loss weight for regularisation images, 0 for padding.
        mask: (B, H, W) float32 in 0..1, what each pixel of the images weighs in the loss; None where all weigh 1.
        is_padding: It only keeps this process in step with the others.
    """

    epoch: int
    step: int
    examples: tuple[int, ...]
    pixels: Tensor | None = None
    latent_mean: Tensor | None = None
    latent_std: Tensor | None = None
    input_ids: Tensor
    token_weights: Tensor | None = None
    captions: tuple[str, ...]
    loss_weight: Tensor
    mask: Tensor | None = None
    is_padding: bool = False

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on ``device``; a GPU copies while the program goes on."""
        # From memory that is not page-locked, CUDA waits of itself; other devices may read what is not there yet.
        non_blocking = torch.device(device).type == "cuda"
        return self._mapped(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "Batch":
        """The same batch in page-locked memory, from where it is copied to a GPU faster."""
        return self._mapped(Tensor.pin_memory)

    def _mapped(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        values = ((field.name, getattr(self, field.name)) for field in fields(self))
        changed: dict[str, Any] = {name: change(value) for name, value in values if isinstance(value, Tensor)}
        return replace(self, **changed)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingDataset:
    """Makes batches from keys; it has no state and can be sent to another process.

    Attributes:
        data: The training set.
        seed: Seed of the run.
        total_steps: Optimizer steps of the run, for the tag warm-up.
        tokenize: Turns a caption into token ids.
        cache: Latents to use instead of the image files.
        masks: Masks to use instead of the image files.
        prior_loss_weight: What regularisation images weigh in the loss.
    """

    data: TrainingData
    seed: int
    total_steps: int
    tokenize: Tokenize
    cache: LatentSource | None = None
    masks: MaskCache | None = None
    prior_loss_weight: float = 1.0

    def __getitem__(self, key: MicroBatch) -> Batch:
        """The batch of ``key``.

        Raises:
            UserError: An image cannot be read.
        """
        captions = tuple(self.example_caption(key.epoch, example, step=key.step) for example in key.examples)
        tokens = [self.tokenize(caption) for caption in captions]
        weights = [token_weights for _, token_weights in tokens if token_weights is not None]
        pixels, mean, std, masks = self._images(key)
        return Batch(
            epoch=key.epoch,
            step=key.step,
            examples=key.examples,
            pixels=pixels,
            latent_mean=mean,
            latent_std=std,
            input_ids=torch.stack([ids for ids, _ in tokens]),
            token_weights=torch.stack(weights) if weights else None,
            captions=captions,
            loss_weight=torch.tensor([self._loss_weight(key, example) for example in key.examples]),
            mask=_stacked(masks),
            is_padding=key.is_padding,
        )

    def example_caption(self, epoch: int, example: int, *, step: int) -> str:
        """The caption of ``example`` in ``epoch`` (from 1) at optimizer step ``step`` (from 0), as it is trained on."""
        return self.data.caption(example, seed=self.seed, epoch=epoch, step=step, total_steps=self.total_steps)

    def is_flipped(self, epoch: int, example: int) -> bool:
        """Whether ``example`` is mirrored in ``epoch``: half the time, where its subset asks for ``flip_aug``."""
        rules = self.data.rules_of(self.data.records[self.data.examples[example]]).augment
        return rules.flip_aug and python_random(self.seed, "flip", epoch, example).random() < 0.5

    def _loss_weight(self, key: MicroBatch, example: int) -> float:
        if key.is_padding:
            return 0.0
        return self.prior_loss_weight if self.data.records[self.data.examples[example]].is_reg else 1.0

    def _images(self, key: MicroBatch) -> tuple[Tensor | None, Tensor | None, Tensor | None, list[Tensor | None]]:
        """Pixels, or mean and standard deviation of the latents; and the masks."""
        if self.cache is None:
            loaded = [self._loaded(key.epoch, example) for example in key.examples]
            return torch.stack([pixels for pixels, _ in loaded]), None, None, [mask for _, mask in loaded]
        latents = [
            self.cache.get(self.data.examples[example], flipped=self.is_flipped(key.epoch, example))
            for example in key.examples
        ]
        masks = [self._mask(key.epoch, example) for example in key.examples]
        return None, torch.stack([mean for mean, _ in latents]), torch.stack([std for _, std in latents]), masks

    def _loaded(self, epoch: int, example: int) -> tuple[Tensor, Tensor | None]:
        """The pixels of an example, and its mask: the image is decoded once for both."""
        number = self.data.examples[example]
        rules = self.data.rules_of(self.data.records[number]).augment
        view, origin = self.framed(epoch, example)
        if is_latent_file(view.path):
            # Only to be looked at: training takes them from the cache.
            return to_tensor(picture_of(view.path)), self._mask(epoch, example)
        if self.masks is None and self.data.masked_by_opacity(number):
            image = load_image(view, origin=origin)
            pixels, mask = image.rgb, self._as_tensor(image.opacity, epoch, example)
        else:
            pixels, mask = load_view(view, origin=origin), self._mask(epoch, example)
        if rules.color_aug:
            pixels = jitter_colour(pixels, python_random(self.seed, "colour", epoch, example))
        return to_tensor(pixels[:, ::-1] if self.is_flipped(epoch, example) else pixels), mask

    def framed(self, epoch: int, example: int) -> tuple[ImageView, Size]:
        """How the image is read, and left and top of its crop: the same for its pixels and its mask."""
        number = self.data.examples[example]
        view, record = self.data.view(number), self.data.records[number]
        rules = self.data.rules_of(record).augment
        rng = python_random(self.seed, "crop", epoch, example)
        face = self.data.face(number)
        if face is None or rules.face_crop_aug_range is None:
            return view, crop_origin(view.placement, rng if rules.random_crop else None)
        placement, origin = crop_around(
            face,
            record.size,
            view.placement.bucket,
            rules.face_crop_aug_range,
            rng,
            random_crop=rules.random_crop,
        )
        return replace(view, placement=placement), origin

    def _mask(self, epoch: int, example: int) -> Tensor | None:
        """(H, W) in 0..1, or None where the whole image counts."""
        return self._as_tensor(self._levels(epoch, example), epoch, example)

    def _as_tensor(self, levels: Pixels | None, epoch: int, example: int) -> Tensor | None:
        """``levels`` in 0..1, mirrored where the example is."""
        if levels is None:
            return None
        if self.is_flipped(epoch, example):
            levels = levels[:, ::-1]
        return torch.from_numpy(levels.copy()).float().div(255)

    def _levels(self, epoch: int, example: int) -> Pixels | None:
        number = self.data.examples[example]
        if self.masks is not None:
            return self.masks.get(number)
        record = self.data.records[number]
        use_alpha = self.data.rules_of(record).alpha_mask
        if record.mask is None and not use_alpha:
            return None
        view, origin = self.framed(epoch, example)
        return load_mask(view, record.mask, use_alpha=use_alpha, origin=origin)


def _stacked(masks: Sequence[Tensor | None]) -> Tensor | None:
    """The masks of a batch, (B, H, W), or None where no image has one."""
    given = [mask for mask in masks if mask is not None]
    if not given:
        return None
    return torch.stack([torch.ones_like(given[0]) if mask is None else mask for mask in masks])
