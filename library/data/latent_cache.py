"""Latents of the whole training set in memory, encoded once before training (``--cache_latents``)."""

from collections import Counter
from collections.abc import Mapping

import torch
from torch import Tensor

from library.data.cache_entry import Entry
from library.data.images import ImageView, Pixels
from library.data.latent_encoding import Encode, Posterior, Use, encoded, file_pair, latent_files_of, uses_of
from library.data.latent_files import read_latents
from library.data.masks import PackedMask, packed, unpacked
from library.data.setup import TrainingData
from library.data.spec import Size


class LatentCache:
    """The posterior of every image of the training set; it can be sent to another process."""

    def __init__(
        self,
        stacks: Mapping[Size, tuple[Tensor, Tensor]],
        rows: Mapping[tuple[int, bool], tuple[Size, int]],
        opacities: Mapping[int, PackedMask],
    ) -> None:
        """A filled cache; see :meth:`fill`.

        Args:
            stacks: Means and standard deviations (N, C, h, w) by bucket.
            rows: Bucket and row by (position of the record, whether mirrored).
            opacities: By position of the record, where its transparency is its mask.
        """
        self._stacks = stacks
        self._rows = rows
        self._opacities = opacities

    def get(self, record: int, *, flipped: bool) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation (C, h, w), float32 on the CPU, of the record at position ``record``."""
        bucket, row = self._rows[record, flipped]
        mean, std = self._stacks[bucket]
        return mean[row], std[row]

    def opacity(self, record: int) -> Pixels | None:
        """The opacity of the record at position ``record``, (height, width) in 0..255, where it is its mask."""
        return unpacked(self._opacities[record]) if record in self._opacities else None

    @classmethod
    def fill(cls, data: TrainingData, encode: Encode, *, batch_size: int, progress: bool = True) -> "LatentCache":
        """Encode every image of ``data`` once, and mirrored too where its subset asks for ``flip_aug``.

        Every process of a run fills its own cache.

        Args:
            data: The training set, without random crops or colour augmentation.
            encode: The VAE's encoder.
            batch_size: Images encoded at once; a batch never mixes buckets.
            progress: Show a progress bar.

        Raises:
            UserError: Images cannot be read (all of them are named) or encode to values that are not finite.
        """
        uses, files = uses_of(data), latent_files_of(data)
        filling = _Filling(uses, files)
        for view, posterior in encoded(uses, encode, batch_size=batch_size, progress=progress):
            filling.add(view, posterior)
        for view, use in files.items():
            filling.add_file(view, read_latents(view.path), flip=use.flip)
        return cls(filling.stacks, filling.rows, filling.opacities)


class _Filling:
    """A cache in the making.

    The latents of a bucket lie in one tensor each: thousands of small ones would need a handle each in every worker.
    """

    def __init__(self, *uses: Mapping[ImageView, Use]) -> None:
        self.stacks: dict[Size, tuple[Tensor, Tensor]] = {}
        self.rows: dict[tuple[int, bool], tuple[Size, int]] = {}
        self.opacities: dict[int, PackedMask] = {}
        self._uses = {view: use for part in uses for view, use in part.items()}
        self._size = Counter[Size]()
        for view, use in self._uses.items():
            self._size[view.placement.bucket] += 1 + use.flip
        self._used = Counter[Size]()

    def add(self, view: ImageView, posterior: Posterior) -> None:
        """Keep the posterior of ``view``."""
        self._add(view, (posterior.mean, posterior.std), flipped=False)
        if posterior.mirrored is not None:
            self._add(view, posterior.mirrored, flipped=True)
        if posterior.opacity is not None:
            self._add_opacity(view, posterior.opacity)

    def add_file(self, view: ImageView, entry: Entry, *, flip: bool) -> None:
        """Keep the latents of ``entry``, which take the place of an image."""
        for flipped in (False, True)[: 1 + flip]:
            mean, std = file_pair(entry, view, flipped=flipped)
            self._add(view, (mean, std), flipped=flipped)
        if (opacity := entry.opacity) is not None and self._uses[view].mask:
            self._add_opacity(view, opacity)

    def _add_opacity(self, view: ImageView, opacity: Pixels) -> None:
        self.opacities.update(dict.fromkeys(self._uses[view].records, packed(opacity)))

    def _add(self, view: ImageView, pair: tuple[Tensor, Tensor], *, flipped: bool) -> None:
        bucket = view.placement.bucket
        if bucket not in self.stacks:
            rows = self._size[bucket]
            mean, std = (torch.empty(rows, *latents.shape) for latents in pair)
            self.stacks[bucket] = (mean, std)
        row = self._used[bucket]
        self._used[bucket] += 1
        for stack, latents in zip(self.stacks[bucket], pair, strict=True):
            stack[row] = latents
        for record in self._uses[view].records:
            self.rows[record, flipped] = (bucket, row)
