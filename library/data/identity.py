"""What a training set comes to, by name: what a run that goes on later compares, to notice that it has another one."""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, Final

from library.data.setup import TrainingData
from library.data.spec import DataSpec

# Where something is, and how it is kept, makes no other training set; the batch size is told with the step's.
_NOT_COMPARED: Final = frozenset(
    {"batch_size", "cache_info", "conditioning_data_dir", "image_dir", "metadata_file", "where", "written_dir"}
)


def identity(spec: DataSpec, data: TrainingData, *, batches_per_step: int, steps_per_epoch: int) -> dict[str, object]:
    """The rules of every data set and subset, the size of a step, and a digest of the images, by name.

    Args:
        spec: The data sets.
        data: Their images.
        batches_per_step: Batches of an optimizer step, over all processes.
        steps_per_epoch: Optimizer steps of an epoch.
    """
    found: dict[str, object] = {}
    for number, dataset in enumerate(spec.datasets, 1):
        found |= _flat(dataset, f"data set {number}, ")
        found[f"data set {number}, images of a step"] = dataset.batch_size * batches_per_step
    return {**found, "steps of an epoch": steps_per_epoch, "images and captions": _digest(data)}


def _flat(part: Any, lead: str) -> dict[str, object]:
    """The fields of ``part`` and of what it holds."""
    found: dict[str, object] = {}
    for name, value in _fields(part):
        if name == "subsets":
            for number, subset in enumerate(value, 1):
                found |= _flat(subset, f"{lead}subset {number}, ")
        elif is_dataclass(value):
            found |= _flat(value, lead)
        else:
            found[f"{lead}{name}"] = dict(value) if isinstance(value, Mapping) else value
    return found


def _fields(part: Any) -> Iterator[tuple[str, Any]]:
    return ((item.name, getattr(part, item.name)) for item in fields(part) if item.name not in _NOT_COMPARED)


def _digest(data: TrainingData) -> str:
    """A digest of names, sizes in pixels and bytes, captions and repeats of the images."""
    digest = hashlib.blake2b(digest_size=16)
    for record in data.records:
        facts = (record.name, record.size, record.bucket, record.caption, record.tags, record.repeats, record.is_reg)
        mask = record.mask and (record.mask.name, _bytes(record.mask))
        digest.update(repr((*facts, _bytes(record.path), mask)).encode(errors="surrogatepass"))
    return digest.hexdigest()


def _bytes(path: Path) -> int | None:
    """The size of a file; None where it is gone, which whoever reads it will say."""
    try:
        return path.stat().st_size
    except OSError:
        return None
