"""Load a Stable Diffusion model from whatever form it is in: one file, a Diffusers folder, or the hub."""

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from library.errors import Problem, raise_if_any
from library.files import read_tensors
from library.models import ldm_keys
from library.models.deferred import DeferredModule
from library.models.detect import (
    PARTS,
    SourceFacts,
    describe_source,
    describe_vae,
    family_problems,
    prediction_notices,
    read_config,
    vae_folder,
    weight_file,
)
from library.models.hub import fetch_model, fetch_vae
from library.models.ldm_file import PartWeights, split_checkpoint, vae_of_checkpoint
from library.models.options import ModelOptions, PromptOptions
from library.models.origin import Origin, origin_of
from library.models.parts import build_text_encoder, build_unet, prepare_vae
from library.models.recognise import MODEL_FLAG, VAE_FLAG, checkpoint_family
from library.models.tokenizer import has_tokenizer, load_tokenizer, read_tokenizer, tokenizer_folders
from library.models.variant import Family, Variant, variant_of

_LOG = logging.getLogger(__name__)


@dataclass(slots=True, kw_only=True)
class StableDiffusion:
    """The four parts of a model, in evaluation mode and without gradients.

    Attributes:
        tokenizer: A ``CLIPTokenizer``.
        text_encoder: A ``CLIPTextModel`` (flat: no ``text_model`` inside).
        deferred_vae: The VAE, which takes its weights when :attr:`vae` is first asked for: a run on cached latents that
            shows no previews never does.
        unet: A ``UNet2DConditionModel``.
        variant: What kind of Stable Diffusion it is.
        source: The file's or folder's name, or the hub id: never a path.
        origin: The file or folder itself, for saving; None for a model that was made in memory.
        zero_terminal_snr: Whether it was trained on the schedule that leaves nothing of the image at its end.
    """

    tokenizer: Any
    text_encoder: Any
    deferred_vae: DeferredModule
    unet: Any
    variant: Variant
    source: str
    origin: Origin | None = None
    zero_terminal_snr: bool = False

    @property
    def vae(self) -> Any:
        """The VAE, an ``AutoencoderKL``."""
        return self.deferred_vae.module


def load_stable_diffusion(
    model: ModelOptions,
    prompts: PromptOptions,
    *,
    dtype: torch.dtype = torch.float32,
    unet_dtype: torch.dtype | None = None,
    text_encoder_dtype: torch.dtype | None = None,
) -> StableDiffusion:
    """Load the base model, with the VAE replaced where ``--vae`` says so.

    Weights that are in ``dtype`` already are used where they lie (a ``.safetensors`` file is mapped, not read), so a
    model needs little more memory than its own size. The VAE takes its weights when it is first used.

    Args:
        model: Where the model is and what it is.
        prompts: ``tokenizer_cache_dir`` is read from it.
        dtype: What the weights become; the VAE's stay in float32 with ``--no_half_vae``.
        unet_dtype: What the U-Net's weights become, where it is another dtype.
        text_encoder_dtype: What the text encoder's weights become, where it is another dtype.

    Raises:
        UserError: Nothing usable there, or ``--v2`` contradicts what is there.
    """
    facts = describe_source(model.pretrained_model_name_or_path)
    if facts.kind == "hub":
        facts = replace(describe_source(str(fetch_model(facts.name))), name=facts.name)
    raise_if_any(family_problems(facts, model))
    assert facts.path, "what is loaded has a path"
    origin = origin_of(facts.path)
    where = f"{MODEL_FLAG} {facts.path}"
    vae_where = f"{VAE_FLAG} {model.vae}" if model.vae else where
    weights = _read_file(facts, model) if facts.kind == "file" else _read_folder(facts)
    for notice in prediction_notices(facts, model):
        _LOG.warning(notice)
    if model.vae:
        weights["vae"] = read_vae(describe_vae(model.vae) or vae_folder(fetch_vae(model.vae)), where=vae_where)
    unet, vae, text = (weights.pop(part) for part in PARTS)
    family: Family = "sd2" if model.v2 else "sd1"
    if family == "sd2":
        # The same numbers either way, and adapters of SD2 are shaped for matrices.
        unet.config["use_linear_projection"] = True
    text_encoder = build_text_encoder(text.config, text.tensors, dtype=text_encoder_dtype or dtype, where=where)
    width, vocabulary = text_encoder.config.hidden_size, text_encoder.config.vocab_size
    loaded = StableDiffusion(
        tokenizer=_tokenizer(facts, prompts, family, vocabulary),
        text_encoder=text_encoder,
        # Some VAEs overflow in 16 bits.
        deferred_vae=prepare_vae(
            vae.config, vae.tensors, dtype=torch.float32 if model.no_half_vae else dtype, where=vae_where
        ),
        unet=build_unet(unet.config, unet.tensors, dtype=unet_dtype or dtype, where=where),
        variant=variant_of(v2=model.v2, v_parameterization=model.v_parameterization, text_width=width),
        source=facts.name,
        origin=origin,
    )
    raise_if_any(_mismatches(loaded, where, vae_where))
    _settle(loaded, model)
    return loaded


def _settle(loaded: StableDiffusion, model: ModelOptions) -> None:
    """Set how the modules compute, which changes their results little or not at all."""
    if model.vae_slicing:
        loaded.deferred_vae.structure.enable_slicing()
    if model.vae_tiling:
        loaded.deferred_vae.structure.enable_tiling()
    if model.channels_last:
        loaded.unet.to(memory_format=torch.channels_last)
        loaded.deferred_vae.memory_format = torch.channels_last


def _read_file(facts: SourceFacts, model: ModelOptions) -> dict[str, PartWeights]:
    assert facts.path, "a file has a path"
    where = f"{MODEL_FLAG} {facts.path}"
    file = read_tensors(facts.path)
    family = checkpoint_family(file.tensors, where=where)
    # Some torch files show what they are only now.
    raise_if_any(family_problems(replace(facts, family=family), model))
    weights = split_checkpoint(file, family, where=where)
    file.tensors.clear()
    return weights


def _read_folder(facts: SourceFacts) -> dict[str, PartWeights]:
    assert facts.path, "a folder has a path"
    return {part: _read_part(facts.path / part, part) for part in PARTS}


def _read_part(folder: Path, part: str) -> PartWeights:
    config = read_config(folder / "config.json")
    tensors = read_tensors(weight_file(folder, part)).tensors
    if part == "vae":
        return PartWeights(config, ldm_keys.vae_from_folder(tensors))
    if part == "text_encoder":
        # The file may describe a whole CLIP, of which this is the text half.
        inner = config.get("text_config")
        return PartWeights(inner if isinstance(inner, dict) else config, ldm_keys.text_from_sd1(tensors))
    return PartWeights(config, tensors)


def read_vae(path: Path, *, where: str) -> PartWeights:
    """The VAE in ``path``: its own folder, or a checkpoint (a whole one, or of a VAE alone).

    Raises:
        UserError: There is no usable VAE; ``where`` is what the message names.
    """
    if path.is_dir():
        return _read_part(path, "vae")
    return vae_of_checkpoint(read_tensors(path, mapped=True), where=where, beside=path.with_name("config.json"))


def _tokenizer(facts: SourceFacts, prompts: PromptOptions, family: Family, vocabulary: int) -> Any:
    given = prompts.tokenizer_cache_dir
    for folder in tokenizer_folders(given, family) if given else ():
        if has_tokenizer(folder):
            return read_tokenizer(folder, family)
    own = facts.path / "tokenizer" if facts.path and facts.kind == "folder" else None
    return load_tokenizer(family, vocabulary=vocabulary, folder=own)


def _mismatches(model: StableDiffusion, where: str, vae_where: str) -> list[Problem]:
    """Parts that load one by one but don't belong together."""
    problems = []
    context, width = model.unet.config.cross_attention_dim, model.variant.text_width
    if context != width:
        problems.append(
            Problem(
                f"the U-Net reads text {context} wide, and the text encoder writes {width}", where, "Use a whole model."
            )
        )
    channels = model.deferred_vae.structure.config.latent_channels
    if channels != model.unet.config.out_channels:
        problems.append(
            Problem(
                f"the VAE has {channels} latent channels, and the U-Net {model.unet.config.out_channels}",
                vae_where,
                "Use a VAE of Stable Diffusion 1.x or 2.x.",
            )
        )
    return problems
