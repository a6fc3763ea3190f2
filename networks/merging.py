"""Merge LoRA files with each other: the changes of each layer are added, then kept whole or approximated."""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

from library.errors import Problem, problems_of, raise_if_any
from networks.lora_contents import Contents, check_lora, check_together, describe, of_each
from networks.lora_files import LoRAFile, base_version_of, card, read_lora, summary, write_lora
from networks.tool_options import MergedOptions

if TYPE_CHECKING:
    from networks.low_rank_math import LowRank

log = logging.getLogger(__name__)

Part = tuple["LowRank", float]
Kept = tuple[float, float]
"""Squared Frobenius norms of what is kept of a change, and of the whole."""
_NEARLY_ALL: Final = 0.995


def check_sources(paths: Sequence[Path], *, v2: bool = False, same_ranks: bool = False) -> list[Contents]:
    """What the headers of LoRA files that are to be merged tell.

    Args:
        paths: The files.
        v2: Whether they are said to be for SD2.
        same_ranks: Whether they must have equal ranks.

    Raises:
        UserError: They are damaged, no LoRA, or cannot be merged with each other; all problems together.
    """
    sources = of_each(partial(describe, flag="--models"), paths)
    raise_if_any(problems_of(partial(check_lora, contents) for contents in sources))
    check_together(sources, same_ranks=same_ranks)
    raise_if_any([problem for contents in sources for problem in _v2_problems(contents, v2=v2)])
    return sources


def _v2_problems(contents: Contents, *, v2: bool) -> list[Problem]:
    if not v2 or contents.family != "sd1":
        return []
    what = f"{contents.path.name} was made for Stable Diffusion 1.x, but --v2 is given"
    return [Problem(what, str(contents.path), "Leave out --v2.")]


def read_sources(options: MergedOptions, *, same_ranks: bool = False) -> list[LoRAFile]:
    """Read the files to be merged.

    Raises:
        UserError: As :func:`check_sources`, for files whose headers did not tell.
    """
    files = of_each(read_lora, options.paths)
    check_together([file.contents for file in files], same_ranks=same_ranks)
    return files


def merge_networks(
    options: MergedOptions,
    target: Path,
    *,
    v2: bool,
    save_precision: str | None,
    concat: bool,
    shuffle: bool,
    has_card: bool,
) -> None:
    """Merge LoRA files and write the result, whose every change is the sum of theirs.

    Args:
        options: The files and their strengths.
        target: The file to write.
        v2: Whether the model is an SD2, where the files do not tell.
        save_precision: Number format of the result; that of ``--precision`` when absent.
        concat: Keep the sum whole; its nearest approximation of the files' own rank otherwise.
        shuffle: Put the ranks in another order.
        has_card: Whether the file gets a model card.

    Raises:
        UserError: The files cannot be merged, or the result cannot be written.
    """
    from library.randomness import torch_generator
    from networks.low_rank_math import best_of_rank, exact_sum, shuffled

    files = read_sources(options, same_ranks=not concat)

    def merged(name: str, parts: Sequence[Part]) -> "tuple[LowRank, Kept]":
        whole = exact_sum(parts)
        change, kept = (whole, (1.0, 1.0)) if concat else best_of_rank(whole, parts[0][0].rank)
        return (shuffled(change, torch_generator(0, "shuffle", name)) if shuffle else change), kept

    advice = "--concat keeps all of it, in a larger file"
    changes = each_layer(
        files, merged, precision=options.precision, strength=lambda _, number: options.factors[number], advice=advice
    )
    sources = [file.contents for file in files]
    precision = save_precision or options.precision
    write_merged(target, changes, sources, v2=v2, precision=precision, has_card=has_card)


def each_layer(
    files: Sequence[LoRAFile],
    merge: "Callable[[str, Sequence[Part]], tuple[LowRank, Kept]]",
    *,
    precision: str,
    strength: Callable[[str, int], float],
    advice: str,
    device: str = "cpu",
) -> "dict[str, LowRank]":
    """The merged change of every layer; says how much of the sum is kept.

    Args:
        files: The files.
        merge: Makes one change of the module's parts, and says how much of their sum it keeps.
        precision: What the weights are rounded to first.
        strength: Strength of a module, by its name and the number of its file.
        advice: How to keep more.
        device: Where to compute.
    """
    import torch
    from tqdm import tqdm

    from library.models.precision import DTYPES

    rounded = DTYPES[precision]
    changes: dict[str, LowRank] = {}
    kept: dict[str, Kept] = {}
    for name in tqdm(sorted({name for file in files for name in file.changes}), desc="merging"):
        parts = [
            (file.changes[name].to(rounded).to(torch.float32, device), strength(name, number))
            for number, file in enumerate(files)
            if name in file.changes
        ]
        changes[name], kept[name] = merge(name, parts)
    report_kept(kept, advice)
    return changes


def report_kept(kept: "Mapping[str, Kept]", advice: str) -> None:
    """Say how much of all changes is kept, of which the least, and how to keep more where it is not nearly all."""
    shares = {name: math.sqrt(part / whole) for name, (part, whole) in kept.items() if whole > 0}
    if not shares:
        return
    part, whole = (sum(values) for values in zip(*kept.values(), strict=True))
    share, least = math.sqrt(part / whole), min(shares, key=lambda name: shares[name])
    log.info(
        "%.2f%% of the change is kept (Frobenius norm); least in %s: %.2f%%", 100 * share, least, 100 * shares[least]
    )
    if share < _NEARLY_ALL:
        log.info("%s", advice)


def write_merged(
    target: Path,
    changes: "dict[str, LowRank]",
    sources: Sequence[Contents],
    *,
    v2: bool = False,
    precision: str | None,
    has_card: bool,
) -> None:
    """Write what LoRA files were merged to.

    Args:
        target: The file to write.
        changes: The merged changes.
        sources: The files.
        v2: Whether the model is an SD2, where the files do not tell.
        precision: Number format of the result; float when absent.
        has_card: Whether the file gets a model card.

    Raises:
        UserError: A value is not finite, or the place cannot be written to.
    """
    from library.models.precision import DTYPES

    version = base_version_of(sources, v2=v2)
    metadata = summary(changes, version) | (card(target, version, merged_from=sources) if has_card else {})
    write_lora(target, changes, metadata, DTYPES[precision or "float"])
