"""What the outputs of a tagger stand for, and the words that are written for them."""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Final

from library.documents import read_table
from library.errors import UserError

_SHORT: Final = 3
"""Longest tag that keeps its underscores: ``^_^`` and other faces."""


class Category(Enum):
    """Kinds of tags."""

    RATING = "rating"
    GENERAL = "general"
    CHARACTER = "character"
    COPYRIGHT = "copyright"
    ARTIST = "artist"
    META = "meta"
    MODEL = "model"
    QUALITY = "quality"


_NUMBERS: Final = {
    "0": Category.GENERAL,
    "1": Category.ARTIST,
    "3": Category.COPYRIGHT,
    "4": Category.CHARACTER,
    "5": Category.META,
    "9": Category.RATING,
}
"""Danbooru's numbers for categories."""


@dataclass(frozen=True, slots=True)
class Label:
    """An output of a tagger.

    Attributes:
        name: The tag, as the tagger calls it.
        category: Its kind.
    """

    name: str
    category: Category


@dataclass(frozen=True, slots=True, kw_only=True)
class Wording:
    """How tags are written.

    Attributes:
        expands_characters: ``name_(series)`` becomes two tags.
        removes_underscores: Underscores of all but the shortest tags become spaces.
        replacements: Other words, by what would be written otherwise.
    """

    expands_characters: bool = False
    removes_underscores: bool = False
    replacements: Mapping[str, str]

    def words(self, label: Label) -> tuple[str, ...]:
        """What is written for ``label``: one tag, or the two parts of a character's name."""
        names = expanded(label.name) if self.expands_characters and label.category is Category.CHARACTER else None
        return tuple(self._word(name) for name in names or (label.name,))

    def _word(self, name: str) -> str:
        spaced = name.replace("_", " ") if self.removes_underscores and len(name) > _SHORT else name
        return self.replacements.get(spaced, spaced)


def expanded(name: str) -> tuple[str, str] | None:
    """The character and the series in ``name_(series)``; None for another name. The last bracket is the series."""
    character, bracket, series = name.rpartition("(")
    if not bracket or not name.endswith(")") or not character.rstrip("_"):
        return None
    return character.removesuffix("_"), series[:-1]


def parse_replacements(text: str) -> dict[str, str]:
    r"""The pairs in ``old,new;old,new``, where ``\,`` and ``\;`` are no separators.

    Raises:
        ValueError: A part is no pair; the message says which.
    """
    pairs: dict[str, str] = {}
    for part in _split(text, ";"):
        if not part.strip():
            continue
        words = [_plain(word).strip() for word in _split(part, ",")]
        if len(words) != 2 or not all(words):
            raise ValueError(f'must be "old,new" pairs separated by semicolons; {part!r} is none')
        pairs[words[0]] = words[1]
    return pairs


def _split(text: str, separator: str) -> list[str]:
    """``text`` at each ``separator`` that no backslash precedes."""
    parts = [""]
    for place, char in enumerate(text):
        if char == separator and text[place - 1 : place] != "\\":
            parts.append("")
        else:
            parts[-1] += char
    return parts


def _plain(text: str) -> str:
    return text.replace("\\,", ",").replace("\\;", ";")


def read_csv(path: Path) -> list[Label]:
    """The labels in ``selected_tags.csv``: columns ``tag_id``, ``name``, ``category`` and others.

    Raises:
        UserError: It is no such file.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = csv.DictReader(file)
            if not {"name", "category"} <= set(rows.fieldnames or ()):
                raise ValueError(f"its columns are {', '.join(rows.fieldnames or ['none'])}")
            return [Label(row["name"], _NUMBERS[row["category"]]) for row in rows]
    except KeyError as error:
        raise _broken(path, f"there is no category {error}") from error
    except (OSError, ValueError, csv.Error) as error:
        raise _broken(path, error) from error


def read_mapping(path: Path) -> list[Label]:
    """The labels in ``tag_mapping.json``: by number, each with a tag and a category, together or in two tables.

    Raises:
        UserError: It is no such file.
    """
    try:
        content: dict[str, Any] = read_table(path)
        if "idx_to_tag" in content:
            categories = content["tag_to_category"]
            found = {int(key): (tag, categories[tag]) for key, tag in content["idx_to_tag"].items()}
        else:
            found = {int(key): (entry["tag"], entry["category"]) for key, entry in content.items()}
        return [Label(*_kind(*found[number])) for number in range(len(found))]
    except KeyError as error:
        raise _broken(path, f"there is no {error}") from error
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise _broken(path, error) from error


def _kind(tag: str, category: str) -> tuple[str, Category]:
    return tag, Category(category.lower())


def _broken(path: Path, reason: object) -> UserError:
    return UserError(
        f"cannot read the tags of the tagger: {reason}",
        where=str(path),
        remedy="The file is damaged or of another kind of tagger: add --force_download, or put the right one there.",
    )


def categories(labels: Sequence[Label]) -> set[Category]:
    """The kinds of tags that there are."""
    return {label.category for label in labels}
