"""Prompts of the preview images, from .txt, .toml and .json files. Imports nothing heavy.

A line is the prompt, then options that each begin with " --": ``a cat --n blurry --w 512 --h 768 --d 1 --s 28``.
"""

import logging
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from library.documents import DocumentError, is_text, parse_json, parse_toml, read_text
from library.errors import Problem, UserError, raise_if_any
from library.options import choose_from
from library.training.options import SAMPLER_NAMES
from library.wording import named

logger = logging.getLogger(__name__)

MAX_STEPS: Final = 999
"""What the samplers take: with a step for every timestep, some give no image."""

_MAX_SEED: Final = 2**63 - 1
_MAX_SIDE: Final = 4096  # pixels
_MOST_PROBLEMS: Final = 100
"""Mistakes of one file that are told: looking for the nearest name of each takes time."""

_MOST_ADJUSTED: Final = 3
"""Values that are named of those that are not taken as they are."""

_SIDE_UNIT: Final = 8  # pixels: one pixel of latents
_MIN_SIDE: Final = 64  # pixels


@dataclass(frozen=True, kw_only=True, slots=True)
class PreviewPrompt:
    """One preview image to make.

    Attributes:
        prompt: What the image shows.
        negative_prompt: What it must not show.
        width: Pixels, a multiple of 8, at least 64.
        height: Pixels, a multiple of 8, at least 64.
        steps: Sampling steps, 1 to :data:`MAX_STEPS`.
        scale: Guidance scale; guidance is off from 1 down.
        seed: Seed of the noise; None leaves it to the run.
        sampler: Name of the sampler.
        index: Position in the file, from 0.
    """

    prompt: str
    negative_prompt: str = ""
    width: int = 512
    height: int = 512
    steps: int = 30
    scale: float = 7.5
    seed: int | None = None
    sampler: str = "ddim"
    index: int = 0


def _side(value: object) -> int:
    side = _whole(value)
    if side > _MAX_SIDE:
        raise ValueError(f"at most {_MAX_SIDE}")
    return max(_MIN_SIDE, side // _SIDE_UNIT * _SIDE_UNIT)


def _steps(value: object) -> int:
    return min(max(_whole(value), 1), MAX_STEPS)


def _seed(value: object) -> int:
    seed = _whole(value)
    if seed > _MAX_SEED:
        raise ValueError(f"at most {_MAX_SEED}")
    return seed


def _whole(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, str)) or int(value) < 0:
        raise ValueError("a whole number, 0 or more")
    return int(value)


def _scale(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)) or not 0 <= float(value) < float("inf"):
        raise ValueError("a number, 0 or more")
    return float(value)


def _text(value: object) -> str:
    if not isinstance(value, str) or not is_text(value):
        raise ValueError("text")
    return value


@dataclass(frozen=True, slots=True)
class _Setting:
    """A setting of a prompt: its field, its key in TOML and JSON, its letters in a line, what it expects."""

    field: str
    key: str
    letters: str | None
    read: Callable[[object], object]
    expects: str


_SETTINGS: Final = (
    _Setting("prompt", "prompt", None, _text, "text"),
    _Setting("negative_prompt", "negative_prompt", "n", _text, "text"),
    _Setting("width", "width", "w", _side, f"pixels, a whole number up to {_MAX_SIDE}"),
    _Setting("height", "height", "h", _side, f"pixels, a whole number up to {_MAX_SIDE}"),
    _Setting("steps", "sample_steps", "s", _steps, f"a whole number, 1 to {MAX_STEPS}"),
    _Setting("scale", "scale", "l", _scale, "a number such as 7.5"),
    _Setting("seed", "seed", "d", _seed, "a whole number, 0 or more"),
    _Setting("sampler", "sample_sampler", "ss", _text, "the name of a sampler"),
)
_BY_LETTERS: Final = {setting.letters: setting for setting in _SETTINGS if setting.letters}
_BY_KEY: Final = {setting.key: setting for setting in _SETTINGS}
# Settings that change nothing for Stable Diffusion 1 and 2, by letters and by key.
_FOREIGN: Final = frozenset(
    {"g", "guidance_scale", "ctr", "cfg_trunc_ratio", "rcfg", "renorm_cfg", "fs", "flow_shift", "enum"}
)
_NOT_YET: Final = frozenset({"cn", "controlnet_image"})


def load_prompts(
    path: Path, *, default_sampler: str = "ddim", samplers: Collection[str] = SAMPLER_NAMES
) -> tuple[PreviewPrompt, ...]:
    """Read a prompt file.

    Args:
        path: A .txt, .toml or .json file.
        default_sampler: Sampler of prompts that name none.
        samplers: Names a prompt may ask for.

    Raises:
        UserError: With everything that is wrong in the file, by line (.txt) or by number of the prompt.
    """
    readers = {".txt": _from_text, ".toml": _from_toml, ".json": _from_json}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise UserError(
            f"{path.name}: prompts cannot be read from {path.suffix or 'a file without suffix'}",
            where="--sample_prompts",
            remedy="Use .txt (one prompt a line), .toml or .json.",
        )
    problems: list[Problem] = []
    prompts: list[PreviewPrompt] = []
    adjusted: list[str] = []
    for where, settings in reader(path, _read(path), problems):
        if len(problems) >= _MOST_PROBLEMS:
            problems.append(Problem("further mistakes are not listed", str(path), "Mend these first."))
            break
        fields = _fields(settings, where, samplers, problems)
        adjusted += _adjusted(settings, fields, where)
        prompts.append(PreviewPrompt(**{"prompt": "", "sampler": default_sampler, **fields, "index": len(prompts)}))
    raise_if_any(problems)
    if not prompts:
        raise UserError("there is no prompt in the file", where=str(path), remedy="Write one prompt a line.")
    if adjusted:
        logger.warning(
            "%d values are brought to what a preview can have (sides: multiples of %d from %d on; steps: 1 to %d): %s",
            len(adjusted),
            _SIDE_UNIT,
            _MIN_SIDE,
            MAX_STEPS,
            named(adjusted, _MOST_ADJUSTED, between="; "),
        )
    return tuple(prompts)


def as_table(prompt: PreviewPrompt) -> dict[str, object]:
    """A prompt as a JSON file holds it."""
    found = {setting.key: getattr(prompt, setting.field) for setting in _SETTINGS}
    return {key: value for key, value in found.items() if value is not None}


def _read(path: Path) -> str:
    try:
        return read_text(path)
    except DocumentError as error:
        raise UserError("the prompt file is not UTF-8 text", where=str(path), remedy="Save it as UTF-8.") from error
    except OSError as error:
        raise UserError(
            f"the prompt file cannot be read: {error.strerror or error}", where=str(path), remedy="Check the path."
        ) from error


Located = Iterator[tuple[str, dict[str, object]]]


def _from_text(path: Path, content: str, problems: list[Problem]) -> Located:
    for number, line in enumerate(content.splitlines(), 1):
        text = line.strip()
        if text and not text.startswith("#"):
            yield f"{path}:{number}", parse_line(text, f"{path}:{number}", problems)


def _from_toml(path: Path, content: str, problems: list[Problem]) -> Located:
    """``[prompt]`` holds what all share, each ``[[prompt.subset]]`` a prompt that may override it."""
    try:
        table = parse_toml(content)
    except DocumentError as error:
        problems.append(Problem(f"the file cannot be used: {error}", where=str(path), remedy="Mend the line."))
        return
    shared = table.get("prompt")
    subsets = shared.get("subset") if isinstance(shared, dict) else None
    if not isinstance(shared, dict) or not isinstance(subsets, list) or not all(isinstance(s, dict) for s in subsets):
        problems.append(
            Problem(
                "there is no [[prompt.subset]]", where=str(path), remedy="Begin every prompt with [[prompt.subset]]."
            )
        )
        return
    common = {key: value for key, value in shared.items() if key != "subset"}
    for number, subset in enumerate(subsets, 1):
        yield f"{path}: prompt {number}", {**common, **subset}


def _from_json(path: Path, content: str, problems: list[Problem]) -> Located:
    """A list of tables, or of lines as in a text file."""
    try:
        items: Any = parse_json(content)
    except DocumentError as error:
        problems.append(Problem(f"the file cannot be used: {error}", where=str(path), remedy="Mend the line."))
        return
    if not isinstance(items, list):
        problems.append(
            Problem("not a list of prompts", where=str(path), remedy='Write [{"prompt": "a cat"}, "a dog --w 512"].')
        )
        return
    for number, item in enumerate(items, 1):
        where = f"{path}: prompt {number}"
        if isinstance(item, dict):
            yield where, item
        elif isinstance(item, str):
            yield where, parse_line(item, where, problems)
        else:
            problems.append(Problem(f"{item!r} is no prompt", where=where, remedy="Give a text or a table."))


def parse_line(line: str, where: str, problems: list[Problem]) -> dict[str, object]:
    """The settings in a prompt line by their keys in a table; what cannot be read goes to ``problems``."""
    prompt, *pieces = f" {line}".split(" --")
    settings: dict[str, object] = {"prompt": prompt[1:]}
    for piece in pieces:
        letters, _, value = piece.partition(" ")
        letters = letters.lower()
        setting = _BY_LETTERS.get(letters)
        if setting is not None:
            settings[setting.key] = value.strip()
        elif letters in _FOREIGN or letters in _NOT_YET:
            settings[letters] = value.strip()
        else:
            problems.append(
                Problem(
                    f"there is no option '--{letters}' in a prompt",
                    where=where,
                    remedy=f"Options: {', '.join(f'--{known}' for known in _BY_LETTERS)}; a dash alone is not one.",
                )
            )
    return settings


def _fields(
    settings: Mapping[str, object], where: str, samplers: Collection[str], problems: list[Problem]
) -> dict[str, Any]:
    """Values for the fields of a prompt; what is wrong goes to ``problems``."""
    fields: dict[str, Any] = {}
    for key, value in settings.items():
        setting = _BY_KEY.get(key)
        if setting is None:
            problems += _unknown_key(key, where)
            continue
        try:
            fields[setting.field] = setting.read(value)
        except ValueError:
            problems.append(
                Problem(
                    f"{_shown_key(setting)} {value!r} cannot be used",
                    where=where,
                    remedy=f"It expects {setting.expects}.",
                )
            )
    if not str(settings.get("prompt", "")).strip():
        problems.append(Problem("there is no prompt before the options", where=where, remedy="Begin with the prompt."))
    sampler = fields.get("sampler")
    if sampler is not None:
        fields["sampler"] = sampler.lower()
        if sampler.lower() not in samplers:
            remedy = choose_from(sampler, samplers, "Available")
            problems.append(Problem(f"there is no sampler {sampler!r}", where=where, remedy=remedy))
    return fields


def _adjusted(settings: Mapping[str, object], fields: Mapping[str, object], where: str) -> list[str]:
    """The numbers of a prompt that are not taken as they are, and what they are taken as."""
    given = [(_BY_KEY[key], value) for key, value in settings.items() if key in _BY_KEY]
    return [
        f"{where}: {_shown_key(setting)} {value} is {found}"
        for setting, value in given
        if isinstance(found := fields.get(setting.field), int) and found != _whole(value)
    ]


def _shown_key(setting: _Setting) -> str:
    return f"--{setting.letters}" if setting.letters else setting.key


def _unknown_key(key: str, where: str) -> list[Problem]:
    if key in _FOREIGN:
        logger.warning("%s: %s changes nothing for this family of models", where, key)
        return []
    if key in _NOT_YET:
        return [Problem(f"{key}: control images are not available yet", where=where, remedy="Leave it out.")]
    remedy = choose_from(key, _BY_KEY, "Settings")
    return [Problem(f"there is no setting {key!r} in a prompt", where=where, remedy=remedy)]
