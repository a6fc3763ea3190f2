"""Give a LoRA file another rank, fixed or chosen for each layer, with as little loss as there can be.

Usage, from anywhere: ``python networks/resize_lora.py --model LORA.safetensors --new_rank 8 --save_to
OUT.safetensors``.
"""

import json
import logging
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from library.errors import Problem, run_script  # noqa: E402
from library.options import option, parse_options  # noqa: E402
from library.runtime import set_up_logging  # noqa: E402
from library.runtime_options import ConsoleOptions  # noqa: E402
from networks.lora_contents import check_lora, describe  # noqa: E402
from networks.lora_files import large_kernels, read_lora, with_remark, write_lora  # noqa: E402
from networks.merging import Kept, report_kept  # noqa: E402
from networks.tool_options import (  # noqa: E402
    DeviceOptions,
    NetworkResultOptions,
    SavePrecisionOptions,
    required,
    usable_device,
)

if TYPE_CHECKING:
    from networks.low_rank_math import Decomposition, DynamicMethod, LowRank

log = logging.getLogger("resize_lora")

DESCRIPTION = (
    "Give a LoRA file for Stable Diffusion 1.x or 2.x another rank: the same for all layers, or for each the one that "
    "a target needs."
)


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelOptions:
    """Network."""

    model: Path | None = option(None, metavar="FILE", help="Network file whose rank is changed.")

    def problems(self) -> list[Problem]:
        """A missing file."""
        return required(self.model, "--model", "lora.safetensors")


@dataclass(frozen=True, kw_only=True, slots=True)
class RankOptions:
    """New ranks."""

    new_rank: int = option(
        4, minimum=1, help="New rank; with --dynamic_method the largest. A larger one than before is filled with zeros."
    )
    new_conv_rank: int | None = option(
        None,
        minimum=1,
        metavar="N",
        help="New rank of all convolutions, those of 1x1 included. When absent: --new_rank.",
    )
    dynamic_method: str | None = option(
        None,
        choices=("sv_ratio", "sv_fro", "sv_cumulative"),
        help="How the rank of each layer is chosen: sv_ratio keeps the singular values above the largest divided by "
        "--dynamic_param, sv_fro that share of the Frobenius norm, sv_cumulative that share of the sum; and one more.",
    )
    dynamic_param: float | None = option(
        None,
        above=0,
        metavar="X",
        help="Target of --dynamic_method: for sv_ratio a ratio of at least 1, otherwise a share of at most 1.",
    )
    verbose: bool = option(False, help="Say for every layer what is kept.")

    def problems(self) -> list[Problem]:
        """A method and a target that do not go together."""
        if (self.dynamic_method is None) != (self.dynamic_param is None):
            what = "--dynamic_method and --dynamic_param belong together"
            return [Problem(what, "--dynamic_param", "Give both, such as --dynamic_method sv_fro --dynamic_param 0.9.")]
        if self.dynamic_method == "sv_ratio" and self.dynamic_param is not None and self.dynamic_param < 1:
            what = f"a ratio of singular values is at least 1, not {self.dynamic_param}"
            return [Problem(what, "--dynamic_param", "Give for instance 2, to keep those above half the largest.")]
        if self.dynamic_method != "sv_ratio" and self.dynamic_param is not None and self.dynamic_param > 1:
            what = f"a share to keep is at most 1, not {self.dynamic_param}"
            return [Problem(what, "--dynamic_param", "Give for instance 0.9.")]
        return []


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """The tool's options."""

    source: ModelOptions
    ranks: RankOptions
    result: NetworkResultOptions
    saved: SavePrecisionOptions
    device: DeviceOptions


def main(argv: list[str]) -> int:
    """Change the rank; returns the exit code."""
    set_up_logging(ConsoleOptions())
    options = parse_options(Options, argv, prog=Path(__file__).name, description=DESCRIPTION)
    assert options.source.model is not None, "asked for with the options"
    check_lora(describe(options.source.model, "--model"))
    _resize(options, options.source.model)
    return 0


def _resize(options: Options, source: Path) -> None:
    import torch
    from tqdm import tqdm

    from library.models.precision import DTYPES

    assert options.result.save_to is not None, "asked for with the options"
    device = usable_device(options.device.device)
    file = read_lora(source)
    changes: dict[str, LowRank] = {}
    kept: dict[str, Kept] = {}
    for name, change in tqdm(file.changes.items(), desc="resizing"):
        changes[name], kept[name] = _resized(change.to(torch.float32, device), options.ranks, name)
    report_kept(kept, "a larger --new_rank keeps more")
    metadata = _metadata(file.contents.metadata, file.changes, changes, options.ranks)
    write_lora(options.result.save_to, changes, metadata, DTYPES[options.saved.save_precision or "float"])


def _resized(change: "LowRank", ranks: RankOptions, name: str) -> "tuple[LowRank, Kept]":
    """The change in its new rank, with the strength for each rank that it had."""
    from networks.low_rank_math import Decomposition, dynamic_rank, shaped_like

    largest = ranks.new_conv_rank or ranks.new_rank if change.down.ndim == 4 else ranks.new_rank
    found = Decomposition.of_product(change.up.flatten(1), change.down.flatten(1), at_least=largest)
    rank = min(largest, found.values.numel())
    if ranks.dynamic_method is not None and ranks.dynamic_param is not None:
        rank = min(rank, dynamic_rank(found.values, cast("DynamicMethod", ranks.dynamic_method), ranks.dynamic_param))
    up, down = found.truncated(rank)
    if ranks.verbose:
        log.info("%s: %s", name, _shown(found, rank))
    part, whole = found.kept(rank)
    scale = change.scale
    return shaped_like(change, up, down, alpha=scale * rank), (part * scale**2, whole * scale**2)


def _shown(found: "Decomposition", rank: int) -> str:
    values = found.values
    if float(values[0]) == 0:
        return f"rank {rank}, nothing in it"
    part, whole = found.kept(rank)
    share = float(values[:rank].sum() / values.sum())
    last = float(values[rank - 1])
    ratio = f"{float(values[0]) / last:.1f}" if last > float(values[0]) * 1e-6 else "infinite"
    return f"rank {rank}, sum kept: {share:.1%}, norm kept: {(part / whole) ** 0.5:.1%}, largest/smallest: {ratio}"


def _metadata(
    metadata: Mapping[str, str], before: "Mapping[str, LowRank]", after: "Mapping[str, LowRank]", ranks: RankOptions
) -> dict[str, str]:
    """What the file said of itself, with the new ranks and a remark."""
    old = "/".join(str(rank) for rank in sorted({change.rank for change in before.values()}))
    if ranks.dynamic_method is not None:
        remark = f"Dynamic resize with {ranks.dynamic_method}: {ranks.dynamic_param} from {old}"
        dim = alpha = "Dynamic"
    else:
        remark = f"dimension is resized from {old} to {ranks.new_rank}"
        alphas = {change.alpha for change in after.values() if change.rank == ranks.new_rank}
        dim, alpha = str(ranks.new_rank), str(alphas.pop()) if len(alphas) == 1 else "Dynamic"
    record = {
        "ss_training_comment": with_remark(metadata, remark),
        "ss_network_dim": dim,
        "ss_network_alpha": alpha,
    }
    return {**metadata, **record, **_arguments(metadata, after)}


def _arguments(metadata: Mapping[str, str], after: "Mapping[str, LowRank]") -> dict[str, str]:
    """The network's arguments with the new rank of large convolutions, where the file names the old one."""
    try:
        arguments = json.loads(metadata.get("ss_network_args", ""))
    except ValueError:
        return {}
    large = {(change.rank, change.alpha) for change in large_kernels(after)}
    if not isinstance(arguments, dict) or "conv_dim" not in arguments or not large:
        return {}
    rank, alpha = map(str, large.pop()) if len(large) == 1 else ("Dynamic", "Dynamic")
    return {"ss_network_args": json.dumps({**arguments, "conv_dim": rank, "conv_alpha": alpha})}


if __name__ == "__main__":
    run_script(main)
