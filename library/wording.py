"""Wording that many messages share."""

from collections.abc import Sequence


def named(names: Sequence[str], most: int, *, between: str = ", ") -> str:
    """The first ``most`` of ``names``, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return between.join(names[:most]) + more
