"""One declaration for an option: a dataclass field is the flag, the TOML key, the type, the default and the help."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from typing import Any, Final, get_type_hints

_KEY: Final = "option"


@dataclass(frozen=True, kw_only=True, slots=True)
class OptionFacts:
    """What a declaration says besides name, type and default; see :func:`option`."""

    help: str
    choices: tuple[object, ...] | None = None
    flag_aliases: tuple[str, ...] = ()
    metavar: str | None = None
    parse: Callable[[object], object] | None = None
    minimum: float | None = None
    maximum: float | None = None
    above: float | None = None
    check: Callable[[Any], str | None] | None = None
    synonyms: Mapping[Any, object] | None = None


def option(
    default: object,
    *,
    help: str,
    choices: Sequence[object] | None = None,
    flag_aliases: Sequence[str] = (),
    metavar: str | None = None,
    parse: Callable[[object], object] | None = None,
    minimum: float | None = None,
    maximum: float | None = None,
    above: float | None = None,
    check: Callable[[Any], str | None] | None = None,
    synonyms: Mapping[Any, object] | None = None,
) -> Any:
    """A field of a frozen dataclass that is an option. Bounds, choices and checks hold for each element of a tuple.

    Args:
        default: Value when the option is given nowhere.
        help: One or two sentences for ``--help``.
        choices: The values that are allowed.
        flag_aliases: Further names of the flag, without dashes.
        metavar: How ``--help`` names the value; ``PATH``, ``FILE`` and ``DIR`` also say that it is private.
        parse: Conversion of what was given (text or a TOML value) in place of the type's own; raises ValueError.
        minimum: Smallest value allowed.
        maximum: Largest value allowed.
        above: Bound that the value must exceed.
        check: Returns what is wrong with a value ("must be ..."), or None.
        synonyms: Values that are accepted and stand for others.
    """
    facts = OptionFacts(
        help=help,
        choices=tuple(choices) if choices is not None else None,
        flag_aliases=tuple(flag_aliases),
        metavar=metavar,
        parse=parse,
        minimum=minimum,
        maximum=maximum,
        above=above,
        check=check,
        synonyms=synonyms,
    )
    return field(default=default, metadata={_KEY: facts})


@dataclass(frozen=True, slots=True)
class Declared:
    """An option as found in a script's options.

    Attributes:
        name: Flag without dashes, and TOML key.
        type: Annotated type of the field.
        default: The script's default.
        facts: The rest of the declaration.
        group: Name of the field that holds the option's group, or None for an option of its own.
        title: Heading in ``--help``.
    """

    name: str
    type: Any
    default: object
    facts: OptionFacts
    group: str | None
    title: str


def facts_of(item: "Field[Any]") -> OptionFacts | None:
    """The declaration that a field carries; None for a field that holds a group."""
    facts: OptionFacts | None = item.metadata.get(_KEY)
    return facts


def default_of(item: "Field[Any]", kind: Any) -> Any:
    """The default of a field, made by its type where it has none (a group whose options all have one)."""
    if item.default is not MISSING:
        return item.default
    return item.default_factory() if item.default_factory is not MISSING else kind()


def _title(kind: type) -> str:
    """A group's heading: the first line of its docstring."""
    return (kind.__doc__ or kind.__name__).strip().splitlines()[0].rstrip(".")


def _options_of(kind: type, defaults: object | None, group: str | None) -> Iterator[Declared]:
    hints = get_type_hints(kind)
    for item in fields(kind):
        facts = facts_of(item)
        if facts is not None:
            default = item.default if defaults is None else getattr(defaults, item.name)
            yield Declared(item.name, hints[item.name], default, facts, group, _title(kind))
        else:
            assert group is None, f"{kind.__name__}.{item.name} is no option"
            assert is_dataclass(hints[item.name]), f"{kind.__name__}.{item.name} is neither an option nor a group"
            yield from _options_of(hints[item.name], default_of(item, hints[item.name]), item.name)


def declarations(kind: type) -> dict[str, Declared]:
    """Every option of a script's options class by name, in order; its fields are groups or single options."""
    found: dict[str, Declared] = {}
    for declared in _options_of(kind, None, None):
        assert declared.name not in found, f"--{declared.name} is declared twice"
        found[declared.name] = declared
    return found
