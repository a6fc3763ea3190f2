"""Options that the tools for network files share. Imports nothing heavy."""

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from library.errors import Problem, UserError, first_line
from library.files import TORCH_SUFFIXES
from library.options import option

PRECISIONS: Final = ("float", "fp16", "bf16")
_SUFFIXES: Final = (".safetensors", *TORCH_SUFFIXES)


def required(value: object, flag: str, example: str) -> list[Problem]:
    """A problem where an option that a tool needs was not given."""
    return [] if value is not None else [Problem(f"{flag} is missing", flag, f"Write {flag} {example}.")]


def network_target_problems(path: Path | None) -> list[Problem]:
    """What stands against the name of a network file that is to be written."""
    if path is None:
        return required(path, "--save_to", "out.safetensors")
    if path.is_dir():
        return [Problem(f"{path} is a folder", "--save_to", "Give the name of a file.")]
    if path.suffix.lower() not in _SUFFIXES:
        what = f"{path.name} does not say which kind of file it is"
        return [Problem(what, "--save_to", "Let the name end in .safetensors, or in .pt or .ckpt for a torch file.")]
    return []


@dataclass(frozen=True, kw_only=True, slots=True)
class NetworkResultOptions:
    """Result."""

    save_to: Path | None = option(
        None,
        metavar="FILE",
        help="File to write: .safetensors, or a torch file (.pt, .ckpt), which has no place for metadata.",
    )

    def problems(self) -> list[Problem]:
        """What stands against the name."""
        return network_target_problems(self.save_to)


@dataclass(frozen=True, kw_only=True, slots=True)
class SavePrecisionOptions:
    """Number format."""

    save_precision: str | None = option(
        None, choices=PRECISIONS, help="Number format of the result. When absent: float (32 bits)."
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceOptions:
    """Device."""

    device: str | None = option(None, metavar="NAME", help="Where to compute, such as cuda. When absent: the CPU.")


@dataclass(frozen=True, kw_only=True, slots=True)
class CardOptions:
    """Metadata."""

    no_metadata: bool = option(
        False, help="Leave out the model card (modelspec.*); what other programs need to load the file stays."
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class MergedOptions:
    """Networks to be merged."""

    models: tuple[Path, ...] | None = option(None, metavar="FILE", help="Network files to be merged.")
    ratios: tuple[float, ...] | None = option(
        None, metavar="X", help="Strength of each of them, in the same order; may be negative. When absent: 1 for each."
    )
    precision: str = option(
        "float",
        choices=PRECISIONS,
        help="Number format that weights are rounded to before they are merged; sums are always made in 32 bits.",
    )

    def problems(self) -> list[Problem]:
        """Missing files, and a wrong number of ratios."""
        found = required(self.models, "--models", "a.safetensors b.safetensors")
        if self.models and self.ratios is not None and len(self.ratios) != len(self.models):
            what = f"--ratios has {len(self.ratios)} values, and --models {len(self.models)}"
            found.append(Problem(what, "--ratios", "Give one ratio for each file, in the same order."))
        return found

    @property
    def paths(self) -> tuple[Path, ...]:
        """The files."""
        assert self.models is not None, "asked for with the options"
        return self.models

    @property
    def factors(self) -> tuple[float, ...]:
        """The strength of each file."""
        return self.ratios or (1.0,) * len(self.paths)


def usable_device(name: str | None) -> str:
    """The device that ``--device`` names.

    Raises:
        UserError: There is none of that name.
    """
    import torch

    device = name or "cpu"
    try:
        torch.zeros(1, device=device).cpu()
    # torch without CUDA says so by an assertion.
    except (RuntimeError, AssertionError) as error:
        what = f"{device} cannot be used: {first_line(error)}"
        raise UserError(what, where="--device", remedy="Leave it out to compute on the CPU.") from error
    return device
