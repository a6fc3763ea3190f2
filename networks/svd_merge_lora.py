"""Merge LoRA files of any ranks into one of a chosen rank, the nearest there is to their sum.

Usage, from anywhere: ``python networks/svd_merge_lora.py --models A.safetensors B.safetensors --ratios 0.8 0.5
--new_rank 16 --save_to OUT.safetensors``.
"""

import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from library.errors import Problem, run_script  # noqa: E402
from library.options import option, parse_options  # noqa: E402
from library.runtime import set_up_logging  # noqa: E402
from library.runtime_options import ConsoleOptions  # noqa: E402
from networks.adapter_files import is_pointwise_shape  # noqa: E402
from networks.lora_block_weights import block_weight_problems, left_out, parse_block_weights, weight_of  # noqa: E402
from networks.merging import Kept, Part, check_sources, each_layer, read_sources, write_merged  # noqa: E402
from networks.tool_options import (  # noqa: E402
    PRECISIONS,
    CardOptions,
    DeviceOptions,
    MergedOptions,
    NetworkResultOptions,
    usable_device,
)

if TYPE_CHECKING:
    from networks.low_rank_math import LowRank

log = logging.getLogger("svd_merge_lora")

DESCRIPTION = (
    "Merge LoRA files for Stable Diffusion 1.x or 2.x, which may have different ranks, into one of a chosen rank: the "
    "nearest that there is to their sum."
)


@dataclass(frozen=True, kw_only=True, slots=True)
class RankOptions:
    """Ranks of the result, and strengths by block."""

    new_rank: int = option(4, minimum=1, help="Rank of the result; its alpha is the same.")
    new_conv_rank: int | None = option(
        None, minimum=1, metavar="N", help="Rank of convolutions larger than 1x1. When absent: --new_rank."
    )
    lbws: tuple[str, ...] | None = option(
        None,
        metavar="LIST",
        help="Strengths by block, a JSON list for each file: 17 (BASE, IN01, IN02, IN04, IN05, IN07, IN08, MID, OUT03 "
        "to OUT11) or 26 numbers (BASE, IN00 to IN11, MID, OUT00 to OUT11). BASE is the text encoder.",
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class SavePrecisionOptions:
    """Number format."""

    save_precision: str | None = option(
        None, choices=PRECISIONS, help="Number format of the result. When absent: --precision."
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """The tool's options."""

    merged: MergedOptions
    ranks: RankOptions
    result: NetworkResultOptions
    saved: SavePrecisionOptions
    device: DeviceOptions
    card: CardOptions

    def problems(self) -> list[Problem]:
        """Block weights that are none, or too many."""
        return block_weight_problems(self.ranks.lbws, len(self.merged.models or ()))


def main(argv: list[str]) -> int:
    """Merge; returns the exit code."""
    set_up_logging(ConsoleOptions())
    options = parse_options(Options, argv, prog=Path(__file__).name, description=DESCRIPTION)
    check_sources(options.merged.paths)
    _merge(options)
    return 0


def _merge(options: Options) -> None:
    from networks.low_rank_math import best_of_rank, exact_sum

    assert options.result.save_to is not None, "asked for with the options"
    device = usable_device(options.device.device)
    files = read_sources(options.merged)
    weights = [parse_block_weights(text) for text in options.ranks.lbws or ()]
    for file, by_block in zip(files, weights, strict=False):
        if missed := left_out(file.changes, by_block):
            log.warning(
                "%s: %d modules are in blocks that 17 weights do not name, and are left out, for instance %s; give 26",
                file.contents.path.name,
                len(missed),
                missed[0],
            )
    new_rank, conv_rank = options.ranks.new_rank, options.ranks.new_conv_rank or options.ranks.new_rank

    def merged(_name: str, parts: Sequence[Part]) -> "tuple[LowRank, Kept]":
        whole = exact_sum(parts)
        return best_of_rank(whole, new_rank if is_pointwise_shape(tuple(whole.down.shape)) else conv_rank)

    def strength(name: str, number: int) -> float:
        ratio = options.merged.factors[number]
        return ratio * weight_of(name, weights[number]) if weights else ratio

    changes = each_layer(
        files,
        merged,
        precision=options.merged.precision,
        strength=strength,
        advice="a larger --new_rank keeps more",
        device=device,
    )
    write_merged(
        options.result.save_to,
        changes,
        [file.contents for file in files],
        precision=options.saved.save_precision or options.merged.precision,
        has_card=not options.card.no_metadata,
    )


if __name__ == "__main__":
    run_script(main)
