"""What the header of a network file tells, and what is wrong with it, before torch is imported.

Torch files have no header: they are looked at in the same way once they are read.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Final, TypeVar

from library.errors import Problem, UserError, problems_of, raise_if_any
from library.files import read_metadata
from library.models.variant import TEXT_WIDTHS, Family
from library.options import near_remedy
from networks.adapter_files import ALPHA, DOWN, UP, Shape, is_pointwise_shape, require_lora, shapes_in_file

Made = TypeVar("Made")

FAMILIES: Final[Mapping[str, Family]] = {"sd_v1": "sd1", "sd_v1_v": "sd1", "sd_v2": "sd2", "sd_v2_v": "sd2"}
"""Kinds of models by the names that files have for them."""
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
        if stated in FAMILIES:
            return stated
        widths = {
            shape[1] for name, shape in self.shapes.items() if name.endswith(_READS_TEXT + DOWN) and len(shape) == 2
        }
        return {TEXT_WIDTHS["sd1"]: "sd_v1", TEXT_WIDTHS["sd2"]: "sd_v2"}.get(next(iter(widths), 0))

    @property
    def family(self) -> Family | None:
        """SD1 or SD2, where that is known."""
        return FAMILIES[self.base_version] if self.base_version else None

    @property
    def title(self) -> str:
        """What other files call it."""
        return self.metadata.get("modelspec.title") or self.path.stem


def of_each(make: Callable[[Path], Made], paths: Iterable[Path]) -> list[Made]:
    """What ``make`` makes of each file.

    Raises:
        UserError: For all files that it refuses.
    """
    made: list[Made] = []
    raise_if_any(problems_of(partial(lambda path: made.append(make(path)), path) for path in paths))
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
    if stated not in (*FAMILIES, "None"):
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
