"""The keys of a dataset file: name, kind of value, where it may stand, default, and what is refused for now.

One table, :data:`KEYS`, is the whole schema. A value that is not given at one scope is looked for at the next: subset,
data set, ``[general]``, command line, default; ``false``, ``0`` and ``""`` are values.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final, Literal

from library.documents import path_objection

Scope = Literal["general", "dataset", "subset"]

RESIZE_INTERPOLATIONS: Final = ("lanczos", "nearest", "bilinear", "linear", "bicubic", "cubic", "area")

LONGEST_SIDE: Final = 16384
"""Pixels: four times what is trained today, and few enough to go through every bucket."""

MOST_REPEATS: Final = 1_000_000
"""Of one image in an epoch, which holds each of them."""

_ANYWHERE: Final[tuple[Scope, ...]] = ("general", "dataset", "subset")
_DATASET: Final[tuple[Scope, ...]] = ("general", "dataset")
_SUBSET: Final[tuple[Scope, ...]] = ("subset",)


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of value.

    Attributes:
        expected: What it must be, for messages ("a whole number of at least 1").
        example: How a good value is written.
        read: Turns what the file holds into the value; raises ValueError for anything else.
    """

    expected: str
    example: str
    read: Callable[[object], Any]


@dataclass(frozen=True, slots=True)
class Key:
    """One key of the dataset file.

    Attributes:
        name: As it is written.
        kind: What its value may be.
        scopes: Where it may stand.
        default: Its value when nobody gives one.
        flag: The command line's name for it, if it has one.
    """

    name: str
    kind: Kind
    scopes: tuple[Scope, ...]
    default: Any = None
    flag: str | None = None


def _boolean(value: object) -> bool:
    if not isinstance(value, bool):
        raise ValueError
    return value


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError
    return value


def _filled_text(value: object) -> str:
    if not _text(value):
        raise ValueError
    return _text(value)


def _path(value: object) -> str:
    text = _filled_text(value)
    if objection := path_objection(text):
        raise ValueError(objection)
    return text


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError
    return value


def _whole(value: object) -> int:
    number = _number(value)
    if number != int(number):
        raise ValueError
    return int(number)


def whole_number(at_least: int, at_most: int | None = None) -> Kind:
    """A whole number that is not below ``at_least``, nor above ``at_most``."""

    def read(value: object) -> int:
        number = _whole(value)
        if number < at_least or (at_most is not None and number > at_most):
            raise ValueError
        return number

    limit = "" if at_most is None else f" and at most {at_most:,}"
    return Kind(f"a whole number of at least {at_least}{limit}", str(max(at_least, 1)), read)


def _rate(value: object) -> float:
    number = float(_number(value))
    if not 0 <= number <= 1:
        raise ValueError
    return number


def _not_negative(value: object) -> float:
    number = float(_number(value))
    if not number >= 0:
        raise ValueError
    return number


def _pair(value: object) -> list[object]:
    if isinstance(value, str):
        return [float(part) for part in value.split(",")]
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _resolution(value: object) -> tuple[int, int]:
    sides = [_whole(side) for side in _pair(value)]
    if len(sides) not in (1, 2) or min(sides) < 8 or max(sides) > LONGEST_SIDE:
        raise ValueError
    return sides[0], sides[-1]


def _range(value: object) -> tuple[float, float]:
    low, high = (float(_number(end)) for end in _pair(value))
    if not 0 < low <= high:
        raise ValueError
    return low, high


def _interpolation(value: object) -> str:
    if value not in RESIZE_INTERPOLATIONS:
        raise ValueError
    return str(value)


def _extension(value: object) -> str:
    text = _filled_text(value)
    return text if text.startswith(".") else f".{text}"


def _table(value: object) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError
    return MappingProxyType(dict(value))


BOOLEAN: Final = Kind("true or false", "true", _boolean)
TEXT: Final = Kind("text", "'text'", _text)
PATH: Final = Kind("a path", "'C:/images/dog'", _path)
NUMBER: Final = Kind("a number", "1.0", lambda value: float(_number(value)))
RATE: Final = Kind("a number from 0 to 1", "0.1", _rate)
NOT_NEGATIVE: Final = Kind("a number of at least 0", "100", _not_negative)
RESOLUTION: Final = Kind(
    f"one or two whole numbers from 8 to {LONGEST_SIDE} (width, height)", "[512, 768]", _resolution
)
RANGE: Final = Kind("two numbers above 0, the smaller first", "[1.0, 2.0]", _range)
INTERPOLATION: Final = Kind(f"one of {', '.join(RESIZE_INTERPOLATIONS)}", "'lanczos'", _interpolation)
EXTENSION: Final = Kind("a file name extension", "'.txt'", _extension)
SEPARATOR: Final = Kind("a text that is not empty", "','", _filled_text)
TABLE: Final = Kind("a table", "{ name = 'value' }", _table)
COUNT: Final = whole_number(0)
SIDE: Final = whole_number(1, LONGEST_SIDE)
REPEATS: Final = whole_number(1, MOST_REPEATS)
BATCH: Final = whole_number(1, MOST_REPEATS)

KEYS: Final[Mapping[str, Key]] = MappingProxyType(
    {
        key.name: key
        for key in (
            Key("batch_size", BATCH, _DATASET, 1, flag="train_batch_size"),
            Key("resolution", RESOLUTION, _DATASET, flag="resolution"),
            Key("enable_bucket", BOOLEAN, _DATASET, False, flag="enable_bucket"),
            Key("min_bucket_reso", SIDE, _DATASET, 256, flag="min_bucket_reso"),
            Key("max_bucket_reso", SIDE, _DATASET, 1024, flag="max_bucket_reso"),
            Key("bucket_reso_steps", SIDE, _DATASET, 64, flag="bucket_reso_steps"),
            Key("bucket_no_upscale", BOOLEAN, _DATASET, False, flag="bucket_no_upscale"),
            Key("network_multiplier", NUMBER, _DATASET, 1.0),
            Key("validation_seed", COUNT, _DATASET),
            Key("validation_split", RATE, _DATASET),
            Key("resize_interpolation", INTERPOLATION, _ANYWHERE, flag="resize_interpolation"),
            Key("num_repeats", REPEATS, _ANYWHERE, 1, flag="dataset_repeats"),
            Key("shuffle_caption", BOOLEAN, _ANYWHERE, False, flag="shuffle_caption"),
            Key("flip_aug", BOOLEAN, _ANYWHERE, False, flag="flip_aug"),
            Key("color_aug", BOOLEAN, _ANYWHERE, False, flag="color_aug"),
            Key("random_crop", BOOLEAN, _ANYWHERE, False, flag="random_crop"),
            Key("enable_wildcard", BOOLEAN, _ANYWHERE, False, flag="enable_wildcard"),
            Key("face_crop_aug_range", RANGE, _ANYWHERE, flag="face_crop_aug_range"),
            Key("keep_tokens", COUNT, _ANYWHERE, 0, flag="keep_tokens"),
            Key("keep_tokens_separator", TEXT, _ANYWHERE, "", flag="keep_tokens_separator"),
            Key("secondary_separator", TEXT, _ANYWHERE, "", flag="secondary_separator"),
            Key("caption_separator", SEPARATOR, _ANYWHERE, ",", flag="caption_separator"),
            Key("caption_prefix", TEXT, _ANYWHERE, "", flag="caption_prefix"),
            Key("caption_suffix", TEXT, _ANYWHERE, "", flag="caption_suffix"),
            Key("token_warmup_min", COUNT, _ANYWHERE, 1, flag="token_warmup_min"),
            Key("token_warmup_step", NOT_NEGATIVE, _ANYWHERE, 0.0, flag="token_warmup_step"),
            Key("caption_dropout_rate", RATE, _ANYWHERE, 0.0, flag="caption_dropout_rate"),
            Key("caption_dropout_every_n_epochs", COUNT, _ANYWHERE, 0, flag="caption_dropout_every_n_epochs"),
            Key("caption_tag_dropout_rate", RATE, _ANYWHERE, 0.0, flag="caption_tag_dropout_rate"),
            Key("custom_attributes", TABLE, _ANYWHERE, MappingProxyType({})),
            Key("caption_extension", EXTENSION, _ANYWHERE, ".caption", flag="caption_extension"),
            Key("class_tokens", TEXT, _ANYWHERE),
            Key("cache_info", BOOLEAN, _ANYWHERE, False, flag="cache_info"),
            Key("image_dir", PATH, _SUBSET),
            Key("is_reg", BOOLEAN, _SUBSET, False),
            Key("alpha_mask", BOOLEAN, _SUBSET, False, flag="alpha_mask"),
            Key("metadata_file", PATH, _SUBSET),
            Key("conditioning_data_dir", PATH, _SUBSET),
        )
    }
)

CAPTION_DROPOUT_KEYS: Final = frozenset(
    ("caption_dropout_rate", "caption_dropout_every_n_epochs", "caption_tag_dropout_rate")
)

FOLDER_KEYS: Final = frozenset(("class_tokens", "is_reg", "caption_extension", "cache_info"))
"""Keys that say where captions come from, or that there is a class: a metadata file says it itself."""

ELSEWHERE: Final[Mapping[str, str]] = MappingProxyType(
    {
        "prior_loss_weight": "Give it on the command line: --prior_loss_weight.",
        "max_token_length": "Give it on the command line: --max_token_length.",
        "debug_dataset": "Give it on the command line: --debug_dataset.",
        "masked_loss": "Give it on the command line: --masked_loss.",
        "cache_latents": "Give it on the command line: --cache_latents.",
        "cache_latents_to_disk": "Give it on the command line: --cache_latents_to_disk.",
        "vae_batch_size": "Give it on the command line: --vae_batch_size.",
        "train_batch_size": "In a dataset file it is called batch_size.",
        "dataset_repeats": "In a dataset file it is called num_repeats.",
        "caption_extention": "Write caption_extension.",
        "train_data_dir": "Write image_dir under [[datasets.subsets]]: the folder that holds the images themselves.",
        "reg_data_dir": "Write image_dir and is_reg = true under a [[datasets.subsets]] of its own.",
    }
)
"""Names that users put into a dataset file and that have another place or name."""
