"""Options of the tagger. Imports nothing heavy."""

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from finetune.tagger_labels import Category, parse_replacements
from finetune.tagger_rules import Place, Rules
from library.errors import Problem
from library.options import option

_CONVNEXT: Final = "SmilingWolf/wd-v1-4-convnext-tagger-v2"
_MAPPED: Final = "Only taggers with a tag_mapping.json know such tags."


def _threshold(what: str, *, note: str = "") -> float | None:
    help_text = f"Confidence from which on {what} tags are taken; --thresh when absent. {note}".strip()
    return option(None, minimum=0, maximum=1, metavar="P", help=help_text)  # type: ignore[no-any-return]


def _replacements(text: str) -> str | None:
    try:
        parse_replacements(text)
    except ValueError as error:
        return str(error)
    return None


@dataclass(frozen=True, kw_only=True, slots=True)
class TaggerOptions:
    """Tagger."""

    repo_id: str = option(
        _CONVNEXT,
        metavar="ID",
        help="Hub id of the tagger: owner/name with model.onnx and selected_tags.csv, or owner/name/folder with "
        "model_optimized.onnx and tag_mapping.json.",
    )
    model_dir: Path = option(
        Path("wd14_tagger_model"),
        metavar="DIR",
        help="Where taggers are kept, each in a folder named by its hub id; or a folder that holds one itself. What is "
        "missing is downloaded.",
    )
    force_download: bool = option(False, help="Download the tagger again.")
    onnx: bool = option(False, help="Accepted for old command lines: taggers always run in ONNX Runtime.")


@dataclass(frozen=True, kw_only=True, slots=True)
class ThresholdOptions:
    """Thresholds."""

    thresh: float = option(
        0.35, minimum=0, maximum=1, metavar="P", help="Confidence from which on a tag is taken: less gives more tags."
    )
    general_threshold: float | None = _threshold("general")
    character_threshold: float | None = _threshold("character")
    meta_threshold: float | None = _threshold("meta", note=_MAPPED)
    model_threshold: float | None = _threshold("model", note=_MAPPED)
    copyright_threshold: float | None = _threshold("copyright", note=_MAPPED)
    artist_threshold: float | None = _threshold("artist", note=_MAPPED)

    def by_category(self) -> dict[Category, float]:
        """The threshold of every category that has one."""
        given = {
            Category.GENERAL: self.general_threshold,
            Category.CHARACTER: self.character_threshold,
            Category.META: self.meta_threshold,
            Category.MODEL: self.model_threshold,
            Category.COPYRIGHT: self.copyright_threshold,
            Category.ARTIST: self.artist_threshold,
        }
        return {category: self.thresh if value is None else value for category, value in given.items()}


@dataclass(frozen=True, kw_only=True, slots=True)
class TagOptions:
    """Tags."""

    remove_underscore: bool = option(
        False, help="Write spaces for underscores, but in tags of up to three characters such as ^_^."
    )
    character_tag_expand: bool = option(False, help="Make two tags of name_(series): name, and series.")
    tag_replacement: str | None = option(
        None,
        metavar="TEXT",
        check=_replacements,
        help='Other words for tags, as "old,new;old,new", compared after underscores are removed; a comma or semicolon '
        "inside a tag is written \\, or \\;.",
    )
    undesired_tags: str = option(
        "", metavar="TAGS", help="Tags to leave out, separated as in the output and written as there."
    )
    use_rating_tags: bool = option(False, help="Put the likeliest rating first.")
    use_rating_tags_as_last_tag: bool = option(False, help="Put the likeliest rating last.")
    use_quality_tags: bool = option(False, help=f"Put the likeliest quality tag first. {_MAPPED}")
    use_quality_tags_as_last_tag: bool = option(False, help=f"Put the likeliest quality tag last. {_MAPPED}")
    character_tags_first: bool = option(False, help="Put character tags before general ones, the last one first.")
    always_first_tags: str | None = option(
        None,
        metavar="TAGS",
        help="Tags that, where they are found, come first of all; the last of this list becomes the very first.",
    )
    caption_separator: str = option(", ", metavar="TEXT", help="What separates tags; without its spaces in lists.")

    def problems(self) -> list[Problem]:
        """A separator that separates nothing."""
        if self.caption_separator.strip():
            return []
        what = f"--caption_separator {self.caption_separator!r} has no character but spaces"
        return [Problem(what, "--caption_separator", 'Use ", " or another sign.')]

    def notices(self) -> list[str]:
        """Contradictions that are decided."""
        return [
            f"--use_{kind}_tags wins over --use_{kind}_tags_as_last_tag"
            for kind in ("rating", "quality")
            if getattr(self, f"use_{kind}_tags") and getattr(self, f"use_{kind}_tags_as_last_tag")
        ]

    def listed(self, text: str | None) -> list[str]:
        """The tags of an option that lists some."""
        parts = (text or "").split(self.caption_separator.strip())
        return [part.strip() for part in parts if part.strip()]

    def rules(self, thresholds: ThresholdOptions) -> Rules:
        """How tags are chosen and put in order."""
        return Rules(
            thresholds=thresholds.by_category(),
            rating=_place(self.use_rating_tags, self.use_rating_tags_as_last_tag),
            quality=_place(self.use_quality_tags, self.use_quality_tags_as_last_tag),
            characters_first=self.character_tags_first,
            undesired=frozenset(self.listed(self.undesired_tags)),
            first=tuple(self.listed(self.always_first_tags)),
        )


def _place(is_first: bool, is_last: bool) -> Place | None:
    return Place.FIRST if is_first else Place.LAST if is_last else None


@dataclass(frozen=True, kw_only=True, slots=True)
class OutputOptions:
    """Output."""

    output_path: Path | None = option(
        None,
        metavar="FILE",
        help="Write one metadata file (.json, or .jsonl with an object a line) instead of a text file for each image.",
    )
    append_tags: bool = option(False, help="Keep the tags that an image has already, and add only new ones.")
    frequency_tags: bool = option(False, help="Show at the end how often each tag was given.")

    def problems(self) -> list[Problem]:
        """An output of another format."""
        if self.output_path is None or self.output_path.suffix.lower() in (".json", ".jsonl"):
            return []
        what = f"--output_path {self.output_path} is neither .json nor .jsonl"
        return [Problem(what, "--output_path", "Use one of these suffixes.")]
