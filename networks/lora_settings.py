"""What ``--network_dim``, ``--network_alpha``, ``--network_dropout`` and ``--network_args`` mean to a LoRA network.

Nothing heavy is imported, so the arguments can be checked before torch is.
"""

import difflib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Final, NamedTuple, TypeVar

from library.errors import Problem, UserError, raise_if_any
from networks.block_weights import BLOCK_COUNT, parse_lr_weights

WHERE: Final = "--network_args"
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

Value = TypeVar("Value")


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
    """

    base: Rank = Rank(DEFAULT_DIM, DEFAULT_DIM)
    conv: Rank | None = None
    blocks: tuple[Rank, ...] | None = None
    conv_blocks: tuple[Rank, ...] | None = None
    dropouts: Dropouts = Dropouts()
    block_lr: tuple[float, ...] | None = None
    loraplus_unet: float | None = None
    loraplus_text_encoder: float | None = None

    @property
    def targets_convolutions(self) -> bool:
        """Whether residual, downsampling and upsampling blocks get modules too."""
        return self.conv is not None or self.conv_blocks is not None


class _Reader:
    """Takes values out of text arguments and collects what is wrong with them."""

    def __init__(self, arguments: Mapping[str, object]) -> None:
        self.texts = {name: str(value).strip() for name, value in arguments.items() if value is not None}
        self.problems: list[Problem] = []

    def integer(self, name: str) -> int | None:
        return self._convert(name, _integer, "a whole number, 0 or more")

    def number(self, name: str) -> float | None:
        return self._convert(name, _number, "a number, 0 or more")

    def positive(self, name: str) -> float | None:
        return self._convert(name, _positive, "a number above 0")

    def probability(self, name: str) -> float:
        return self._convert(name, _probability, "a number from 0 to below 1") or 0.0

    def integers_per_block(self, name: str) -> list[int] | None:
        return self._convert(name, lambda text: _per_block(text, _integer), f"{BLOCK_COUNT} whole numbers, 0 or more")

    def numbers_per_block(self, name: str) -> list[float] | None:
        return self._convert(name, lambda text: _per_block(text, _number), f"{BLOCK_COUNT} numbers, 0 or more")

    def wrong(self, what: str, remedy: str, where: str = WHERE) -> None:
        self.problems.append(Problem(what, where, remedy))

    def _convert(self, name: str, convert: Callable[[str], Value], expected: str) -> Value | None:
        text = self.texts.get(name)
        if text is None:
            return None
        try:
            return convert(text)
        except ValueError as error:
            detail = f" ({error})" if "values" in str(error) else ""
            self.wrong(f"{name}={text} is not {expected}{detail}", f"Give {expected}, as in {name}={_EXAMPLES[name]}.")
            return None


_EXAMPLES: Final = {
    "conv_dim": "8",
    "conv_alpha": "4",
    "dropout": "0.1",
    "rank_dropout": "0.1",
    "module_dropout": "0.1",
    "block_dims": "4,4,... (12 down, 1 middle, 12 up)",
    "block_alphas": "1,1,... (12 down, 1 middle, 12 up)",
    "conv_block_dims": "4,4,... (12 down, 1 middle, 12 up)",
    "conv_block_alphas": "1,1,... (12 down, 1 middle, 12 up)",
    "block_lr_zero_threshold": "0.1",
    "loraplus_lr_ratio": "16",
    "loraplus_unet_lr_ratio": "16",
    "loraplus_text_encoder_lr_ratio": "4",
}


def _integer(text: str) -> int:
    number = int(text)
    if number < 0:
        raise ValueError("negative")
    return number


def _number(text: str) -> float:
    number = float(text)
    if not math.isfinite(number) or number < 0:
        raise ValueError("out of range")
    return number


def _positive(text: str) -> float:
    number = _number(text)
    if number == 0:
        raise ValueError("out of range")
    return number


def _probability(text: str) -> float:
    number = _number(text)
    if number >= 1:
        raise ValueError("out of range")
    return number


def _per_block(text: str, convert: Callable[[str], Value]) -> list[Value]:
    items = text.split(",")
    if len(items) != BLOCK_COUNT:
        raise ValueError(f"it has {len(items)} values")
    return [convert(item) for item in items]


def read_settings(
    dim: int | None, alpha: float | None, dropout: float | None, arguments: Mapping[str, object]
) -> LoRASettings:
    """Check the arguments of a LoRA network and put them in order.

    Args:
        dim: Rank (``--network_dim``); 4 when None.
        alpha: Alpha (``--network_alpha``); None and 0 mean the rank.
        dropout: Neuron dropout (``--network_dropout``), in [0, 1).
        arguments: The rest by name (``--network_args``), values as text; None counts as not given.

    Raises:
        UserError: With every unknown name, unreadable value and contradiction found.
    """
    reader = _Reader(arguments)
    for name in sorted(reader.texts.keys() - set(ARGUMENTS)):
        near = difflib.get_close_matches(name, ARGUMENTS, n=1)
        hint = f"Did you mean {near[0]}?" if near else f"Known are {', '.join(ARGUMENTS)}."
        reader.wrong(f"networks.lora has no argument {name!r}", hint)
    base = _base_rank(reader, dim, alpha)
    settings = LoRASettings(
        base=base,
        conv=_conv_rank(reader),
        dropouts=_dropouts(reader, dropout),
        block_lr=_block_lr(reader),
        loraplus_unet=_ratio(reader, "loraplus_unet_lr_ratio"),
        loraplus_text_encoder=_ratio(reader, "loraplus_text_encoder_lr_ratio"),
    )
    settings = _with_block_ranks(reader, settings, alpha or 0.0)
    raise_if_any(list(dict.fromkeys(reader.problems)))
    return settings


def _base_rank(reader: _Reader, dim: int | None, alpha: float | None) -> Rank:
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


def _conv_rank(reader: _Reader) -> Rank | None:
    dim, alpha = reader.integer("conv_dim"), reader.number("conv_alpha")
    if alpha is not None and not reader.texts.keys() & {"conv_dim", "conv_block_dims"}:
        reader.wrong("conv_alpha has no ranks to scale", "Give conv_dim as well.")
    if dim:
        return Rank(dim, float(dim if alpha == 0 else 1.0 if alpha is None else alpha))
    return None


def _dropouts(reader: _Reader, dropout: float | None) -> Dropouts:
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


def _block_lr(reader: _Reader) -> tuple[float, ...] | None:
    threshold = reader.number("block_lr_zero_threshold") or 0.0
    sides = (reader.texts.get(f"{side}_lr_weight") for side in ("down", "mid", "up"))
    try:
        return parse_lr_weights(*sides, zero_threshold=threshold)
    except UserError as error:
        reader.problems += error.problems
        return None


def _ratio(reader: _Reader, name: str) -> float | None:
    specific = reader.positive(name)
    return specific if specific is not None else reader.positive("loraplus_lr_ratio")


def _with_block_ranks(reader: _Reader, settings: LoRASettings, alpha: float) -> LoRASettings:
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
