"""Latents of the training set in files beside the images (``--cache_latents_to_disk``).

An entry is used if it was made of the same file content with the same settings and is whole; every other one is made
anew, and why is said. The content of an image is not read again while its size and time of change stay what they were.
Training reads an entry when it needs it, so the cache may be larger than memory.
"""

import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Final

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from library.data.cache_entry import (
    Entry,
    Settings,
    Source,
    UnusableEntryError,
    read_entry,
    size_of,
    write_entry,
)
from library.data.cache_places import Place, Places
from library.data.folders import IMAGE_FORMATS
from library.data.images import ImageView, LoadedImage, Pixels, load_image, orientation
from library.data.latent_encoding import MAX_READING_THREADS, Encode, Posterior, Use, encoded, file_pair, uses_of
from library.data.latent_files import CHANNELS, is_latent_file, read_latents
from library.data.setup import TrainingData
from library.disk_space import CannotWriteError, check_room
from library.errors import UserError
from library.wording import named

log = logging.getLogger(__name__)

NOT_CACHED: Final = "not cached yet"
_KEPT: Final = "made "
"""How the reasons begin that leave an entry to whoever made it: it is right, but for other settings."""
_MOST_NAMED: Final = 3
_ATTEMPTS: Final = 3


def _no_others() -> None:
    """Nobody to wait for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """The part of a cache that this process fills.

    Attributes:
        rank: Number of this process, from 0.
        world: Number of processes; each takes every ``world``-th image.
        wait: Returns when every process has called it.
    """

    rank: int = 0
    world: int = 1
    wait: Callable[[], None] = _no_others


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What is found when an image's entry is looked for.

    Attributes:
        path: The entry to use; None when it must be made.
        reason: Why it must be made.
        is_foreign: Another program has written it.
        source: The image as it is now, where its time has changed and its content has not.
        may_write: The entry lies where may be written.
    """

    path: Path | None = None
    reason: str | None = None
    is_foreign: bool = False
    source: Source | None = None
    may_write: bool = False


class DiskLatentCache:
    """The posterior of every image of a training set, read when it is asked for; it can be sent to another process."""

    def __init__(self, data: TrainingData, *, vae: str, trust_names: bool = False) -> None:
        """A cache that may have no entries yet; see :meth:`fill`.

        Args:
            data: The training set, without random crops or colour augmentation.
            vae: Digest of the VAE's encoder.
            trust_names: Use entries of the right name without asking what they were made of.
        """
        self._data = data
        self._vae = vae
        self._trust_names = trust_names
        self._places = Places({view: data.home(use.records[0]) for view, use in uses_of(data).items()})

    @classmethod
    def fill(
        cls,
        data: TrainingData,
        encode: Encode,
        *,
        vae: str,
        batch_size: int,
        trust_names: bool = False,
        share: Share | None = None,
        progress: bool = True,
    ) -> "DiskLatentCache":
        """Make what is missing and wait for the other processes.

        A process that fails does not wait: its end is what the others are told.

        Args:
            data: As for the class.
            encode: The VAE's encoder.
            vae: As for the class.
            batch_size: Images encoded at once; a batch never mixes buckets.
            trust_names: As for the class.
            share: What this process fills; everything when absent.
            progress: Show progress bars.

        Raises:
            UserError: Images cannot be read (all of them are named), or entries cannot be written.
        """
        cache = cls(data, vae=vae, trust_names=trust_names)
        share = share or Share()
        mine = dict(islice(uses_of(data).items(), share.rank, None, share.world))
        cache._fill(mine, encode, batch_size=batch_size, progress=progress, is_shared=share.world > 1)
        share.wait()
        return cache

    def get(self, record: int, *, flipped: bool) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation (C, h, w), float32 on the CPU, of the record at position ``record``.

        Raises:
            UserError: The entry is gone or was changed since the cache was filled.
        """
        view = self._data.view(record)
        if is_latent_file(view.path):
            return file_pair(read_latents(view.path), view, flipped=flipped)
        entry = self._usable(view, flip=flipped)
        pair = None if entry is None else entry.pair(flipped=flipped)
        if pair is not None:
            return torch.from_numpy(pair[0]), torch.from_numpy(pair[1])
        raise UserError(
            "the image's cached latents "
            + ("do not fit the settings" if self._trust_names else "are gone or were changed during the run"),
            where=str(view.path),
            remedy="Start again without --skip_cache_check." if self._trust_names else "Start again: they are rebuilt.",
        )

    def opacity(self, record: int) -> Pixels | None:
        """The opacity that is kept with the latents of the record, (height, width) in 0..255; None where it is not."""
        view = self._data.view(record)
        if is_latent_file(view.path):
            return read_latents(view.path).opacity
        entry = self._usable(view, flip=False, mask=True)
        return None if entry is None else entry.opacity

    def _usable(self, view: ImageView, *, flip: bool, mask: bool = False) -> Entry | None:
        """The first entry of ``view`` that has what is asked for."""
        settings, place = self.settings(view), self.place(view)
        for path in place.candidates:
            with suppress(FileNotFoundError, UnusableEntryError):
                entry = read_entry(path)
                is_whole = entry.fits(view.placement.bucket) and _missing(entry, flip=flip, mask=mask) is None
                if is_whole and (self._trust_names or objection(entry, view, settings, place, flip=flip) is None):
                    return entry
        return None

    def settings(self, view: ImageView) -> Settings:
        """What ``view`` is encoded with."""
        return Settings.of(view, self._vae)

    def place(self, view: ImageView) -> Place:
        """Where the entry of ``view`` may lie."""
        return self._places.of(view, self.settings(view).digest())

    def judge(self, view: ImageView, *, flip: bool, mask: bool = False, reads_image: bool = False) -> Verdict:
        """Whether ``view`` has an entry that can be used.

        Args:
            view: The image.
            flip: The mirrored latents are needed too.
            mask: The opacity is needed too.
            reads_image: Compare the content of the image even where its size and time are the same.
        """
        settings, place = self.settings(view), self.place(view)
        if self._trust_names:
            path = next((path for path in place.candidates if path.exists()), None)
            return Verdict(path=path, reason=None if path else NOT_CACHED)
        reasons: list[str] = []
        for path in place.candidates:
            try:
                entry = read_entry(path)
                reason = objection(entry, view, settings, place, flip=flip, mask=mask)
                source = _touched(entry, view, reads_image=reads_image) if reason is None else None
            except FileNotFoundError:
                continue
            except UnusableEntryError as error:
                reasons.append(str(error))
                continue
            if reason is None:
                may_write = path in place.written
                return Verdict(path=path, is_foreign=entry.is_foreign, source=source, may_write=may_write)
            reasons.append(reason)
        return Verdict(reason=reasons[0] if reasons else NOT_CACHED)

    def judge_all(
        self, uses: Mapping[ImageView, Use], *, reads_image: bool = False, progress: bool = True
    ) -> dict[ImageView, Verdict]:
        """The verdict on every image of ``uses``."""

        def judged(view: ImageView) -> Verdict:
            use = uses[view]
            return self.judge(view, flip=use.flip, mask=use.mask, reads_image=reads_image)

        with ThreadPoolExecutor(MAX_READING_THREADS) as pool:
            shown = tqdm(
                pool.map(judged, uses),
                total=len(uses),
                desc="checking the latent cache",
                unit="image",
                # None asks whether the error output is a terminal.
                disable=None if progress else True,
                leave=False,
            )
            return dict(zip(uses, shown, strict=True))

    def _fill(
        self, uses: Mapping[ImageView, Use], encode: Encode, *, batch_size: int, progress: bool, is_shared: bool
    ) -> None:
        pending = uses
        for attempt in range(_ATTEMPTS):
            verdicts = self.judge_all(pending, progress=progress and not attempt)
            if not attempt:
                report(verdicts, is_shared=is_shared)
                self._report_moved(uses)
                self._restamp(verdicts)
            pending = {view: uses[view] for view, verdict in verdicts.items() if verdict.path is None}
            if not pending:
                return
            try:
                self._check_room(pending)
                self._build(pending, encode, batch_size=batch_size, progress=progress)
            except CannotWriteError as problem:
                raise _no_place(problem) from problem
            # Another run may have given an image an entry for its own settings at the same moment: looked at again.
        verdicts = self.judge_all(pending, progress=False)
        lost = next((view for view, verdict in verdicts.items() if verdict.path is None), None)
        if lost is not None:
            raise UserError(
                "the image's cached latents do not stay as they are written",
                where=str(lost.path),
                remedy="Another program changes the images or their cache files: end it, or use --cache_latents alone.",
            )

    def _report_moved(self, uses: Mapping[ImageView, Use]) -> None:
        """Say which entries do not lie beside their images."""
        moved = {view.path: place.shared for view in uses if (place := self.place(view)).is_moved}
        if moved:
            log.info(
                "latent cache: %d images lie outside the folders of their metadata file (%s); their entries go to '%s'",
                len(moved),
                _named(moved),
                next(iter(moved.values())).parent,
            )

    def _check_room(self, uses: Mapping[ImageView, Use]) -> None:
        """Refuse to begin what will not fit on the disks of the entries."""
        sizes: defaultdict[int, list[tuple[Path, int]]] = defaultdict(list)
        for view, use in uses.items():
            path = self.place(view).own
            # Of a folder that is not there yet, the disk will be that of the image.
            home = path.parent if path.parent.exists() else view.path.parent
            with suppress(OSError):
                sizes[home.stat().st_dev].append(
                    (home / path.name, size_of(view.placement.bucket, flip=use.flip, mask=use.mask))
                )
        for entries in sizes.values():
            called = f"the cached latents of {len(entries)} images"
            check_room(entries[0][0], sum(size for _, size in entries), called=called)

    def _build(self, uses: Mapping[ImageView, Use], encode: Encode, *, batch_size: int, progress: bool) -> None:
        sources: dict[ImageView, Source] = {}

        def load(view: ImageView) -> LoadedImage:
            # Before the pixels are read, so that a change in between cannot be mistaken for what was encoded.
            with suppress(OSError):
                sources[view] = Source.of(view.path)
            return load_image(view)

        for view, posterior in encoded(uses, encode, batch_size=batch_size, progress=progress, load=load):
            entry = entry_of(view, posterior, self.settings(view), sources.pop(view))
            path = self._target(view, entry)
            write_entry(path, _completed(entry, path))

    def _target(self, view: ImageView, entry: Entry) -> Path:
        """Where ``entry`` goes: to the shared name, unless that holds what another run can use."""
        place = self.place(view)
        if not place.may_share or place.own.exists():
            return place.own
        try:
            present = read_entry(place.shared)
        except (FileNotFoundError, UnusableEntryError):
            return place.shared
        return place.own if _is_of_use_to_others(present, entry) else place.shared

    def _restamp(self, verdicts: Mapping[ImageView, Verdict]) -> None:
        """Note the new times of images that were only touched, so that they are not read again next time."""
        for verdict in verdicts.values():
            if verdict.source is not None and verdict.path is not None and verdict.may_write:
                # A folder that cannot be written to only costs time.
                with suppress(UserError, FileNotFoundError, UnusableEntryError):
                    write_entry(verdict.path, replace(read_entry(verdict.path), source=verdict.source))


def _no_place(problem: CannotWriteError) -> UserError:
    one = problem.problems[0]
    remedy = (
        "Free space on the disk, or use --cache_latents alone, which keeps latents in memory. What is cached stays."
    )
    return UserError(one.what, where=one.where, remedy=remedy)


def objection(
    entry: Entry, view: ImageView, settings: Settings, place: Place, *, flip: bool, mask: bool = False
) -> str | None:
    """Why a whole ``entry`` is not what ``view`` needs, the content of its image aside; None when it is."""
    if entry.settings is not None and (difference := entry.settings.difference(settings)):
        return difference
    if entry.is_foreign and not place.is_certain:
        return "by another program, and several images have this name"
    if entry.original_size is None and not place.is_sized:
        return "in an old format that does not say which image size it is for"
    if entry.original_size is not None and entry.original_size != view.size:
        return f"for an image of another size: {entry.original_size} instead of {view.size}"
    if entry.mean.shape[0] != CHANNELS or not entry.fits(view.placement.bucket):
        found = "x".join(str(side) for side in entry.mean.shape)
        return f"for another size: latents {found} for a bucket of {'x'.join(map(str, view.placement.bucket))}"
    if missing := _missing(entry, flip=flip, mask=mask):
        return missing
    if entry.is_foreign and _is_turned(view.path):
        return "by another program, which may not have turned the image as its orientation says"
    return None


def _missing(entry: Entry, *, flip: bool, mask: bool) -> str | None:
    """What ``entry`` lacks of what is asked for."""
    if flip and entry.mirrored is None:
        return "without mirrored latents"
    if mask and not entry.has_right_mask:
        return "without the mask of the image's transparency"
    return None


def _is_turned(path: Path) -> bool:
    """Whether the image is shown otherwise than it is stored; so taken where it cannot be read."""
    try:
        with Image.open(path, formats=IMAGE_FORMATS) as image:
            return orientation(image) != 1
    except OSError:
        return True


def _is_of_use_to_others(present: Entry, entry: Entry) -> bool:
    """Whether ``present`` is right for the same image with other settings than those of ``entry``."""
    if present.settings is None or present.source is None or entry.settings is None or entry.source is None:
        return False
    is_current = present.settings.version == entry.settings.version and present.source.content == entry.source.content
    return is_current and present.settings != entry.settings


def _completed(entry: Entry, path: Path) -> Entry:
    """``entry`` with the mirrored latents and the mask that the entry in ``path``, otherwise the same, has besides."""
    try:
        present = read_entry(path)
    except (FileNotFoundError, UnusableEntryError):
        return entry
    if present.source is None or entry.source is None or present.source.content != entry.source.content:
        return entry
    if present.settings != entry.settings:
        return entry
    return replace(
        entry,
        mirrored=present.mirrored if entry.mirrored is None else entry.mirrored,
        mask=present.mask if entry.mask is None else entry.mask,
    )


def _touched(entry: Entry, view: ImageView, *, reads_image: bool) -> Source | None:
    """The image as it is now where only its time has changed; None where that has not either.

    Raises:
        UnusableEntryError: The image has another content.
    """
    if entry.source is None:
        return None
    try:
        looks_same = entry.source.looks_like(view.path)
        if looks_same and not reads_image:
            return None
        now = Source.of(view.path)
    except OSError as error:
        raise UnusableEntryError("the image cannot be read") from error
    if now.content != entry.source.content:
        raise UnusableEntryError("the image has changed")
    return None if looks_same else now


def entry_of(view: ImageView, posterior: Posterior, settings: Settings, source: Source) -> Entry:
    """The entry of ``view``, encoded with ``settings`` from the image that ``source`` describes."""
    mirrored, opacity = posterior.mirrored, posterior.opacity
    return Entry(
        mean=posterior.mean.numpy(),
        std=posterior.std.numpy(),
        mirrored=(mirrored[0].numpy(), mirrored[1].numpy()) if mirrored else None,
        original_size=view.size,
        mask=None if opacity is None else opacity.astype(np.float32) / np.float32(255),
        settings=settings,
        source=source,
    )


def report(verdicts: Mapping[ImageView, Verdict], *, is_shared: bool) -> None:
    """Say how many entries are used, and how many are made and why: those of one process if the work is shared."""
    reasons: defaultdict[str, list[tuple[str, Path]]] = defaultdict(list)
    for view, verdict in verdicts.items():
        if verdict.reason is not None:
            reasons[verdict.reason.partition(":")[0]].append((verdict.reason, view.path))
    to_make = sum(len(found) for found in reasons.values())
    share = " (the share of this process)" if is_shared else ""
    log.info("latent cache: %d entries are used, %d are made%s", len(verdicts) - to_make, to_make, share)
    for kind, found in sorted(reasons.items()):
        if kind != NOT_CACHED:
            paths = [path for _, path in found]
            log.warning("latent cache: %d made anew: %s (%s)", len(found), found[0][0], _named(paths))
    if any(kind.startswith(_KEPT) for kind in reasons):
        log.info("entries for other settings stay beside them; tools/cache_latents.py clean removes them")
    foreign = [view.path for view, verdict in verdicts.items() if verdict.is_foreign]
    if foreign:
        log.warning(
            "latent cache: %d entries were written by another program (%s). Their sizes fit and they are used, as one "
            "sample each; which VAE and which pixels they come from cannot be checked. Delete them to have them made.",
            len(foreign),
            _named(foreign),
        )


def _named(paths: Iterable[Path]) -> str:
    return named([path.name for path in paths], _MOST_NAMED)
