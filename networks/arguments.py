"""Reads ``--network_args``: values out of texts, and everything that is wrong with them; nothing heavy is imported."""

import difflib
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Final, TypeVar

from library.errors import Problem
from networks.block_weights import BLOCK_COUNT

WHERE: Final = "--network_args"

Value = TypeVar("Value")

_PER_BLOCK: Final = "1,1,... (12 down, 1 middle, 12 up)"
_EXAMPLES: Final = {
    "conv_dim": "8",
    "conv_alpha": "4",
    "unit": "4",
    "dropout": "0.1",
    "rank_dropout": "0.1",
    "module_dropout": "0.1",
    "block_dims": "4,4,... (12 down, 1 middle, 12 up)",
    "block_alphas": _PER_BLOCK,
    "conv_block_dims": "4,4,... (12 down, 1 middle, 12 up)",
    "conv_block_alphas": _PER_BLOCK,
    "block_lr_zero_threshold": "0.1",
    "loraplus_lr_ratio": "16",
    "loraplus_unet_lr_ratio": "16",
    "loraplus_text_encoder_lr_ratio": "4",
    "enable_all_linear": "true",
    "enable_conv": "true",
}
_SWITCHES: Final = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


def split_arguments(arguments: Sequence[str]) -> dict[str, object]:
    """``key=value`` texts by key; of a repeated key the last value holds."""
    pairs = (text.partition("=") for text in arguments)
    return {name.strip(): value.strip() for name, _, value in pairs}


class ArgumentReader:
    """Takes values out of text arguments and collects what is wrong with them.

    Attributes:
        texts: The arguments that were given, as text.
        problems: What was found wrong so far.
    """

    def __init__(self, arguments: Mapping[str, object]) -> None:
        self.texts = {name: str(value).strip() for name, value in arguments.items() if value is not None}
        self.problems: list[Problem] = []

    def refuse_unknown(self, module: str, known: Sequence[str], elsewhere: Mapping[str, str]) -> None:
        """Note every argument that is not in ``known``.

        Args:
            module: Import path of the network module.
            known: The arguments it has.
            elsewhere: Arguments of other modules, with the reason why this one has none of that name.
        """
        for name in sorted(self.texts.keys() - set(known)):
            reason = elsewhere.get(name)
            near = difflib.get_close_matches(name, known, n=1)
            if reason is not None:
                hint = f"Leave it out: {reason}"
            else:
                hint = f"Did you mean {near[0]}?" if near else f"Known are {', '.join(known)}."
            self.wrong(f"{module} has no argument {name!r}", hint)

    def integer(self, name: str) -> int | None:
        """A whole number, 0 or more."""
        return self._convert(name, _integer, "a whole number, 0 or more")

    def number(self, name: str) -> float | None:
        """A number, 0 or more."""
        return self._convert(name, _number, "a number, 0 or more")

    def positive(self, name: str) -> float | None:
        """A number above 0."""
        return self._convert(name, _positive, "a number above 0")

    def probability(self, name: str) -> float:
        """A number in [0, 1), 0 where it is not given."""
        return self._convert(name, _probability, "a number from 0 to below 1") or 0.0

    def switch(self, name: str) -> bool:
        """True or false, false where it is not given."""
        return self._convert(name, lambda text: _SWITCHES[text.lower()], "true or false") or False

    def integers_per_block(self, name: str) -> list[int] | None:
        """One whole number for each of the 25 blocks."""
        return self._convert(name, lambda text: _per_block(text, _integer), f"{BLOCK_COUNT} whole numbers, 0 or more")

    def numbers_per_block(self, name: str) -> list[float] | None:
        """One number for each of the 25 blocks."""
        return self._convert(name, lambda text: _per_block(text, _number), f"{BLOCK_COUNT} numbers, 0 or more")

    def any_of(self, names: Collection[str]) -> bool:
        """Whether any of ``names`` is given."""
        return not self.texts.keys().isdisjoint(names)

    def wrong(self, what: str, remedy: str, where: str = WHERE) -> None:
        """Note a problem."""
        self.problems.append(Problem(what, where, remedy))

    def _convert(self, name: str, convert: Callable[[str], Value], expected: str) -> Value | None:
        text = self.texts.get(name)
        if text is None:
            return None
        try:
            return convert(text)
        except (ValueError, KeyError) as error:
            detail = f" ({error})" if "values" in str(error) else ""
            self.wrong(f"{name}={text} is not {expected}{detail}", f"Give {expected}, as in {name}={_EXAMPLES[name]}.")
            return None


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
