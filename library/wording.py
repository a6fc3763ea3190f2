"""Wording that messages share, and labels of pictures."""

import unicodedata
from collections.abc import Sequence


def named(names: Sequence[str], most: int, *, between: str = ", ") -> str:
    """The first ``most`` of ``names``, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return between.join(names[:most]) + more


def label(text: str, longest: int) -> str:
    """``text`` on one line of at most ``longest`` letters (3 or more), as Pillow's built-in font can draw it.

    Of letters that it lacks, the plain letter or a question mark.
    """
    plain = "".join(letter for letter in unicodedata.normalize("NFKD", text) if not unicodedata.combining(letter))
    line = " ".join(plain.split()).encode("ascii", "replace").decode("ascii")
    return f"{line[: longest - 3]}..." if len(line) > longest else line
