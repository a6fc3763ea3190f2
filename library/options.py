"""Options of a script: declared once as dataclass fields, read from the command line and from a TOML file.

A script's options are a frozen dataclass whose fields are groups (or single options)::

    @dataclass(frozen=True, kw_only=True, slots=True)
    class Options:
        '''Options of a script.'''
        model: ModelOptions
        optimizer: OptimizerOptions = OptimizerOptions(learning_rate=5e-4)  # the script's own default

    options = parse_options(Options, argv, prog="train.py", description="Train.")

A group, and the options class itself, may have these methods:

- ``problems()``: what is wrong with the values together, as a list of problems;
- ``notices()``: what is worth telling the user, as a list of texts;
- ``settled()``: the same group with values that follow from others filled in (groups only; the options class sees its
  groups settled).

Its attribute ``ignored_in_files``, where it has one, gives keys that a file may hold without effect, each with the
reason: files made elsewhere have them for every script. As flags they are what they otherwise are.

Values from both sources go through one conversion; the command line wins over the file, the file over the defaults, and
everything wrong is reported in one error.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Final, NoReturn, TypeVar, get_args, get_origin, get_type_hints

from library.errors import Problem, raise_if_any
from library.option_fields import Declared, declarations, default_of, facts_of, option
from library.option_foreign import FILE_KEYS, FOREIGN_KEYS, foreign_notice
from library.option_help import help_text
from library.option_sources import CONFIG_FLAGS, Given, Source, config_path, read_arguments, read_config
from library.option_values import (
    choose_from,
    convert,
    did_you_mean,
    near_names,
    near_remedy,
    pair_problems,
    parse_int_or_float,
    parse_range,
    parse_size,
    repeated_keys,
    text_pairs,
)

__all__ = [
    "PRIVATE_METAVARS",
    "SECRET_KEYS",
    "choose_from",
    "declared_flags",
    "did_you_mean",
    "flat_values",
    "near_names",
    "near_remedy",
    "option",
    "options_that_differ",
    "pair_problems",
    "parse_int_or_float",
    "parse_options",
    "parse_range",
    "parse_size",
    "public_values",
    "repeated_keys",
    "text_pairs",
    "to_toml",
]

T = TypeVar("T")

SECRET_KEYS: Final = frozenset({"wandb_api_key", "huggingface_token"})
"""Options that are never written to a file, a log or the screen."""

_SLIP: Final = 0.8
"""Of two names at least so similar (``difflib``) one is taken for the other misspelt."""

PRIVATE_METAVARS: Final = frozenset({"PATH", "FILE", "DIR"})
"""How ``--help`` names the values of options that hold paths."""

log = logging.getLogger(__name__)


def parse_options(
    kind: type[T],
    argv: Sequence[str],
    *,
    prog: str,
    description: str,
    announce: Callable[[str], None] | None = None,
    skips_others: bool = False,
) -> T:
    """The options of a script, from its defaults, ``--config_file`` and the command line.

    ``--help`` and ``--output_config`` end the program here with exit code 0.

    Args:
        kind: The script's options class.
        argv: Command line without the program's name.
        prog: The program's name, for ``--help``.
        description: What the script does, for ``--help``.
        announce: Called with each notice; a warning in the log when absent.
        skips_others: Leave out options that are not the script's, and say which, unless they are called almost like
            one of them: for tools that take the command line of another script.

    Raises:
        UserError: Something is wrong; all problems of both sources together.
    """
    declared = declarations(kind)
    if any(word in ("-h", "--help") for word in argv):
        print(help_text(declared.values(), prog=prog, description=description), end="")
        raise SystemExit(0)
    arguments = read_arguments(argv, declared)
    skipped = _others(arguments, declared) if skips_others else []
    reading = _Reading(declared, problems=list(arguments.problems))
    settings = {item.name: item for item in arguments.given if item.name in CONFIG_FLAGS}
    writes = "output_config" in settings
    ignored: Mapping[str, str] = getattr(kind, "ignored_in_files", {})
    config = _config_source(settings, declared, ignored, writes=writes)
    skipped += _others(config, declared) if skips_others else []
    reading.problems += config.problems
    for item in (*config.given, *(item for item in arguments.given if item.name not in CONFIG_FLAGS)):
        reading.take(item)
    options, notices = reading.build(kind)
    raise_if_any(reading.problems)
    if writes:
        _write_config(config_path(str(settings["config_file"].raw)), options)
    notices += [f"not used here: {', '.join(sorted(set(skipped)))}"] if skipped else []
    for text in (*arguments.notices, *config.notices, *_ignored(arguments, config, ignored), *notices):
        (announce or log.warning)(text)
    return options


def _others(source: Source, declared: Mapping[str, Declared]) -> list[str]:
    """The unknown options of ``source`` that are no slips of the pen; they are no problems any more."""
    others = [name for name in source.unknown if not get_close_matches(name, declared, 1, cutoff=_SLIP)]
    source.problems = [one for one in source.problems if one not in [source.unknown[name] for name in others]]
    return others


def _ignored(arguments: Source, config: Source, reasons: Mapping[str, str]) -> list[str]:
    """One line that lists what both sources give and is ignored."""
    return foreign_notice(arguments.foreign + config.foreign, {**FOREIGN_KEYS, **FILE_KEYS, **reasons})


def _config_source(
    settings: Mapping[str, Given], declared: Mapping[str, Declared], ignored: Mapping[str, str], *, writes: bool
) -> Source:
    """What the configuration file gives; nothing where it is to be written."""
    given = settings.get("config_file")
    if given is None:
        wrong = Problem(
            "--output_config needs the name of the file to write", "--output_config", "Add --config_file FILE."
        )
        return Source(problems=[wrong] if writes else [])
    path = config_path(str(given.raw))
    if not writes:
        used = {name: item for name, item in declared.items() if name not in ignored}
        return read_config(path, used, {*FOREIGN_KEYS, *FILE_KEYS, *ignored})
    if path.exists():
        return Source(problems=[Problem(f"{path} exists already", "--output_config", "Choose another --config_file.")])
    return Source()


@dataclass(slots=True)
class _Reading:
    """Values on their way from the sources to the options."""

    declared: Mapping[str, Declared]
    problems: list[Problem]
    values: dict[str, object] = field(default_factory=dict)
    given: dict[str, Given] = field(default_factory=dict)
    failed: set[str] = field(default_factory=set)

    def take(self, item: Given) -> None:
        """Convert what was given; a later source overrides an earlier one, but a mistake in either is reported."""
        declared = self.declared[item.name]
        try:
            self.values[item.name] = convert(declared, item.raw)
            self.given[item.name] = item
        except ValueError as error:
            shown = "" if item.name in SECRET_KEYS else f", not {_written(item.raw)}"
            self.problems.append(Problem(f"--{item.name} {error}{shown}", item.where, _remedy(declared, item.raw)))
            self.failed.add(item.name)

    def build(self, kind: type[T]) -> tuple[T, list[str]]:
        """The options, settled, and their notices; what is wrong with them is added to ``problems``."""
        notices: list[str] = []
        parts: dict[str, Any] = {}
        hints = get_type_hints(kind)
        for item in fields(kind):  # type: ignore[arg-type]
            if facts_of(item) is None:
                parts[item.name] = self._group(item.name, default_of(item, hints[item.name]), notices)
            elif item.name in self.values:
                parts[item.name] = self.values[item.name]
        options = kind(**parts)
        if not self.failed:
            self._report(options, notices)
        return options, notices

    def _group(self, name: str, default: Any, notices: list[str]) -> Any:
        own = [item.name for item in self.declared.values() if item.group == name]
        group = replace(default, **{key: self.values[key] for key in own if key in self.values})
        if self.failed.intersection(own):
            return group
        self._report(group, notices)
        return group.settled() if hasattr(group, "settled") else group

    def _report(self, part: Any, notices: list[str]) -> None:
        """Add what a group, or the whole, says is wrong (with the place where an option was given), and its notices."""
        if hasattr(part, "notices"):
            notices += part.notices()
        if hasattr(part, "problems"):
            for problem in part.problems():
                item = self.given.get((problem.where or "").removeprefix("--"))
                self.problems.append(replace(problem, where=item.where) if item else problem)


def _remedy(declared: Declared, raw: object) -> str:
    nearest = did_you_mean(str(raw), map(str, declared.facts.choices or ()))
    return nearest or f"Correct it. The option: {declared.facts.help}"


def _written(raw: object) -> str:
    """What was given, as it was written."""
    return " ".join(map(str, raw)) if isinstance(raw, list) else repr(raw)


def _write_config(path: Path, options: object) -> NoReturn:
    from library.files import write_text

    write_text(path, to_toml(options))
    print(f"wrote {path}")
    raise SystemExit(0)


# --- what options hold


def flat_values(options: object) -> dict[str, object]:
    """Every option's value by name, in the order of declaration; secrets included."""
    return {
        name: getattr(options if item.group is None else getattr(options, item.group), name)
        for name, item in declarations(type(options)).items()
    }


def public_values(options: object) -> dict[str, object]:
    """The values that may be shown to others: neither secrets nor paths."""
    declared = declarations(type(options))
    return {
        name: value
        for name, value in flat_values(options).items()
        if name not in SECRET_KEYS and declared[name].facts.metavar not in PRIVATE_METAVARS
    }


def options_that_differ(first: object, second: object) -> dict[str, tuple[object, object]]:
    """Both values, by name, of every option that two objects of one options class do not agree in."""
    others = flat_values(second)
    return {name: (value, others[name]) for name, value in flat_values(first).items() if value != others[name]}


def declared_flags(kind: type) -> set[str]:
    """The names of every flag of a script but ``help``."""
    return {*declarations(kind), *CONFIG_FLAGS}


def to_toml(options: object) -> str:
    """Every option that is not the default as a TOML line, but for secrets; reading it back gives equal options."""
    declared = declarations(type(options))
    lines = [
        f"{name} = {_toml_value(declared[name], value)}\n"
        for name, value in flat_values(options).items()
        if value != declared[name].default and name not in SECRET_KEYS
    ]
    return "".join(lines)


def _toml_value(declared: Declared, value: object) -> str:
    if isinstance(value, tuple):
        if _is_fixed(declared.type):
            return _toml_text(",".join(map(str, value)))
        return f"[{', '.join(_toml_value(declared, element) for element in value)}]"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    assert isinstance(value, str | Path), f"--{declared.name} cannot be written as TOML: {value!r}"
    return _toml_text(str(value))


def _is_fixed(kind: Any) -> bool:
    """Whether a type is a tuple of a fixed length, written as one text such as "512,768"."""
    return any(get_origin(part) is tuple and Ellipsis not in get_args(part) for part in (kind, *get_args(kind)))


_ESCAPES: Final = {'"': '\\"', "\\": "\\\\"}


def _toml_text(text: str) -> str:
    """A TOML string."""
    escaped = (
        _ESCAPES.get(char) or (f"\\u{ord(char):04X}" if ord(char) < 0x20 or ord(char) == 0x7F else char)
        for char in text
    )
    return f'"{"".join(escaped)}"'
