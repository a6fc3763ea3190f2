"""Merge LoRA files with each other, or into a model.

Usage, from anywhere: ``python networks/merge_lora.py --models A.safetensors B.safetensors --ratios 0.8 0.5 --save_to
OUT.safetensors``, and ``--sd_model MODEL`` to merge into a model.
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
from networks.merging import check_sources, merge_networks  # noqa: E402
from networks.model_merging import check_merge, merge_into_model, model_target_problems  # noqa: E402
from networks.tool_options import (  # noqa: E402
    PRECISIONS,
    CardOptions,
    MergedOptions,
    network_target_problems,
)

DESCRIPTION = (
    "Merge LoRA files for Stable Diffusion 1.x or 2.x with each other, each with a strength, or LoRA and OFT files "
    "into a model."
)


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelOptions:
    """Model and result."""

    sd_model: str | None = option(
        None,
        metavar="PATH",
        help="Model to merge into: a .safetensors or .ckpt file, or a Diffusers folder. When absent the networks are "
        "merged with each other.",
    )
    v2: bool = option(False, help="The model is Stable Diffusion 2.x.")
    save_to: Path | None = option(
        None, metavar="FILE", help="What to write: the name of a file, or of a folder where the model is one."
    )
    save_precision: str | None = option(
        None,
        choices=PRECISIONS,
        help="Number format of the result. When absent: that of each weight of the model, or --precision where "
        "networks are merged with each other.",
    )

    def problems(self) -> list[Problem]:
        """What stands against the name of the result."""
        if self.sd_model is None or self.save_to is None:
            return network_target_problems(self.save_to)
        return model_target_problems(self.sd_model, self.save_to)


@dataclass(frozen=True, kw_only=True, slots=True)
class RankOptions:
    """Ranks of the result."""

    concat: bool = option(
        False, help="Put the ranks of all networks side by side: exact, and they may differ; the file grows."
    )
    shuffle: bool = option(False, help="Put the ranks of the result in another order; what it does stays the same.")


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """The tool's options."""

    merged: MergedOptions
    model: ModelOptions
    ranks: RankOptions
    card: CardOptions

    def notices(self) -> list[str]:
        """What has no effect."""
        if self.model.sd_model is None or not (self.ranks.concat or self.ranks.shuffle):
            return []
        return ["without effect with --sd_model: --concat and --shuffle"]


def main(argv: list[str]) -> int:
    """Merge; returns the exit code."""
    set_up_logging(ConsoleOptions())
    options = parse_options(Options, argv, prog=Path(__file__).name, description=DESCRIPTION)
    merged, model = options.merged, options.model
    assert model.save_to is not None, "asked for with the options"
    if model.sd_model is not None:
        job = check_merge(model.sd_model, model.save_to, merged, v2=model.v2)
        merge_into_model(job, model.save_to, save_precision=model.save_precision, has_card=not options.card.no_metadata)
        return 0
    check_sources(merged.paths, v2=model.v2, same_ranks=not options.ranks.concat)
    merge_networks(
        merged,
        model.save_to,
        v2=model.v2,
        save_precision=model.save_precision,
        concat=options.ranks.concat,
        shuffle=options.ranks.shuffle,
        has_card=not options.card.no_metadata,
    )
    return 0


if __name__ == "__main__":
    run_script(main)
