"""Small Stable Diffusion models with random weights, for every test that needs a model but no picture.

The layout is SD's own (four levels, three of them with cross-attention; block names, layer kinds and file formats are
the full model's), only narrow: about 6 million parameters, half of them the full 49,408-entry token table. The same
call writes the same weights on the same machine.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Kind = Literal["sd1", "sd2", "sd2_v"]

LIBRARY = Path(__file__).parents[1] / "library"
CONFIGS = LIBRARY / "models" / "configs"
TOKENIZER = LIBRARY / "tokenizer"

TEXT_WIDTH = {"sd1": 64, "sd2": 96}
"""Width of the text encoder, and so of the U-Net's cross-attention."""


@dataclass(frozen=True)
class TinyParts:
    """The three modules, in float32 and evaluation mode, and their configurations by folder name."""

    text_encoder: Any
    vae: Any
    unet: Any
    configs: dict[str, dict[str, Any]]


def tiny_configs(
    kind: Kind = "sd1", *, layers_per_block: int = 2, channels: tuple[int, ...] = (32, 32, 64, 64), norm_groups: int = 8
) -> dict[str, dict[str, Any]]:
    """Configurations of the four folders of a diffusers model, small."""
    family = kind[:3]
    width = TEXT_WIDTH[family]
    configs = {
        "unet": _config(f"unet_{family}"),
        "vae": _config("vae"),
        "text_encoder": _config(f"text_encoder_{family}"),
        "scheduler": _config("scheduler"),
    }
    levels = len(channels)
    configs["unet"] |= {
        "block_out_channels": list(channels),
        "layers_per_block": layers_per_block,
        "norm_num_groups": norm_groups,
        "cross_attention_dim": width,
        "sample_size": 8,
        "down_block_types": ["CrossAttnDownBlock2D"] * (levels - 1) + ["DownBlock2D"],
        "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * (levels - 1),
    }
    if family == "sd2":
        configs["unet"]["attention_head_dim"] = [channel // 16 for channel in channels]
    configs["vae"] |= {
        "block_out_channels": [8, 8, 16, 16],
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "sample_size": 64,
    }
    configs["text_encoder"] |= {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_attention_heads": width // 16,
        "num_hidden_layers": 3,
        "projection_dim": width,
    }
    configs["scheduler"]["prediction_type"] = "v_prediction" if kind == "sd2_v" else "epsilon"
    return configs


def tiny_parts(kind: Kind = "sd1", *, seed: int = 0, **shape: Any) -> TinyParts:
    """The modules themselves, without files; ``shape`` as :func:`tiny_configs`."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    from library.randomness import seeded_globals

    configs = tiny_configs(kind, **shape)
    with seeded_globals(seed, "tiny", kind):
        unet = UNet2DConditionModel.from_config(configs["unet"])
        vae = AutoencoderKL.from_config(configs["vae"])
        text_encoder = CLIPTextModel(CLIPTextConfig(**configs["text_encoder"]))
    for module in (unet, vae, text_encoder):
        module.eval().requires_grad_(False)
    return TinyParts(text_encoder, vae, unet, configs)


def tiny_sd(folder: Path, kind: Kind = "sd1", *, seed: int = 0, **shape: Any) -> Path:
    """Write a diffusers folder (``.safetensors``, float32) and return it.

    Args:
        folder: The model folder to make.
        kind: SD1, SD2, or SD2 predicting velocity.
        seed: Other weights for another seed.
        **shape: As :func:`tiny_configs`: ``layers_per_block``, ``channels``, ``norm_groups``.
    """
    from safetensors.torch import save_file

    from library.models.ldm_keys import text_to_sd1

    parts = tiny_parts(kind, seed=seed, **shape)
    folder.mkdir(parents=True, exist_ok=True)
    for name, config in parts.configs.items():
        (folder / name).mkdir(exist_ok=True)
        file = "scheduler_config.json" if name == "scheduler" else "config.json"
        (folder / name / file).write_text(json.dumps(config, indent=2))
    weights = {"format": "pt"}
    save_file(parts.unet.state_dict(), folder / "unet/diffusion_pytorch_model.safetensors", metadata=weights)
    save_file(parts.vae.state_dict(), folder / "vae/diffusion_pytorch_model.safetensors", metadata=weights)
    text_state = text_to_sd1(parts.text_encoder.state_dict())
    save_file(text_state, folder / "text_encoder/model.safetensors", metadata=weights)
    _write_tokenizer(folder / "tokenizer", kind)
    (folder / "model_index.json").write_text(json.dumps(_MODEL_INDEX, indent=2))
    return folder


def tiny_ldm(folder: Path, kind: Kind = "sd1", suffix: str = ".safetensors", *, seed: int = 0, **shape: Any) -> Path:
    """Write the model of :func:`tiny_sd` as a single checkpoint ``<kind><suffix>`` in ``folder``, and return it.

    Args:
        folder: Where the file goes.
        kind: SD1, SD2, or SD2 predicting velocity.
        suffix: ``.safetensors``, or ``.ckpt`` for a torch file.
        seed: Other weights for another seed.
        **shape: As :func:`tiny_configs`.
    """
    from library.models.ldm_file import write_ldm

    parts = tiny_parts(kind, seed=seed, **shape)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{kind}{suffix}"
    write_ldm(path, text_encoder=parts.text_encoder, vae=parts.vae, unet=parts.unet, v2=kind != "sd1")
    return path


def _config(name: str) -> dict[str, Any]:
    return json.loads((CONFIGS / f"{name}.json").read_text())


def _write_tokenizer(folder: Path, kind: Kind) -> None:
    folder.mkdir(exist_ok=True)
    for name in ("vocab.json", "merges.txt"):
        shutil.copyfile(TOKENIZER / name, folder / name)
    settings = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": 77,
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>" if kind == "sd1" else "!",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))


_MODEL_INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "_diffusers_version": "0.42.1",
    "feature_extractor": [None, None],
    "requires_safety_checker": False,
    "safety_checker": [None, None],
    "scheduler": ["diffusers", "DDIMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
