"""The 25 blocks of the U-Net as adapters count them, and learning-rate weights per block.

Stable Diffusion's U-Net has 12 places on the way down (index 0 to 11), one in the middle (12) and 12 on the way up
(13 to 24). Index 0 is the input convolution, which no adapter targets.
"""

import logging
import math
import re
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Final

from library.errors import UserError

logger = logging.getLogger(__name__)

SIDE_BLOCKS: Final = 12
MID_BLOCK: Final = SIDE_BLOCKS
BLOCK_COUNT: Final = 2 * SIDE_BLOCKS + 1

_LEVEL_SIZE: Final = 3
_LEVELS: Final = 4
_PLACE: Final = re.compile(
    r"_unet_(?:(?P<mid>mid_block)|(?P<side>down|up)_blocks_(?P<level>\d+)"
    r"_(?P<kind>attentions|resnets|downsamplers|upsamplers)_(?P<layer>\d+))(?:_|$)"
)

PRESETS: Final[Mapping[str, Callable[[float], float]]] = MappingProxyType(
    {
        "sine": lambda depth: math.sin(math.pi / 2 * depth),
        "cosine": lambda depth: math.sin(math.pi / 2 * (1 - depth)),
        "linear": lambda depth: depth,
        "reverse_linear": lambda depth: 1 - depth,
        "zeros": lambda _: 0.0,
    }
)


def block_index(lora_name: str) -> int:
    """The block (1 to 24) of an adapter module, for instance ``lora_unet_down_blocks_0_attentions_1_proj_in`` -> 2.

    Raises:
        UserError: The module has no place among the 25, because the U-Net has more levels or layers than SD's.
    """
    place = _PLACE.search(lora_name)
    if place and place["mid"]:
        return MID_BLOCK
    if place:
        is_down = place["side"] == "down"
        level, layer = int(place["level"]), int(place["layer"])
        if place["kind"] in ("downsamplers", "upsamplers"):
            layer = _LEVEL_SIZE - 1
        elif layer >= _LEVEL_SIZE - is_down:
            level = _LEVELS
        if level < _LEVELS:
            return (1 if is_down else MID_BLOCK + 1) + _LEVEL_SIZE * level + layer
    raise UserError(
        f"{lora_name} belongs to none of the {BLOCK_COUNT} blocks of a Stable Diffusion U-Net",
        where="--network_args",
        remedy="Leave out the settings per block (block_dims, down_lr_weight, ...) for this model.",
    )


def parse_lr_weights(
    down: str | None, mid: str | None, up: str | None, *, zero_threshold: float = 0.0
) -> tuple[float, ...] | None:
    """Learning-rate weights of the 25 blocks from their text form; None when none of the three is given.

    Args:
        down: 12 numbers separated by commas (shallow to deep), one number for all, or a preset with an optional
            base that is added (``sine+.5``).
        mid: One number.
        up: As ``down``, deep to shallow.
        zero_threshold: Weights not above it become 0.

    Raises:
        UserError: A value is neither a number nor a preset.
    """
    if down is None and mid is None and up is None:
        return None
    weights = (
        *_side_weights("down_lr_weight", down, zero_threshold),
        _above(_numbers("mid_lr_weight", mid)[0], zero_threshold) if mid is not None else 1.0,
        *_side_weights("up_lr_weight", up, zero_threshold),
    )
    assert len(weights) == BLOCK_COUNT
    return weights


def _side_weights(name: str, text: str | None, zero_threshold: float) -> tuple[float, ...]:
    if text is None:
        return (1.0,) * SIDE_BLOCKS
    preset, _, base = text.strip().partition("+")
    if preset in PRESETS:
        offset = _numbers(name, base)[0] if base else 0.0
        weights = [PRESETS[preset](place / (SIDE_BLOCKS - 1)) + offset for place in range(SIDE_BLOCKS)]
    else:
        weights = _numbers(name, text)
        if "," not in text:
            weights *= SIDE_BLOCKS
        if len(weights) != SIDE_BLOCKS:
            logger.warning(
                "%s has %d values instead of %d: missing ones are 1, further ones are not used",
                name,
                len(weights),
                SIDE_BLOCKS,
            )
        weights = (weights + [1.0] * SIDE_BLOCKS)[:SIDE_BLOCKS]
    return tuple(_above(weight, zero_threshold) for weight in weights)


def _above(weight: float, threshold: float) -> float:
    return weight if weight > threshold else 0.0


def _numbers(name: str, text: str) -> list[float]:
    """The numbers of a comma-separated list; an empty item is 0."""
    try:
        numbers = [float(item) if item.strip() else 0.0 for item in text.split(",")]
    except ValueError:
        numbers = []
    if numbers and all(math.isfinite(number) for number in numbers):
        return numbers
    raise UserError(
        f"{name}={text} is neither a list of numbers nor a known shape",
        where="--network_args",
        remedy=f"Give {SIDE_BLOCKS} numbers separated by commas (1 for mid_lr_weight), one number, or one of "
        f"{', '.join(PRESETS)} (with +0.25, say, to add a base).",
    )
