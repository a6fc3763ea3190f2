"""The VAE of a model, without the rest of the model."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.errors import UserError
from library.models.detect import describe_vae, vae_folder

if TYPE_CHECKING:
    import torch

FLAG = "model_name_or_path"
_REMEDY = "Give a Stable Diffusion 1.x or 2.x model: a file, a Diffusers folder or a hub id; or a VAE alone."


def check_vae_source(source: str) -> None:
    """Check, without loading it, that ``source`` is a model with a VAE, or a VAE.

    Raises:
        UserError: It is not there, or something else.
    """
    _local(source)


def _local(source: str) -> Path | None:
    """The file, or the VAE's folder; None for a hub id."""
    try:
        return describe_vae(source)
    except UserError as error:
        # It was not given as a replacement for a model's VAE, which is what the message speaks of.
        raise UserError.of(
            replace(problem, where=f"{FLAG} {source}", remedy=problem.remedy if "mean" in str(problem) else _REMEDY)
            for problem in error.problems
        ) from error


def load_vae(source: str, dtype: "torch.dtype") -> Any:
    """The VAE (an ``AutoencoderKL``) of ``source``, in evaluation mode on the CPU.

    Args:
        source: A checkpoint (whole, or a VAE alone), a Diffusers folder (whole, or that of a VAE), or a hub id.
        dtype: What its weights become.

    Raises:
        UserError: There is no usable VAE.
    """
    from library.models.hub import fetch_vae
    from library.models.parts import prepare_vae
    from library.models.stable_diffusion import read_vae

    where = f"{FLAG} {source}"
    weights = read_vae(_local(source) or vae_folder(fetch_vae(source)), where=where)
    return prepare_vae(weights.config, weights.tensors, dtype=dtype, where=where).module
