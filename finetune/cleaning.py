"""How automatic captions and tags are tidied up.

Tags lose their underscores and the rating at the end; a word goes where a longer tag says it more exactly; and where
several people are in a picture, features that contradict each other go, as nothing tells whose they are. Captions get
one word for what captioning models call by many.
"""

import re
from collections.abc import Iterator
from typing import Final

_SEPARATOR: Final = ", "
_RATING: Final = ", rating"
_FACE: Final = "^_^"
_KEPT_FACE: Final = "^\0^"
_SEVERAL_PEOPLE: Final = ("girls", "boys")
_WORD: Final = re.compile(r"[\w-]+")

# Of each group a person has one: its length of hair, its eyes, and so on.
_FEATURES: Final = tuple(
    re.compile(pattern)
    for pattern in (
        r"(?:long|short|medium) hair",
        r"(?:bob|hime) cut",
        r"[\w-]+ eyes",
        r"(?:[\w-]+ sleeves|sleeveless)",
        r"(?:ponytail|braid|ahoge|twintails|[\w-]+ bun|single hair bun|single side bun|two side up|two tails|"
        r"[\w-]+ braid|sidelocks)",
        r"(?!(?:long|short|medium) hair)[\w-]+ hair",
    )
)

_STYLES: Final = ("anime", "cartoon")
_ONE: Final = ("female", "lady", "woman")
_MANY: Final = ("women",)


def _replacements() -> Iterator[tuple[str, str]]:
    """Texts and what stands for them, in the order in which they are looked for."""
    yield "anime anime", "anime"
    yield "young ", ""
    for style in _STYLES:
        for noun in (*_ONE, "girl", "character"):
            yield f"{style} {noun}", "girl"
        for noun in _MANY:
            yield f"{style} {noun}", "girls"
    for noun in (*_ONE, "person"):
        yield noun, "girl"
    for noun in (*_MANY, "people"):
        yield noun, "girls"
    for style in ("a cartoon", "an anime cartoon", "a cartoon anime"):
        for article, kind in (("a", "figure"), ("an", "image"), ("a", "picture"), ("a", "drawing")):
            yield f"{style} {kind}", f"{article} {kind}"
    yield "girl girl", "girl"


_CAPTION_WORDS: Final = tuple(_replacements())


def clean_tags(text: str) -> str:
    """``text``, tags with commas between, tidied up."""
    spaced = text.replace(_FACE, _KEPT_FACE).replace("_", " ").replace(_KEPT_FACE, _FACE)
    kept = spaced.partition(_RATING)[0]
    tags = [tag for part in kept.split(",") if (tag := part.strip())]
    if any(word in kept for word in _SEVERAL_PEOPLE):
        for feature in _FEATURES:
            tags = _without_contradictions(tags, feature)
    endings = {tag.rpartition(" ")[2] for tag in tags if " " in tag}
    return _SEPARATOR.join(tag for tag in tags if not (_WORD.fullmatch(tag) and tag in endings))


def _without_contradictions(tags: list[str], feature: re.Pattern[str]) -> list[str]:
    found = [tag for tag in tags if feature.fullmatch(tag)]
    return [tag for tag in tags if tag not in found] if len(found) > 1 else tags


def clean_caption(text: str) -> str:
    """``text``, a caption, with one word for each thing."""
    for found, replacement in _CAPTION_WORDS:
        while found in text:
            text = text.replace(found, replacement)
    return text
