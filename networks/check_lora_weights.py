"""Show what is in a LoRA file, module by module, and whether its numbers are sound.

Usage, from anywhere: ``python networks/check_lora_weights.py LORA.safetensors``.
"""

import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from library.errors import run_script  # noqa: E402
from library.files import read_tensors  # noqa: E402
from library.option_positions import missing_positions, name_positions, split_positions  # noqa: E402
from library.options import option, parse_options  # noqa: E402
from networks.adapter_files import ALPHA, DOWN, UP, require_lora  # noqa: E402
from networks.lora_contents import describe  # noqa: E402

if TYPE_CHECKING:
    from torch import Tensor

    from library.errors import Problem

DESCRIPTION = "Show rank, alpha, shapes and sizes of the numbers of every module in a LoRA file."
FILE: Final = "file"
_EXIT_UNSOUND: Final = 1
_HEADER: Final = ("module", "rank", "alpha", "part", "shape", "mean |x|", "max |x|", "min |x|", "")


@dataclass(frozen=True, kw_only=True, slots=True)
class FileOptions:
    """Network."""

    file: Path | None = option(None, metavar="FILE", help="LoRA file.")
    show_all_keys: bool = option(
        False, help="Also list the tensors that are no weights of modules. -s is short for it."
    )

    def problems(self) -> "list[Problem]":
        """A missing file."""
        return missing_positions({FILE: self.file})


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """The tool's options."""

    source: FileOptions


def main(argv: list[str]) -> int:
    """Print the table; returns the exit code, 1 where something is missing or not finite."""
    words, rest = split_positions(Options, ["--show_all_keys" if word == "-s" else word for word in argv])
    given = [*name_positions(words, [FILE]), *rest]
    options = parse_options(Options, given, prog=f"{Path(__file__).name} {FILE}", description=DESCRIPTION)
    path = options.source.file
    assert path is not None, "asked for with the options"
    remedy = "Give a LoRA file for Stable Diffusion 1.x or 2.x."
    if shapes := describe(path, FILE).shapes:
        require_lora(shapes, where=str(path), remedy=remedy)
    tensors = read_tensors(path).tensors
    require_lora(tensors, where=str(path), remedy=remedy)
    broken = _print_modules(tensors)
    if options.source.show_all_keys:
        _print_others(tensors)
    if broken:
        print(f"{broken} tensors are missing or hold values that are not finite")
    return _EXIT_UNSOUND if broken else 0


def _print_modules(tensors: "Mapping[str, Tensor]") -> int:
    """Print a table of the modules; returns how many of its tensors are missing or not finite."""
    names = sorted({name.removesuffix(part) for name in tensors for part in (DOWN, UP) if name.endswith(part)})
    rows = [row for name in names for row in _rows(name, tensors)]
    print(f"number of LoRA modules: {len(names)}")
    widths = [max(len(row[column]) for row in (_HEADER, *rows)) for column in range(len(_HEADER))]
    for row in (_HEADER, *rows):
        print("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())
    return sum(row[-1] != "" for row in rows)


def _rows(name: str, tensors: "Mapping[str, Tensor]") -> "Iterable[tuple[str, ...]]":
    down, up, alpha = (tensors.get(name + part) for part in (DOWN, UP, ALPHA))
    rank = "" if down is None else str(down.shape[0])
    shown = "none" if alpha is None else f"{float(alpha):g}"
    for part, tensor in (("down", down), ("up", up)):
        figures = ("missing", "", "", "", "incomplete") if tensor is None else _figures(tensor)
        yield (name, rank, shown, part, *figures) if part == "down" else ("", "", "", part, *figures)


def _figures(tensor: "Tensor") -> tuple[str, ...]:
    """Shape and sizes of the finite numbers of a tensor, and what is wrong with the others."""
    import torch

    sizes = tensor.float().abs().flatten()
    finite = sizes[torch.isfinite(sizes)]
    shown = (
        [f"{float(value):.6g}" for value in (finite.mean(), finite.max(), finite.min())] if len(finite) else [""] * 3
    )
    kinds = {"NaN": int(torch.isnan(sizes).sum()), "Inf": int(torch.isinf(sizes).sum())}
    wrong = ", ".join(f"{count} {kind}" for kind, count in kinds.items() if count)
    return ("x".join(map(str, tensor.shape)), *shown, wrong)


def _print_others(tensors: "Mapping[str, Tensor]") -> None:
    others = sorted(name for name in tensors if not name.endswith((DOWN, UP)))
    print(f"other keys: {len(others)}")
    for name in others:
        tensor = tensors[name]
        value = f" {float(tensor):g}" if tensor.numel() == 1 else ""
        print(f"{name}  {tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}{value}")


if __name__ == "__main__":
    run_script(main)
