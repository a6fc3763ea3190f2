"""What ``--network_dim``, ``--network_alpha``, ``--network_dropout`` and ``--network_args`` mean to a LoRA network.

LoRA, LoRA-FA and DyLoRA share them, as far as an argument makes sense there. Nothing heavy is imported, so they can be
checked before torch is.
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Final, NamedTuple

from library.errors import UserError, raise_if_any
from networks.arguments import ArgumentReader
from networks.block_weights import BLOCK_COUNT, parse_lr_weights

LORA: Final = "networks.lora"
LORA_FA: Final = "networks.lora_fa"
DYLORA: Final = "networks.dylora"
DEFAULT_DIM: Final = 4
RANK_ARGUMENTS: Final = (
    "conv_dim",
    "conv_alpha",
    "block_dims",
    "block_alphas",
    "conv_block_dims",
    "conv_block_alphas",
)
ARGUMENTS: Final = (
    *RANK_ARGUMENTS,
    "dropout",
    "rank_dropout",
    "module_dropout",
    "down_lr_weight",
    "mid_lr_weight",
    "up_lr_weight",
    "block_lr_zero_threshold",
    "loraplus_lr_ratio",
    "loraplus_unet_lr_ratio",
    "loraplus_text_encoder_lr_ratio",
)
_LORAPLUS: Final = tuple(name for name in ARGUMENTS if name.startswith("loraplus"))
_DROPOUTS: Final = ("dropout", "rank_dropout", "module_dropout")
ARGUMENTS_OF: Final[Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {
        LORA: ARGUMENTS,
        LORA_FA: tuple(name for name in ARGUMENTS if name not in _LORAPLUS),
        DYLORA: ("conv_dim", "conv_alpha", "unit", *_DROPOUTS, *_LORAPLUS),
    }
)
"""The arguments of each module of the family."""
_ELSEWHERE: Final[Mapping[str, Mapping[str, str]]] = MappingProxyType(
    {
        LORA: {"unit": f"it belongs to {DYLORA}."},
        LORA_FA: {
            **dict.fromkeys(_LORAPLUS, "only the up weights are trained, so --learning_rate is theirs already."),
            "unit": f"it belongs to {DYLORA}.",
        },
        DYLORA: {
            name: f"every layer has the same rank and rate here; {LORA} has them by block."
            for name in ARGUMENTS
            if "block" in name or name.endswith("lr_weight")
        },
    }
)


class Rank(NamedTuple):
    """Size of an adapter module: ``W' = W + multiplier * (alpha / dim) * up @ down``."""

    dim: int
    alpha: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Dropouts:
    """Probabilities in [0, 1) to drop a value of the down output, a rank component of a sample, a whole module."""

    neuron: float = 0.0
    rank: float = 0.0
    module: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class LoRASettings:
    """The arguments of a LoRA network, checked.

    Attributes:
        base: Rank of linear layers and 1x1 convolutions.
        conv: Rank of 3x3 convolutions; None leaves the convolution blocks alone.
        blocks: Rank of each of the 25 U-Net blocks instead of ``base``; ``dim`` 0 leaves a block without modules.
        conv_blocks: The same instead of ``conv``.
        dropouts: Dropout probabilities.
        block_lr: Learning-rate weight of each U-Net block, or None for one group.
        loraplus_unet: LoRA+ ratio between the learning rates of up and down in the U-Net, or None.
        loraplus_text_encoder: The same in the text encoder.
        unit: DyLoRA trains the ranks in blocks of this many.
    """

    base: Rank = Rank(DEFAULT_DIM, DEFAULT_DIM)
    conv: Rank | None = None
    blocks: tuple[Rank, ...] | None = None
    conv_blocks: tuple[Rank, ...] | None = None
    dropouts: Dropouts = Dropouts()
    block_lr: tuple[float, ...] | None = None
    loraplus_unet: float | None = None
    loraplus_text_encoder: float | None = None
    unit: int = 1

    @property
    def targets_convolutions(self) -> bool:
        """Whether residual, downsampling and upsampling blocks get modules too."""
        return self.conv is not None or self.conv_blocks is not None


def read_settings(
    dim: int | None,
    alpha: float | None,
    dropout: float | None,
    arguments: Mapping[str, object],
    *,
    module: str = LORA,
    ranks: Collection[int] | None = None,
) -> LoRASettings:
    """Check the arguments of a LoRA network and put them in order.

    Args:
        dim: Rank (``--network_dim``); 4 when None.
        alpha: Alpha (``--network_alpha``); None and 0 mean the rank.
        dropout: Neuron dropout (``--network_dropout``), in [0, 1).
        arguments: The rest by name (``--network_args``), values as text; None counts as not given.
        module: Import path of the network module, a key of :data:`ARGUMENTS_OF`.
        ranks: The ranks of a file that decides instead of ``dim``.

    Raises:
        UserError: With every unknown name, unreadable value and contradiction found.
    """
    reader = ArgumentReader(arguments)
    reader.refuse_unknown(module, ARGUMENTS_OF[module], _ELSEWHERE[module])
    base = _base_rank(reader, dim, alpha)
    settings = LoRASettings(
        base=base,
        conv=_dylora_conv_rank(reader, base) if module == DYLORA else _conv_rank(reader),
        dropouts=_dropouts(reader, dropout),
        block_lr=_block_lr(reader),
        loraplus_unet=_ratio(reader, "loraplus_unet_lr_ratio"),
        loraplus_text_encoder=_ratio(reader, "loraplus_text_encoder_lr_ratio"),
        unit=_unit(reader, [base.dim] if ranks is None else ranks),
    )
    settings = _with_block_ranks(reader, settings, alpha or 0.0)
    raise_if_any(list(dict.fromkeys(reader.problems)))
    return settings


def _unit(reader: ArgumentReader, ranks: Collection[int]) -> int:
    unit = reader.integer("unit")
    if unit is None:
        return 1
    if unit == 0:
        reader.wrong("unit=0 is not possible", "Give a whole number from 1 that divides the rank.")
    elif any(rank % unit for rank in ranks):
        rank = next(rank for rank in ranks if rank % unit)
        reader.wrong(f"unit={unit} does not divide the rank {rank}", "Give a unit that does, for instance 1.")
    return unit or 1


def _dylora_conv_rank(reader: ArgumentReader, base: Rank) -> Rank | None:
    dim, alpha = reader.integer("conv_dim"), reader.number("conv_alpha")
    if alpha is not None and "conv_dim" not in reader.texts:
        reader.wrong("conv_alpha has no ranks to scale", "Give conv_dim as well.")
    if not dim:
        return None
    if dim != base.dim:
        reader.wrong(
            f"conv_dim={dim} is not the rank of the other layers, {base.dim}",
            f"Give conv_dim={base.dim}, or leave it out: {DYLORA} has one rank.",
        )
    return Rank(dim, base.alpha if alpha is None else float(alpha or dim))


def _base_rank(reader: ArgumentReader, dim: int | None, alpha: float | None) -> Rank:
    dim = DEFAULT_DIM if dim is None else dim
    if dim < 1:
        reader.wrong(
            f"a rank of {dim} is not possible", "Give a whole number from 1, for instance 16.", "--network_dim"
        )
    if alpha is not None and not (math.isfinite(alpha) and alpha >= 0):
        reader.wrong(
            f"an alpha of {alpha} is not possible", "Give a positive number, or 0 for the rank.", "--network_alpha"
        )
    return Rank(dim, float(alpha or dim))


def _conv_rank(reader: ArgumentReader) -> Rank | None:
    dim, alpha = reader.integer("conv_dim"), reader.number("conv_alpha")
    if alpha is not None and not reader.any_of(("conv_dim", "conv_block_dims")):
        reader.wrong("conv_alpha has no ranks to scale", "Give conv_dim as well.")
    if dim:
        return Rank(dim, float(dim if alpha == 0 else 1.0 if alpha is None else alpha))
    return None


def _dropouts(reader: ArgumentReader, dropout: float | None) -> Dropouts:
    named = reader.probability("dropout")
    if dropout is not None and not 0 <= dropout < 1:
        reader.wrong(
            f"a dropout of {dropout} is not possible", "Give a number from 0 to below 1.", where="--network_dropout"
        )
    if dropout is not None and "dropout" in reader.texts and named != dropout:
        reader.wrong(f"dropout={named} contradicts --network_dropout={dropout}", "Give one of the two.")
    return Dropouts(
        neuron=dropout if dropout is not None else named,
        rank=reader.probability("rank_dropout"),
        module=reader.probability("module_dropout"),
    )


def _block_lr(reader: ArgumentReader) -> tuple[float, ...] | None:
    threshold = reader.number("block_lr_zero_threshold") or 0.0
    sides = (reader.texts.get(f"{side}_lr_weight") for side in ("down", "mid", "up"))
    try:
        return parse_lr_weights(*sides, zero_threshold=threshold)
    except UserError as error:
        reader.problems += error.problems
        return None


def _ratio(reader: ArgumentReader, name: str) -> float | None:
    specific = reader.positive(name)
    return specific if specific is not None else reader.positive("loraplus_lr_ratio")


def _with_block_ranks(reader: ArgumentReader, settings: LoRASettings, alpha: float) -> LoRASettings:
    """Fill in ranks per block where any are given; a block whose learning rate is 0 gets none, alpha 0 is the rank."""
    dims, alphas = reader.integers_per_block("block_dims"), reader.numbers_per_block("block_alphas")
    conv_dims, conv_alphas = reader.integers_per_block("conv_block_dims"), reader.numbers_per_block("conv_block_alphas")
    if conv_alphas is not None and conv_dims is None and settings.conv is None:
        reader.wrong("conv_block_alphas has no ranks to scale", "Give conv_block_dims or conv_dim as well.")
    given = (dims, alphas, conv_dims, conv_alphas, settings.block_lr)
    if all(values is None for values in given):
        return settings
    dims, alphas = dims or [settings.base.dim] * BLOCK_COUNT, alphas or [alpha] * BLOCK_COUNT
    if conv_dims is None and settings.conv:
        conv_dims = [settings.conv.dim] * BLOCK_COUNT
    if conv_alphas is None:
        conv_alpha = reader.number("conv_alpha")
        conv_alphas = [1.0 if conv_alpha is None else conv_alpha] * BLOCK_COUNT
    return replace(
        settings,
        blocks=_ranks(dims, alphas, settings.block_lr),
        conv_blocks=_ranks(conv_dims, conv_alphas, settings.block_lr) if conv_dims else None,
    )


def _ranks(dims: list[int], alphas: list[float], block_lr: tuple[float, ...] | None) -> tuple[Rank, ...]:
    weights = block_lr or (1.0,) * BLOCK_COUNT
    return tuple(
        Rank(dim if weight else 0, alpha or float(dim))
        for dim, alpha, weight in zip(dims, alphas, weights, strict=True)
    )
