"""Options of what Stable Diffusion is here: base model, text side, attention. Imports nothing heavy."""

from dataclasses import dataclass
from pathlib import Path

from library.options import option


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelOptions:
    """Base model."""

    v2: bool = option(False, help="The base model is Stable Diffusion 2.x (1024-wide text encoder).")
    v_parameterization: bool = option(
        False,
        help="The base model predicts velocity instead of noise (SD 2.x at 768 pixels, some SD 1.x merges). "
        "A bare checkpoint cannot tell, so say it here.",
    )
    pretrained_model_name_or_path: str | None = option(
        None,
        metavar="PATH",
        help="Model to start from: a .safetensors or .ckpt file, a Diffusers folder, or a hub id such as "
        "'owner/model'.",
    )
    vae: str | None = option(
        None,
        metavar="PATH",
        help="VAE to use in place of the model's own: a checkpoint (whole or VAE only), a Diffusers .bin file, "
        "a Diffusers folder or a hub id.",
    )
    no_half_vae: bool = option(
        False, help="Keep the VAE in 32 bits under mixed precision; cures black images and NaN latents."
    )
    vae_slicing: bool = option(False, help="Let the VAE work on one image at a time, whatever the batch: less memory.")
    vae_tiling: bool = option(
        False,
        help="Let the VAE work on large images in overlapping tiles: less memory; latents of images larger than a tile "
        "(512 pixels) change a little.",
    )
    channels_last: bool = option(
        False,
        help="Keep the channels of a pixel together in memory, in U-Net and VAE: faster convolutions on GPUs with "
        "tensor cores; results change by rounding only.",
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptOptions:
    """Text encoder."""

    tokenizer_cache_dir: Path | None = option(
        None,
        metavar="DIR",
        help="Folder with tokenizer files to use instead of the ones that come with the program.",
    )
    clip_skip: int | None = option(
        None,
        minimum=1,
        metavar="N",
        help="Take the text encoder's output from the N-th layer counted from the end (1 is the last, the usual one).",
    )
    max_token_length: int | None = option(
        None,
        choices=(150, 225),
        synonyms={75: None, 255: 225},
        help="Longest caption in tokens; what is longer is cut. 75 when absent; 150 and 225 encode it in pieces.",
    )
    weighted_captions: bool = option(
        False, help="Read weights such as (word:1.2) and [word] in captions; commas and brackets then have meaning."
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionOptions:
    """Attention."""

    xformers: bool = option(
        False, help="Use xformers' attention; where it cannot run, PyTorch's own is used and a warning says so."
    )
    sdpa: bool = option(
        False, help="Use PyTorch's scaled dot product attention. It is also what runs when nothing is chosen."
    )
    mem_eff_attn: bool = option(
        False, help="Use attention in slices: least memory, slower. Wins over --xformers, which wins over --sdpa."
    )

    def notices(self) -> list[str]:
        """Which kind is used where several are asked for."""
        asked = [name for name in ("mem_eff_attn", "xformers", "sdpa") if getattr(self, name)]
        if len(asked) < 2:
            return []
        return [f"several kinds of attention are asked for; --{asked[0]} is used, --{', --'.join(asked[1:])} is not"]
