"""The models that the tools for network files work on, told of by the option that names them."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from library.errors import UserError, raise_if_any
from library.models.detect import SourceFacts, describe_source, family_problems
from library.models.options import ModelOptions, PromptOptions
from library.models.recognise import MODEL_FLAG

if TYPE_CHECKING:
    import torch

    from library.models.stable_diffusion import StableDiffusion


def described_model(source: str, flag: str, *, v2: bool) -> tuple[SourceFacts, ModelOptions]:
    """What the model at ``source`` is, and how it is loaded.

    Raises:
        UserError: It is not there or of another kind, or ``--v2`` contradicts it; told of the option ``flag``.
    """
    with _told_of(flag):
        facts = describe_source(source)
        stated = facts.prediction == "v_prediction"
        options = ModelOptions(pretrained_model_name_or_path=source, v2=v2, v_parameterization=stated)
        raise_if_any(family_problems(facts, options))
    return facts, options


def loaded_model(options: ModelOptions, flag: str, *, dtype: "torch.dtype | None" = None) -> "StableDiffusion":
    """Load a model with its weights in ``dtype``, float32 when absent.

    Raises:
        UserError: It cannot be loaded; told of the option ``flag``.
    """
    import torch

    from library.models.stable_diffusion import load_stable_diffusion

    with _told_of(flag):
        return load_stable_diffusion(options, PromptOptions(), dtype=dtype or torch.float32)


@contextmanager
def _told_of(flag: str) -> Iterator[None]:
    """Problems are told of ``flag`` in place of the option that training has for its model."""
    try:
        yield
    except UserError as error:
        told = [replace(one, where=(one.where or flag).replace(MODEL_FLAG, flag)) for one in error.problems]
        raise UserError.of(told) from error
