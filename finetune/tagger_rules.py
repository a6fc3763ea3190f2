"""From probabilities to tags in order."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any, Final

from finetune.tagger_labels import Category, Label, Wording

if TYPE_CHECKING:
    from numpy.typing import NDArray

_ORDER: Final = (
    Category.GENERAL,
    Category.CHARACTER,
    Category.COPYRIGHT,
    Category.ARTIST,
    Category.META,
    Category.MODEL,
)
"""Categories in the order of their tags; each tag stands where it stands in the tagger."""


class Place(Enum):
    """Where the one tag of a category stands."""

    FIRST = "first"
    LAST = "last"


@dataclass(frozen=True, kw_only=True, slots=True)
class Rules:
    """How tags are chosen and put in order.

    Attributes:
        thresholds: Probability from which on a tag of a category is taken.
        rating: Where the likeliest rating stands; None leaves it out.
        quality: Where the likeliest quality stands; None leaves it out.
        characters_first: Characters stand before all others, each before the one found earlier.
        undesired: Tags that are left out, as they are written.
        first: Tags that are moved to the front one after the other, so that the last one comes first.
    """

    thresholds: Mapping[Category, float]
    rating: Place | None = None
    quality: Place | None = None
    characters_first: bool = False
    undesired: frozenset[str] = frozenset()
    first: tuple[str, ...] = ()


class Chooser:
    """Chooses tags for the outputs of one tagger."""

    def __init__(self, labels: Sequence[Label], wording: Wording, rules: Rules) -> None:
        """Prepare the words of ``labels``."""
        import numpy as np

        self._words = [wording.words(label) for label in labels]
        self._rules = rules
        self._numbers = {
            category: np.array([place for place, label in enumerate(labels) if label.category is category], np.int64)
            for category in Category
        }

    @property
    def vocabulary(self) -> set[str]:
        """Every tag that can be written."""
        return {word for words in self._words for word in words}

    def choose(self, probabilities: "NDArray[Any]") -> list[str]:
        """The tags for an image, in order, each once.

        Args:
            probabilities: (labels,), each in 0..1.
        """
        rules = self._rules
        tags: list[str] = []
        for category in _ORDER:
            numbers = self._numbers[category]
            for number in numbers[probabilities[numbers] >= rules.thresholds[category]]:
                words = self._allowed(int(number), tags)
                goes_first = rules.characters_first and category is Category.CHARACTER
                tags = [*words, *tags] if goes_first else [*tags, *words]
        for category, place in ((Category.QUALITY, rules.quality), (Category.RATING, rules.rating)):
            numbers = self._numbers[category]
            if place is not None and numbers.size:
                words = self._allowed(int(numbers[probabilities[numbers].argmax()]), tags)
                tags = [*words, *tags] if place is Place.FIRST else [*tags, *words]
        for tag in rules.first:
            if tag in tags:
                tags.remove(tag)
                tags.insert(0, tag)
        return tags

    def by_category(self, tags: Sequence[str]) -> dict[str, list[str]]:
        """``tags`` by the category they are from."""
        owners = {
            word: category
            for category, numbers in self._numbers.items()
            for place in numbers
            for word in self._words[place]
        }
        found: dict[str, list[str]] = {}
        for tag in tags:
            if tag in owners:
                found.setdefault(owners[tag].value, []).append(tag)
        return found

    def _allowed(self, number: int, tags: Sequence[str]) -> list[str]:
        return [word for word in self._words[number] if word not in self._rules.undesired and word not in tags]
