"""Masks kept in memory where latents are cached: reading the images for them again would undo what caching saves."""

import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

from library.data.images import OPAQUE, Pixels
from library.data.latent_encoding import LatentSource
from library.data.masks import PackedMask, load_mask, packed, unpacked
from library.data.setup import TrainingData
from library.errors import Problem, UserError, raise_if_any

_MAX_THREADS = 4


class MaskCache:
    """The mask of every image of the training set that has one; it can be sent to another process."""

    def __init__(self, masks: Mapping[int, PackedMask]) -> None:
        """A filled cache; see :meth:`fill`.

        Args:
            masks: The masks by the position of the record.
        """
        self._masks = masks

    def __len__(self) -> int:
        """Number of masks."""
        return len(self._masks)

    def get(self, record: int) -> Pixels | None:
        """The mask, (height, width) in 0..255, of the record at position ``record``; None where nothing masks it."""
        return unpacked(self._masks[record]) if record in self._masks else None

    @classmethod
    def fill(cls, data: TrainingData, stored: LatentSource) -> "MaskCache":
        """Read every mask once; a transparency that is kept with the latents from there.

        Args:
            data: The training set, without crops that differ from use to use.
            stored: The filled cache of latents.

        Raises:
            UserError: Masks cannot be read; all of them are named.
        """
        numbers = [
            number
            for number in dict.fromkeys(data.examples)
            if data.records[number].mask is not None or data.rules_of(data.records[number]).alpha_mask
        ]
        problems: list[Problem] = []
        masks: dict[int, PackedMask] = {}

        def read(number: int) -> None:
            record = data.records[number]
            try:
                kept = stored.opacity(number) if data.masked_by_opacity(number) else None
                if kept is not None:
                    levels = None if kept.min() == OPAQUE else kept
                else:
                    levels = load_mask(data.view(number), record.mask, use_alpha=data.rules_of(record).alpha_mask)
            except UserError as error:
                problems.extend(error.problems)
                return
            if levels is not None:
                masks[number] = packed(levels)

        with ThreadPoolExecutor(min(_MAX_THREADS, os.cpu_count() or 1)) as pool:
            list(pool.map(read, numbers))
        raise_if_any(sorted(problems, key=lambda problem: problem.where or ""))
        return cls(masks)
