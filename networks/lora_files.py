"""LoRA files as the tools read and write them."""

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.errors import UserError
from library.files import read_tensors
from library.training.clock import now
from library.training.metadata import ModelFacts, modelspec
from library.training.options import MetadataOptions
from networks.adapter_files import ALPHA, DOWN, UP, is_pointwise_shape, lora_dims, write_network
from networks.loading import LORA
from networks.lora_contents import FAMILIES, Contents, check_lora

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from networks.low_rank_math import LowRank

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LoRAFile:
    """A LoRA file that was read.

    Attributes:
        contents: What it says of itself.
        changes: The change of each layer, by the module's name.
    """

    contents: Contents
    changes: "dict[str, LowRank]"


def read_lora(path: Path) -> LoRAFile:
    """Read one LoRA file; a missing alpha is the rank, as everywhere.

    Raises:
        UserError: It is damaged, no LoRA, or holds numbers that are not finite.
    """
    from networks.low_rank_math import LowRank

    file = read_tensors(path)
    shapes = {name: tuple(tensor.shape) for name, tensor in file.tensors.items()}
    contents = Contents(path, shapes, file.metadata)
    check_lora(contents)
    check_finite(file.tensors, path)
    dims = lora_dims(shapes)
    without = [name for name in dims if name + ALPHA not in file.tensors]
    if without:
        log.warning("%s has no alpha for %d of %d modules: the rank is taken", path.name, len(without), len(dims))
    changes = {
        name: LowRank(
            file.tensors[name + DOWN], file.tensors[name + UP], float(file.tensors.get(name + ALPHA, dims[name]))
        )
        for name in sorted(dims)
    }
    return LoRAFile(contents, changes)


def check_finite(tensors: "Mapping[str, Tensor]", path: Path) -> None:
    """Refuse a file with numbers that are not finite.

    Raises:
        UserError: Naming one of them.
    """
    import torch

    bad = [name for name, tensor in sorted(tensors.items()) if not bool(torch.isfinite(tensor).all())]
    if bad:
        raise UserError(
            f"{len(bad)} of {len(tensors)} tensors in {path.name} hold values that are not finite, for instance "
            f"{bad[0]}",
            where=str(path),
            remedy="Take an earlier file of that training; networks/check_lora_weights.py shows what is in a file.",
        )


def summary(changes: "Mapping[str, LowRank]", base_version: str) -> dict[str, str]:
    """The metadata that other programs need to load a LoRA with these changes."""
    record = {
        "ss_v2": str(FAMILIES[base_version] == "sd2"),
        "ss_base_model_version": base_version,
        "ss_network_module": LORA,
        **stated_ranks(changes),
    }
    large = {(change.rank, change.alpha) for change in large_kernels(changes)}
    if len(large) == 1:
        ((rank, alpha),) = large
        record["ss_network_args"] = json.dumps({"conv_dim": rank, "conv_alpha": alpha})
    return record


def stated_ranks(changes: "Mapping[str, LowRank]") -> dict[str, str]:
    """Rank and alpha of the linear layers and 1x1 convolutions, "Dynamic" where they differ."""
    large = [id(change) for change in large_kernels(changes)]
    main = [change for change in changes.values() if id(change) not in large] or list(changes.values())
    return {
        "ss_network_dim": _common(change.rank for change in main),
        "ss_network_alpha": _common(change.alpha for change in main),
    }


def large_kernels(changes: "Mapping[str, LowRank]") -> "list[LowRank]":
    """The changes of convolutions larger than 1x1."""
    return [change for change in changes.values() if not is_pointwise_shape(tuple(change.down.shape))]


def with_remark(metadata: Mapping[str, str], remark: str) -> str:
    """The training comment of a file with a remark in front."""
    comment = metadata.get("ss_training_comment", "None")
    return remark if comment in ("", "None") else f"{remark}; {comment}"


def _common(values: Iterable[Any]) -> str:
    found = set(values)
    return str(found.pop()) if len(found) == 1 else "Dynamic"


def card(target: Path, base_version: str, *, merged_from: Sequence[Contents] = ()) -> dict[str, str]:
    """The ``modelspec.*`` entries of a LoRA that a tool has made.

    Args:
        target: Its file.
        base_version: Which model it is for.
        merged_from: The files that it was made from.
    """
    sources = ", ".join(contents.title for contents in merged_from) or None
    facts = ModelFacts(kind="lora", base_model_version=base_version, output_name=target.stem)
    return modelspec(MetadataOptions(metadata_merged_from=sources), facts, timestamp=now())


def base_version_of(files: Sequence[Contents], *, v2: bool = False) -> str:
    """The version of the model that the files are for; SD1, or SD2 with ``v2``, where none of them tells."""
    known = [contents.base_version for contents in files if contents.base_version]
    if len(set(known)) > 1:
        log.warning("the files were made for %s; the result says %s", " and ".join(sorted(set(known))), known[0])
    return known[0] if known else "sd_v2" if v2 else "sd_v1"


def write_lora(
    target: Path, changes: "Mapping[str, LowRank]", metadata: Mapping[str, str], dtype: "torch.dtype"
) -> None:
    """Write a LoRA file, whole or not at all; what had the name is replaced.

    Args:
        target: Final name; the suffix chooses the format.
        changes: The change of each layer.
        metadata: Its metadata; hashes are added.
        dtype: The number format of the weights.

    Raises:
        UserError: A value is not finite in that format, or the place cannot be written to.
    """
    import torch

    tensors: dict[str, Tensor] = {}
    for name, change in changes.items():
        tensors |= {
            name + DOWN: change.down.contiguous(),
            name + UP: change.up.contiguous(),
            name + ALPHA: torch.tensor(change.alpha),
        }
    if target.exists():
        log.warning("%s exists and is replaced", target)
    write_network(target, tensors, metadata, dtype)
    log.info("wrote %s: %d modules", target, len(changes))
