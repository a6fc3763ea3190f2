"""What is checked before a new word is trained, and what a dry run tells of it."""

import logging
from collections.abc import Sequence

from library.data.findings import warnings_of
from library.errors import Problem
from library.inputs import Inputs, check_inputs
from library.inspection import dry_run
from library.models.size import text_width_of_model
from library.new_words import Rewording, check_captions, word_notices, word_support
from library.textual_inversion_options import TextualInversionOptions

log = logging.getLogger(__name__)


def new_word_inputs(options: TextualInversionOptions, rewording: Rewording, *, more: Sequence[Problem]) -> Inputs:
    """Everything that is read, with the word in captions; warnings go to the log.

    Args:
        options: The options.
        rewording: Puts the word into captions.
        more: What stands against the word.

    Raises:
        UserError: With every problem found.
    """
    inputs = check_inputs(options, more=more, support=word_support(options.embedding))
    for finding in warnings_of(check_captions(rewording, inputs.spec, inputs.records)):
        log.warning("%s", finding)
    for notice in word_notices(options.embedding):
        log.warning(notice)
    return inputs


def new_word_dry_run(options: TextualInversionOptions, inputs: Inputs, rewording: Rewording, *, layers: int = 1) -> int:
    """Print what a run would do; returns the exit code.

    Args:
        options: The options.
        inputs: The checked inputs.
        rewording: Puts the word into captions.
        layers: Embeddings of each token.
    """
    width = text_width_of_model(options.model.pretrained_model_name_or_path)
    return dry_run(
        options,
        inputs,
        suffix=f".{options.embedding.save_model_as}",
        trained_values=None if width is None else layers * options.embedding.num_vectors_per_token * width,
        rewording=rewording,
    )
