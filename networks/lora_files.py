"""LoRA files as the tools read, compare and write them.

What is wrong with a file is told from its header where it has one, before torch is imported; torch files are looked at
once they are read.
"""

import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

from library.errors import Problem, UserError, raise_if_any
from library.files import read_metadata, read_tensors
from library.models.variant import TEXT_WIDTHS, Family
from library.options import near_remedy
from library.training.clock import now
from library.training.metadata import ModelFacts, modelspec
from library.training.options import MetadataOptions
from networks.adapter_files import (
    ALPHA,
    DOWN,
    UP,
    Shape,
    is_pointwise_shape,
    lora_dims,
    require_lora,
    shapes_in_file,
    write_network,
)

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from networks.low_rank_math import LowRank

log = logging.getLogger(__name__)

Made = TypeVar("Made")

LORA: Final = "networks.lora"
_VERSIONS: Final[Mapping[str, Family]] = {"sd_v1": "sd1", "sd_v1_v": "sd1", "sd_v2": "sd2", "sd_v2_v": "sd2"}
_FAMILY_NAMES: Final[Mapping[Family, str]] = {"sd1": "Stable Diffusion 1.x", "sd2": "Stable Diffusion 2.x"}
_READS_TEXT: Final = "_attn2_to_k"


@dataclass(frozen=True, slots=True)
class Contents:
    """What is known of a network file: its shapes (none where only reading it tells) and its metadata.

    Attributes:
        path: The file.
        shapes: Shapes of its tensors by name.
        metadata: Its metadata.
    """

    path: Path
    shapes: Mapping[str, Shape]
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def base_version(self) -> str | None:
        """``sd_v1``, ``sd_v1_v``, ``sd_v2`` or ``sd_v2_v``: what it says, or what its widths tell."""
        stated = self.metadata.get("ss_base_model_version")
        if stated in _VERSIONS:
            return stated
        widths = {
            shape[1] for name, shape in self.shapes.items() if name.endswith(_READS_TEXT + DOWN) and len(shape) == 2
        }
        return {TEXT_WIDTHS["sd1"]: "sd_v1", TEXT_WIDTHS["sd2"]: "sd_v2"}.get(next(iter(widths), 0))

    @property
    def family(self) -> Family | None:
        """SD1 or SD2, where that is known."""
        return _VERSIONS[self.base_version] if self.base_version else None

    @property
    def title(self) -> str:
        """What other files call it."""
        return self.metadata.get("modelspec.title") or self.path.stem


@dataclass(frozen=True, slots=True)
class LoRAFile:
    """A LoRA file that was read.

    Attributes:
        contents: What it says of itself.
        changes: The change of each layer, by the module's name.
    """

    contents: Contents
    changes: "dict[str, LowRank]"


# --- what is wrong with files


def collected(checks: Iterable[Callable[[], object]]) -> list[Problem]:
    """What ``checks`` refuse, all together."""
    found: list[Problem] = []
    for check in checks:
        try:
            check()
        except UserError as error:
            found += error.problems
    return found


def of_each(make: Callable[[Path], Made], paths: Iterable[Path]) -> list[Made]:
    """What ``make`` makes of each file.

    Raises:
        UserError: For all files that it refuses.
    """
    made: list[Made] = []
    raise_if_any(collected(partial(lambda path: made.append(make(path)), path) for path in paths))
    return made


def describe(path: Path, flag: str) -> Contents:
    """What the header of a network file tells.

    Raises:
        UserError: The file is not there or damaged.
    """
    if not path.is_file():
        what = f"{path} is a folder" if path.is_dir() else f"file not found: {path}"
        remedy = "Give a network file." if path.is_dir() else near_remedy(path)
        raise UserError(what, where=flag, remedy=remedy)
    return Contents(path, shapes_in_file(path), read_metadata(path))


def check_lora(contents: Contents) -> None:
    """Refuse a file that is no LoRA for SD1 or SD2, or has parts that are none of a LoRA.

    Raises:
        UserError: Saying what it is, or naming the parts.
    """
    where, shapes = str(contents.path), contents.shapes
    if not shapes:
        return
    require_lora(shapes, where=where, remedy="Give a LoRA file for Stable Diffusion 1.x or 2.x.")
    stated = contents.metadata.get("ss_base_model_version", "None")
    if stated not in (*_VERSIONS, "None"):
        raise UserError(
            f"{contents.path.name} was made for another kind of model: {stated}",
            where=where,
            remedy="Give a LoRA file for Stable Diffusion 1.x or 2.x.",
        )
    foreign = sorted(name for name in shapes if not name.endswith((DOWN, UP, ALPHA)))
    _refuse(
        foreign, "are no parts of a LoRA", "Such networks work beside the model only, in programs that know them", where
    )
    unpaired = sorted(
        {name for name in shapes if name.endswith(DOWN) and not _fits(shapes, name.removesuffix(DOWN))}
        | {name for name in shapes if name.endswith(UP) and name.removesuffix(UP) + DOWN not in shapes}
    )
    _refuse(unpaired, "have no counterpart of the same rank", "The file is damaged or incomplete: save it again", where)


def _fits(shapes: Mapping[str, Shape], name: str) -> bool:
    down, up = shapes[name + DOWN], shapes.get(name + UP, ())
    return len(down) in (2, 4) and len(up) in (2, 4) and down[0] == up[1] > 0


def _refuse(names: Sequence[str], what: str, remedy: str, where: str) -> None:
    if names:
        raise UserError(f"{len(names)} tensors {what}, for instance {names[0]}", where=where, remedy=f"{remedy}.")


def check_together(files: Sequence[Contents], *, same_ranks: bool) -> None:
    """Refuse files that cannot be merged with each other.

    Raises:
        UserError: They change different models, or have different ranks though ``same_ranks`` asks for equal ones.
    """
    for first, second in combinations(files, 2):
        _check_pair(first, second, same_ranks=same_ranks)


def _check_pair(first: Contents, second: Contents, *, same_ranks: bool) -> None:
    names, where = f"{first.path.name} and {second.path.name}", f"{first.path}, {second.path}"
    apart = "Merge files that were made for the same kind of model."
    if first.family and second.family and first.family != second.family:
        raise UserError(
            f"{names} are for different models: {first.base_version} and {second.base_version}",
            where=where,
            remedy=apart,
        )
    shared = sorted(first.shapes.keys() & second.shapes.keys())
    layers = [name.removesuffix(DOWN) for name in shared if name.endswith(DOWN)]
    for name in layers:
        one, other = _layer(first.shapes, name), _layer(second.shapes, name)
        if one != other:
            raise UserError(
                f"{names} change layers of different sizes, for instance {name}: "
                f"{one[1]} inputs and {one[0]} outputs, {other[1]} inputs and {other[0]} outputs",
                where=where,
                remedy=apart,
            )
    ranks = {name: (first.shapes[name + DOWN][0], second.shapes[name + DOWN][0]) for name in layers}
    differing = [name for name in layers if ranks[name][0] != ranks[name][1]]
    if same_ranks and differing:
        name = differing[0]
        raise UserError(
            f"{names} have different ranks in {len(differing)} modules, for instance {ranks[name][0]} and "
            f"{ranks[name][1]} in {name}",
            where=where,
            remedy="Add --concat, which adds the ranks up and loses nothing, or use networks/svd_merge_lora.py with "
            "--new_rank.",
        )


def _layer(shapes: Mapping[str, Shape], name: str) -> tuple[int, int, Shape]:
    """Outputs, inputs and kernel of a layer; a 1x1 convolution counts as linear."""
    down, up = shapes[name + DOWN], shapes[name + UP]
    return up[0], down[1], () if is_pointwise_shape(down) else down[2:]


def family_problem(contents: Contents, family: Family, flag: str) -> list[Problem]:
    """A problem where a file was made for another model than ``flag`` gives."""
    if contents.family in (None, family):
        return []
    what = f"{contents.path.name} was made for {contents.base_version}, and {flag} is {_FAMILY_NAMES[family]}"
    return [Problem(what, str(contents.path), "Use files that were made for the same kind of model.")]


# --- reading


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


# --- writing


def summary(changes: "Mapping[str, LowRank]", base_version: str) -> dict[str, str]:
    """The metadata that other programs need to load a LoRA with these changes."""
    pointwise = {name: change for name, change in changes.items() if is_pointwise_shape(tuple(change.down.shape))}
    others = [change for name, change in changes.items() if name not in pointwise]
    main = list(pointwise.values()) or others
    record = {
        "ss_v2": str(_VERSIONS[base_version] == "sd2"),
        "ss_base_model_version": base_version,
        "ss_network_module": LORA,
        "ss_network_dim": _common(change.rank for change in main),
        "ss_network_alpha": _common(change.alpha for change in main),
    }
    if len({change.rank for change in others}) == len({change.alpha for change in others}) == 1:
        record["ss_network_args"] = json.dumps({"conv_dim": others[0].rank, "conv_alpha": others[0].alpha})
    return record


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
