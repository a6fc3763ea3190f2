"""Make a LoRA of what a tuned model has learnt: the nearest there is to its difference from the base model.

Usage, from anywhere: ``python networks/extract_lora_from_models.py --model_org BASE.safetensors --model_tuned
TUNED.safetensors --dim 32 --save_to OUT.safetensors``.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from library.errors import Problem, run_script  # noqa: E402
from library.options import option, parse_options  # noqa: E402
from library.runtime import set_up_logging  # noqa: E402
from library.runtime_options import ConsoleOptions  # noqa: E402
from networks.extraction import Ranks, check_models, extract  # noqa: E402
from networks.tool_options import (  # noqa: E402
    PRECISIONS,
    CardOptions,
    DeviceOptions,
    NetworkResultOptions,
    SavePrecisionOptions,
    required,
)

DESCRIPTION = (
    "Make a LoRA of the difference between two Stable Diffusion 1.x or 2.x models, so that the base model with the "
    "LoRA comes near to the tuned one."
)


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelOptions:
    """Models."""

    model_org: str | None = option(None, metavar="PATH", help="Base model: a checkpoint file or a Diffusers folder.")
    model_tuned: str | None = option(None, metavar="PATH", help="Tuned model: a checkpoint file or a Diffusers folder.")
    v2: bool = option(False, help="The models are Stable Diffusion 2.x.")
    v_parameterization: bool = option(
        False, help="The models predict velocity, which the metadata is told; needed where they do not say so."
    )
    load_precision: str | None = option(
        None, choices=PRECISIONS, help="Number format that weights are rounded to first. When absent: as they are."
    )
    sdxl: bool = option(False, help="For SDXL models, which are refused here.")
    load_original_model_to: str | None = option(None, metavar="NAME", help="For SDXL models, which are refused here.")
    load_tuned_model_to: str | None = option(None, metavar="NAME", help="For SDXL models, which are refused here.")

    def problems(self) -> list[Problem]:
        """Missing models, and options for SDXL."""
        found = required(self.model_org, "--model_org", "base.safetensors")
        found += required(self.model_tuned, "--model_tuned", "tuned.safetensors")
        for name in ("sdxl", "load_original_model_to", "load_tuned_model_to"):
            if getattr(self, name):
                what = f"--{name} is for SDXL models, and this program is for Stable Diffusion 1.x and 2.x"
                found.append(Problem(what, f"--{name}", "Leave it out."))
        return found


@dataclass(frozen=True, kw_only=True, slots=True)
class RankOptions:
    """What is extracted."""

    dim: int = option(4, minimum=1, help="Rank; alpha is the same.")
    conv_dim: int | None = option(
        None,
        minimum=1,
        metavar="N",
        help="Rank for 3x3 convolutions, and take in the convolution blocks at all. When absent they are left out.",
    )
    clamp_quantile: float = option(
        0.99,
        above=0,
        maximum=1,
        help="Limit the numbers of each module to this quantile of them, which keeps outliers small and loses some of "
        "the change; 1 limits nothing.",
    )
    min_diff: float = option(
        0.01,
        minimum=0,
        help="Leave out the text encoder where no weight of it differs by more than this.",
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """The tool's options."""

    models: ModelOptions
    ranks: RankOptions
    result: NetworkResultOptions
    saved: SavePrecisionOptions
    device: DeviceOptions
    card: CardOptions


def main(argv: list[str]) -> int:
    """Extract; returns the exit code."""
    set_up_logging(ConsoleOptions())
    options = parse_options(Options, argv, prog=Path(__file__).name, description=DESCRIPTION)
    models, ranks = options.models, options.ranks
    assert models.model_org is not None, "asked for with the options"
    assert models.model_tuned is not None, "asked for with the options"
    assert options.result.save_to is not None, "asked for with the options"
    pair = check_models(
        models.model_org, models.model_tuned, v2=models.v2, v_parameterization=models.v_parameterization
    )
    extract(
        pair,
        options.result.save_to,
        ranks=Ranks(ranks.dim, ranks.conv_dim, quantile=ranks.clamp_quantile, min_diff=ranks.min_diff),
        load_precision=models.load_precision,
        save_precision=options.saved.save_precision,
        device=options.device.device,
        has_card=not options.card.no_metadata,
    )
    return 0


if __name__ == "__main__":
    run_script(main)
