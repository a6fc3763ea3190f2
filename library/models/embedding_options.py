"""Options of new words for the text encoder: textual inversion and its extended form. Imports nothing heavy."""

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from library.errors import Problem
from library.options import near_remedy, option

_SYNTAX: Final = frozenset("()[]{}|\\,")


@dataclass(frozen=True, kw_only=True, slots=True)
class EmbeddingOptions:
    """New word."""

    token_string: str | None = option(
        None,
        metavar="WORD",
        help="The new word, as captions and prompts will use it; it must not be a piece of the tokenizer's vocabulary.",
    )
    num_vectors_per_token: int = option(
        1,
        minimum=1,
        metavar="N",
        help="Vectors of the new word: each is a token of its own (WORD, WORD1, WORD2 ...) and takes one of 75 places.",
    )
    init_word: str | None = option(
        None,
        metavar="TEXT",
        help="Known word or words whose embeddings the vectors begin with, in turn; drawn at random when absent.",
    )
    weights: Path | None = option(None, metavar="FILE", help="Embedding file to go on from; wins over --init_word.")
    use_object_template: bool = option(
        False,
        help="Use sentences such as 'a photo of a WORD' in place of the captions; wins over --use_style_template.",
    )
    use_style_template: bool = option(
        False, help="Use sentences such as 'a painting in the style of WORD' in place of the captions."
    )
    save_model_as: str = option(
        "pt",
        choices=("ckpt", "pt", "safetensors", "bin"),
        help="Format of the trained file; bin is that of diffusers' concepts.",
    )

    def problems(self) -> list[Problem]:
        """A missing or unusable word, and a file that is not there."""
        found = self._word_problems()
        if self.weights is not None and not self.weights.is_file():
            found.append(Problem(f"embedding file not found: {self.weights}", "--weights", near_remedy(self.weights)))
        if self.init_word is not None and not self.init_word.strip():
            found.append(Problem("--init_word is empty", "--init_word", "Give a word, or leave it out."))
        return found

    def _word_problems(self) -> list[Problem]:
        if not self.token_string:
            return [
                Problem(
                    "--token_string is missing: training needs a new word",
                    "--token_string",
                    "Give a word that means nothing yet, for example --token_string=zwx, and use it in the captions.",
                )
            ]
        wrong = sorted({sign for sign in self.token_string if sign.isspace() or sign in _SYNTAX})
        if not wrong:
            return []
        return [
            Problem(
                f"--token_string '{self.token_string}' has {' '.join(map(repr, wrong))} in it",
                "--token_string",
                "Use one word without spaces, commas, brackets, bars or backslashes.",
            )
        ]

    def notices(self) -> list[str]:
        """Which of two options holds."""
        found = []
        if self.use_object_template and self.use_style_template:
            found.append("--use_object_template is used, --use_style_template is not")
        if self.weights is not None and self.init_word is not None:
            found.append("--weights is used, --init_word is not")
        return found
