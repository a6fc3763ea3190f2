"""Read a dataset file, TOML or JSON: its sections with converted values, and everything that is wrong with it."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from library.data.findings import Finding, error
from library.data.schema import CAPTION_DROPOUT_KEYS, ELSEWHERE, KEYS, Key, Scope
from library.data.source_lines import KeyPath, json_lines, line_of, toml_lines
from library.documents import DocumentError, decode_text, parse_json, parse_toml
from library.errors import UserError

_GENERAL: Final = ("general", "generale")
_SUBSETS: Final = ("subsets", "sottoinsiemi")
_TITLES: Final[Mapping[Scope, str]] = MappingProxyType(
    {"general": "[general]", "dataset": "[[datasets]]", "subset": "[[datasets.subsets]]"}
)


_MOST_MISTAKES: Final = 100
"""Those of one file that are told: looking for the nearest name of each takes time."""


@dataclass(frozen=True, slots=True)
class Section:
    """Values given at one place.

    Attributes:
        where: The place, for messages.
        values: Converted values by key; a key that is missing or wrong is absent.
        places: Where each value stands.
    """

    where: str
    values: Mapping[str, Any] = field(default_factory=dict)
    places: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class DatasetSection:
    """One ``[[datasets]]`` table and its subsets."""

    section: Section
    subsets: tuple[Section, ...]


@dataclass(frozen=True, slots=True)
class DatasetFile:
    """A dataset file as written: nothing has fallen back yet."""

    general: Section
    datasets: tuple[DatasetSection, ...]


def read_dataset_file(path: Path, *, caption_dropout: bool) -> tuple[DatasetFile, list[Finding]]:
    """The sections of the dataset file ``path``, and every mistake in them.

    Args:
        path: A ``.toml`` or ``.json`` file.
        caption_dropout: Whether the training method can leave captions out.

    Raises:
        UserError: The file is missing, or no TOML or JSON.
    """
    content, lines = _parse(path)
    reader = _Reader(str(path), lines, caption_dropout, [])
    return reader.file(content), reader.findings


def _parse(path: Path) -> tuple[Mapping[str, Any], Mapping[KeyPath, int]]:
    parsers: Mapping[str, tuple[Callable[[str], Any], Callable[[str], dict[KeyPath, int]]]] = {
        ".toml": (parse_toml, toml_lines),
        ".json": (parse_json, json_lines),
    }
    if path.suffix.lower() not in parsers:
        raise UserError(
            f"a dataset file is .toml or .json, not {path.suffix!r}",
            where="--dataset_config",
            remedy="Rename the file.",
        )
    text = _read_text(path)
    loads, find_lines = parsers[path.suffix.lower()]
    try:
        content = loads(text)
    except DocumentError as mistake:
        raise UserError(
            f"the file cannot be read: {mistake}", where=str(path), remedy=_syntax_remedy(text)
        ) from mistake
    if not isinstance(content, dict):
        raise UserError("the file holds no table", where=str(path), remedy='Begin with {"datasets": [...]}.')
    return content, find_lines(text)


def _read_text(path: Path) -> str:
    if not path.is_file():
        near = get_close_matches(path.name, _file_names(path.parent), n=1)
        remedy = f"Did you mean '{path.parent / near[0]}'?" if near else "Check the path."
        raise UserError(f"dataset file not found: '{path}'", where="--dataset_config", remedy=remedy)
    try:
        return decode_text(path.read_bytes())
    except OSError as mistake:
        raise UserError(
            f"the file cannot be read: {mistake.strerror or mistake}", where=str(path), remedy="Check its permissions."
        ) from mistake
    except DocumentError as mistake:
        raise UserError(
            str(mistake).replace("it is", "the file is"),
            where=str(path),
            remedy="Open it in an editor and save it with the encoding UTF-8.",
        ) from mistake


def _file_names(folder: Path) -> list[str]:
    return [entry.name for entry in folder.iterdir()] if folder.is_dir() else []


def _syntax_remedy(text: str) -> str:
    if '"' in text and "\\" in text:
        return "Mend that line. Windows paths go between single quotes: image_dir = 'C:\\images\\dog'."
    return "Mend that line. Texts go between quotes, and true and false are written small."


@dataclass(frozen=True, slots=True)
class _Reader:
    """Walks through a parsed file and collects what is wrong."""

    name: str
    lines: Mapping[KeyPath, int]
    caption_dropout: bool
    findings: list[Finding]

    def file(self, content: Mapping[str, Any]) -> DatasetFile:
        general_name = self._one_of(_GENERAL, content, ())
        known = {general_name, "datasets"}
        for name in content:
            if name not in known:
                self._refuse_top_level(name)
        general = content.get(general_name, {})
        if not isinstance(general, Mapping):
            self._report(f"{general_name} must be a table", (general_name,), "Write [general] above its keys.")
            general = {}
        datasets = self._tables(content.get("datasets", []), ("datasets",), "[[datasets]]")
        return DatasetFile(
            self._section(general, (general_name,), "general"),
            tuple(self._dataset(table, ("datasets", index)) for index, table in enumerate(datasets)),
        )

    def _dataset(self, table: Mapping[str, Any], path: KeyPath) -> DatasetSection:
        subsets_name = self._one_of(_SUBSETS, table, path)
        subsets = self._tables(table.get(subsets_name, []), (*path, subsets_name), "[[datasets.subsets]]")
        own = {name: value for name, value in table.items() if name != subsets_name}
        return DatasetSection(
            self._section(own, path, "dataset"),
            tuple(
                self._section(subset, (*path, subsets_name, index), "subset") for index, subset in enumerate(subsets)
            ),
        )

    def _one_of(self, names: Sequence[str], table: Mapping[str, Any], path: KeyPath) -> str:
        """Which of the names of a section the file uses."""
        used = [name for name in names if name in table]
        if len(used) > 1:
            self._report(f"{used[0]} and {used[1]} mean the same", (*path, used[1]), f"Call both {used[0]}.")
            return used[0]
        return used[0] if used else names[0]

    def _tables(self, value: object, path: KeyPath, title: str) -> list[Mapping[str, Any]]:
        if isinstance(value, list) and all(isinstance(table, Mapping) for table in value):
            return value
        self._report(f"{path[-1]} must be a list of tables", path, f"Write {title} with double brackets.")
        return [value] if isinstance(value, Mapping) else []

    def _section(self, table: Mapping[str, Any], path: KeyPath, scope: Scope) -> Section:
        values: dict[str, Any] = {}
        places: dict[str, str] = {}
        for name, value in table.items():
            key = KEYS.get(name)
            if key is None:
                self._refuse_unknown(name, (*path, name), scope)
            elif value is not None and self._is_accepted(key, value, (*path, name), scope):
                values[name] = key.kind.read(value)
                places[name] = self._where((*path, name))
        return Section(self._where(path), values, places)

    def _is_accepted(self, key: Key, value: object, path: KeyPath, scope: Scope) -> bool:
        if scope not in key.scopes:
            right = " or ".join(_TITLES[allowed] for allowed in key.scopes)
            self._report(f"{key.name} does not belong under {_TITLES[scope]}", path, f"Move it to {right}.")
            return False
        if key.name in CAPTION_DROPOUT_KEYS and not self.caption_dropout:
            self._report(f"{key.name} has no meaning here: this method needs every caption", path, "Remove the line.")
            return False
        try:
            key.kind.read(value)
        except ValueError:
            remedy = f"Write for example: {key.name} = {key.kind.example}"
            if key.name == "num_repeats":
                remedy += "; to leave images out, remove their [[datasets.subsets]]."
            self._report(f"{key.name} must be {key.kind.expected}, not {_as_written(value)}", path, remedy)
            return False
        return True

    def _refuse_unknown(self, name: str, path: KeyPath, scope: Scope) -> None:
        if len(self.findings) > _MOST_MISTAKES:
            return
        what = f"unknown key under {_TITLES[scope]}: {name}"
        if name in ELSEWHERE:
            self._report(f"{name} is no key of a dataset file", path, ELSEWHERE[name])
            return
        here = [key.name for key in KEYS.values() if scope in key.scopes]
        sections = {"general": [], "dataset": ["subsets"], "subset": []}[scope]
        near = get_close_matches(name.lower(), [*here, *sections], n=1) or get_close_matches(name.lower(), KEYS, n=1)
        self._report(what, path, f"Did you mean {near[0]}?" if near else "Remove the line.")

    def _refuse_top_level(self, name: str) -> None:
        if name in KEYS:
            scopes = " or ".join(_TITLES[scope] for scope in KEYS[name].scopes)
            self._report(f"{name} stands outside of every section", (name,), f"Move it under {scopes}.")
        elif name in _SUBSETS:
            self._report(
                f"{name} stands outside of a data set", (name,), "Write [[datasets]], then [[datasets.subsets]]."
            )
        else:
            titles = {"general": "[general]", "datasets": "[[datasets]]"}
            near = get_close_matches(name.lower(), titles, n=1)
            self._report(
                f"unknown section or key: {name}",
                (name,),
                f"Did you mean {titles[near[0]]}?" if near else "A dataset file has [general] and [[datasets]] only.",
            )

    def _where(self, path: KeyPath) -> str:
        line = line_of(path, self.lines)
        return f"{self.name}:{line}" if line else self.name

    def _report(self, what: str, path: KeyPath, remedy: str) -> None:
        if len(self.findings) == _MOST_MISTAKES:
            what, remedy = "further mistakes are not listed", "Mend these first."
        if len(self.findings) <= _MOST_MISTAKES:
            self.findings.append(error(what, self._where(path), remedy))


def _as_written(value: object) -> str:
    return json.dumps(value, default=str, ensure_ascii=False)
