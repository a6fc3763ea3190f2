"""Save a whole model in every format, atomically, completed by what its source holds."""

from collections.abc import Mapping
from pathlib import Path

import torch

from library.models.diffusers_folder import write_folder
from library.models.exact_parts import with_exact_parts
from library.models.formats import ModelFormat, suffix_of
from library.models.ldm_file import Progress, write_ldm
from library.models.origin import source_checkpoint
from library.models.stable_diffusion import StableDiffusion


def save_model(
    path: Path,
    model: StableDiffusion,
    *,
    format: ModelFormat,
    dtype: torch.dtype | None,
    metadata: Mapping[str, str],
    step: int,
    epoch: int,
) -> None:
    """Write ``model`` to ``path``, whole or not at all; what had the name stays until the new one is complete.

    A single file takes over every other tensor of the file the model came from (schedule tables, EMA copies, unused
    layers), in its own dtype. A ``.ckpt`` has ``epoch`` and ``global_step``, counted on from those of a source
    ``.ckpt``, and no metadata; a folder has the metadata in ``training_metadata.json``.

    Args:
        path: Final name; it ends with :func:`library.models.formats.suffix_of` the format.
        model: The model, on any device. Parts that training did not change are written in the source's precision.
        format: What to write.
        dtype: Cast the weights to it; each as it is when absent.
        metadata: Text about the model.
        step: Number of finished optimizer steps.
        epoch: Number of finished epochs.

    Raises:
        UserError: A weight is not finite in ``dtype`` (nothing is written), or the place cannot be written to.
    """
    model = with_exact_parts(model)
    if format in ("diffusers", "diffusers_safetensors"):
        write_folder(path, model, safetensors=format == "diffusers_safetensors", dtype=dtype, metadata=metadata)
        return
    assert path.suffix.lower() == suffix_of(format), "the name says what the file is"
    write_ldm(
        path,
        text_encoder=model.text_encoder,
        vae=model.vae,
        unet=model.unet,
        v2=model.variant.name == "sd2",
        dtype=dtype,
        metadata=metadata,
        source=source_checkpoint(model.origin),
        progress=Progress(step=step, epoch=epoch),
    )
