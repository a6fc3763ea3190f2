"""Cut a DyLoRA file into LoRA files of smaller ranks, each as strong as that rank was in training.

Usage, from anywhere: ``python networks/extract_lora_from_dylora.py --model DYLORA.safetensors --unit 4 --save_to
OUT.safetensors`` writes ``OUT-0004.safetensors``, ``OUT-0008.safetensors`` and so on.
"""

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from library.errors import Problem, UserError, run_script  # noqa: E402
from library.options import option, parse_options  # noqa: E402
from library.runtime import set_up_logging  # noqa: E402
from library.runtime_options import ConsoleOptions  # noqa: E402
from networks.lora_contents import check_lora, describe  # noqa: E402
from networks.lora_files import read_lora, stated_ranks, with_remark, write_lora  # noqa: E402
from networks.tool_options import NetworkResultOptions, required  # noqa: E402

if TYPE_CHECKING:
    from networks.low_rank_math import LowRank

DESCRIPTION = (
    "Cut a DyLoRA file into LoRA files of smaller ranks: one for each multiple of --unit below its own rank, called "
    "NAME-0004 and so on."
)


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelOptions:
    """Network."""

    model: Path | None = option(None, metavar="FILE", help="DyLoRA file.")
    unit: int | None = option(None, minimum=1, metavar="N", help="Step between the ranks that are written.")

    def problems(self) -> list[Problem]:
        """What is missing."""
        return required(self.model, "--model", "dylora.safetensors") + required(self.unit, "--unit", "4")


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """The tool's options."""

    source: ModelOptions
    result: NetworkResultOptions


def main(argv: list[str]) -> int:
    """Write the smaller files; returns the exit code."""
    set_up_logging(ConsoleOptions())
    options = parse_options(Options, argv, prog=Path(__file__).name, description=DESCRIPTION)
    source, unit, target = options.source.model, options.source.unit, options.result.save_to
    assert source is not None, "asked for with the options"
    assert unit is not None, "asked for with the options"
    assert target is not None, "asked for with the options"
    check_lora(describe(source, "--model"))
    file = read_lora(source)
    largest = max(change.rank for change in file.changes.values())
    if unit >= largest:
        raise UserError(
            f"{source.name} has rank {largest}, and there is no smaller multiple of {unit}",
            where=f"--unit {unit}",
            remedy="Give a smaller step.",
        )
    dtype = next(iter(file.changes.values())).down.dtype
    for rank in range(unit, largest, unit):
        changes = {name: _first_ranks(change, rank) for name, change in file.changes.items()}
        remark = with_remark(file.contents.metadata, f"split from DyLoRA, rank {largest} to {rank}")
        metadata = {**file.contents.metadata, "ss_training_comment": remark, **stated_ranks(changes)}
        write_lora(target.with_name(f"{target.stem}-{rank:04d}{target.suffix}"), changes, metadata, dtype)
    return 0


def _first_ranks(change: "LowRank", rank: int) -> "LowRank":
    """The first ranks of a change, with the strength that they had in training.

    There, the first n of r ranks were multiplied by sqrt(r / n), so alpha / n has to be alpha / r times that.
    """
    from networks.low_rank_math import LowRank

    rank = min(rank, change.rank)
    return LowRank(change.down[:rank], change.up[:, :rank], change.alpha * math.sqrt(rank / change.rank))


if __name__ == "__main__":
    run_script(main)
