"""Masks kept in memory where latents are cached: reading the images for them again would undo what caching saves."""

import os
import zlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from library.data.images import Pixels
from library.data.masks import load_mask
from library.data.setup import TrainingData
from library.data.spec import Size
from library.errors import Problem, UserError, raise_if_any

_MAX_THREADS = 4


class MaskCache:
    """The mask of every image of the training set that has one; it can be sent to another process."""

    def __init__(self, packed: Mapping[int, tuple[Size, bytes]]) -> None:
        """A filled cache; see :meth:`fill`.

        Args:
            packed: Size and compressed levels by the position of the record; masks have large even areas.
        """
        self._packed = packed

    def __len__(self) -> int:
        """Number of masks."""
        return len(self._packed)

    def get(self, record: int) -> Pixels | None:
        """The mask, (height, width) in 0..255, of the record at position ``record``; None where nothing masks it."""
        if record not in self._packed:
            return None
        (width, height), levels = self._packed[record]
        return np.frombuffer(zlib.decompress(levels), np.uint8).reshape(height, width)

    @classmethod
    def fill(cls, data: TrainingData) -> "MaskCache":
        """Read every mask once.

        Args:
            data: The training set, without crops that differ from use to use.

        Raises:
            UserError: Masks cannot be read; all of them are named.
        """
        numbers = [
            number
            for number in dict.fromkeys(data.examples)
            if data.records[number].mask is not None or data.rules_of(data.records[number]).alpha_mask
        ]
        problems: list[Problem] = []
        packed: dict[int, tuple[Size, bytes]] = {}

        def read(number: int) -> None:
            record = data.records[number]
            try:
                levels = load_mask(data.view(number), record.mask, use_alpha=data.rules_of(record).alpha_mask)
            except UserError as error:
                problems.extend(error.problems)
                return
            if levels is not None:
                packed[number] = data.placements[number].bucket, zlib.compress(levels.tobytes(), 1)

        with ThreadPoolExecutor(min(_MAX_THREADS, os.cpu_count() or 1)) as pool:
            list(pool.map(read, numbers))
        raise_if_any(sorted(problems, key=lambda problem: problem.where or ""))
        return cls(packed)
