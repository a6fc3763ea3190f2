"""What ``--network_dim``, ``--network_alpha`` and ``--network_args`` mean to OFT; nothing heavy is imported."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from library.errors import raise_if_any
from networks.arguments import ArgumentReader
from networks.lora_settings import ARGUMENTS as LORA_ARGUMENTS

OFT: Final = "networks.oft"
DEFAULT_BLOCKS: Final = 4
DEFAULT_CONSTRAINT: Final = 1e-3
TARGETS: Final = ("enable_all_linear", "enable_conv")
_NO_DROPOUT: Final = "a rotation has nothing to drop; --network_alpha limits it."
_ELSEWHERE: Final = {
    name: _NO_DROPOUT if "dropout" in name else "networks.lora has it; a rotation has no rank and one rate."
    for name in LORA_ARGUMENTS
}


@dataclass(frozen=True, slots=True, kw_only=True)
class OFTSettings:
    """The arguments of an OFT network, checked.

    Attributes:
        blocks: Number of blocks that the outputs of a layer are divided into.
        constraint: The rotation's generator is held to a norm of this times the layer's number of outputs.
        all_linear: Whether all linear layers and 1x1 convolutions of the transformer blocks are rotated, not only
            those of attention.
        conv: Whether the layers of the residual, downsampling and upsampling blocks are rotated too.
    """

    blocks: int = DEFAULT_BLOCKS
    constraint: float = DEFAULT_CONSTRAINT
    all_linear: bool = False
    conv: bool = False


def read_oft_settings(
    blocks: int | None, constraint: float | None, dropout: float | None, arguments: Mapping[str, object]
) -> OFTSettings:
    """Check the arguments of an OFT network and put them in order.

    Args:
        blocks: Number of blocks (``--network_dim``); 4 when None.
        constraint: ``--network_alpha``; 0.001 when None.
        dropout: ``--network_dropout``, which can only be None or 0.
        arguments: The rest by name (``--network_args``), values as text; None counts as not given.

    Raises:
        UserError: With everything found wrong.
    """
    # The host hands a dropout of its own option over by this name, too.
    given = {name: value for name, value in arguments.items() if name != "dropout" or value not in (None, dropout)}
    reader = ArgumentReader(given)
    reader.refuse_unknown(OFT, TARGETS, _ELSEWHERE)
    if dropout:
        reader.wrong(f"{OFT} has no dropout", f"Leave it out: {_NO_DROPOUT}", "--network_dropout")
    blocks = DEFAULT_BLOCKS if blocks is None else blocks
    if blocks < 1:
        reader.wrong(f"{blocks} blocks are not possible", "Give a whole number from 1, say 4.", "--network_dim")
    constraint = DEFAULT_CONSTRAINT if constraint is None else float(constraint)
    if not (math.isfinite(constraint) and constraint > 0):
        reader.wrong(
            f"an alpha of {constraint:g} would allow no rotation",
            f"Give a number above 0: it is OFT's constraint, {DEFAULT_CONSTRAINT:g} for instance.",
            "--network_alpha",
        )
    settings = OFTSettings(
        blocks=blocks,
        constraint=constraint,
        all_linear=reader.switch("enable_all_linear"),
        conv=reader.switch("enable_conv"),
    )
    raise_if_any(reader.problems)
    return settings
