"""Write a whole model as a Diffusers folder: weights, configurations, tokenizer and scheduler, without a network."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from library.documents import DocumentError, parse_json, read_table
from library.files import check_finite, folder_written_whole, write_json, write_tensors
from library.models.detect import PARTS, WEIGHT_FILES
from library.models.formats import METADATA_FILE, is_trained_folder
from library.models.ldm_keys import text_to_sd1
from library.models.origin import Origin
from library.models.stable_diffusion import StableDiffusion
from library.models.structure import Config, shipped_config
from library.models.tokenizer import TOKENIZER_FILES, has_tokenizer

_LOG = logging.getLogger(__name__)

_CLASSES: Final = {
    "unet": ("diffusers", "UNet2DConditionModel"),
    "vae": ("diffusers", "AutoencoderKL"),
    "text_encoder": ("transformers", "CLIPTextModel"),
    "tokenizer": ("transformers", "CLIPTokenizer"),
}
_SETTINGS: Final = "tokenizer_config.json"
_BASE_SAMPLE_SIZE: Final = 64
"""Side of the latent image that programs take by default, at 512 pixels."""
_BESIDES_WEIGHTS: Final = 5_100_000
"""Bytes of tokenizer and configurations, about."""

# Only with this spacing is the last timestep visited, the one that rescaling is about.
_ZERO_TERMINAL_SNR: Final = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}

# Entries of configurations that may name the folders of whoever wrote them.
_PRIVATE: Final = {"name_or_path", "special_tokens_map_file", "tokenizer_file"}


def write_folder(
    folder: Path, model: StableDiffusion, *, safetensors: bool, dtype: torch.dtype | None, metadata: Mapping[str, str]
) -> None:
    """Write ``model`` to ``folder``, whole or not at all; a folder of an earlier training is replaced.

    Scheduler and tokenizer are those of the folder the model came from; otherwise the usual scheduler and the
    tokenizer in use.

    Args:
        folder: Final name.
        model: The model, on any device.
        safetensors: Weights as ``.safetensors``; as torch files (``.bin``) otherwise.
        dtype: Cast the weights to it; each as it is when absent.
        metadata: Text about the model, for ``training_metadata.json``.

    Raises:
        UserError: A weight is not finite in ``dtype`` (nothing is written), or the place cannot be written to.
    """
    modules = {part: getattr(model, part) for part in PARTS}
    configs = {part: _config(part, module) for part, module in modules.items()}
    if _is_base_sd2(model):
        configs["unet"]["sample_size"] = _BASE_SAMPLE_SIZE
    for part, module in modules.items():
        check_finite(module.state_dict(), dtype, folder / part)
    weights_of = {part: _state(part, module) for part, module in modules.items()}
    size = _BESIDES_WEIGHTS + sum(
        tensor.numel() * (dtype or tensor.dtype).itemsize for state in weights_of.values() for tensor in state.values()
    )
    with folder_written_whole(folder, may_replace=is_trained_folder, size=size) as target:
        for part, weights in weights_of.items():
            names = [name for name in WEIGHT_FILES[part] if (Path(name).suffix == ".safetensors") == safetensors]
            write_tensors(target / part / names[0], weights, dtype=dtype, metadata={"format": "pt"})
            write_json(target / part / "config.json", configs[part])
        _write_tokenizer(target / "tokenizer", model)
        scheduler = _scheduler(model)
        write_json(target / "scheduler/scheduler_config.json", scheduler)
        write_json(target / METADATA_FILE, dict(metadata))
        write_json(target / "model_index.json", _index(scheduler["_class_name"]))


def _state(part: str, module: Any) -> dict[str, Tensor]:
    state: dict[str, Tensor] = module.state_dict()
    return text_to_sd1(state) if part == "text_encoder" else state


def _config(part: str, module: Any) -> Config:
    if part == "text_encoder":
        config = module.config.to_diff_dict()
        # Without its dtype: programs go by the weights or by what they are asked for.
        return _public(config) | {"architectures": [_CLASSES[part][1]]}
    return _public(dict(module.config)) | {"_class_name": _CLASSES[part][1], "_diffusers_version": _version()}


def _is_base_sd2(model: StableDiffusion) -> bool:
    """Whether this is an SD2 of 512 pixels, which a single file tells from that of 768 by its prediction alone."""
    from_file = model.origin is not None and model.origin.kind == "file"
    full_size = model.unet.config.sample_size == shipped_config("unet_sd2")["sample_size"]
    return from_file and full_size and model.variant.base_model_version == "sd_v2"


def _public(config: Mapping[str, Any]) -> Config:
    return {name: value for name, value in config.items() if name[0] != "_" and name not in _PRIVATE | {"dtype"}}


def _index(scheduler: str) -> Config:
    return {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": _version(),
        "feature_extractor": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", scheduler],
        **{part: list(names) for part, names in _CLASSES.items()},
    }


def _scheduler(model: StableDiffusion) -> Config:
    """The scheduler's configuration; its prediction type and its schedule are those that were trained."""
    own = _source_file(model.origin, "scheduler/scheduler_config.json")
    try:
        config = read_table(own) if own else {}
    except (OSError, DocumentError) as error:
        _LOG.warning("the scheduler of %s cannot be read (%s): the usual one is saved", model.source, error)
        config = {}
    if not config.get("_class_name"):
        config = shipped_config("scheduler")
    if model.zero_terminal_snr and not config.get("rescale_betas_zero_snr"):
        # Not every scheduler can rescale; the usual one can.
        config = shipped_config("scheduler") | _ZERO_TERMINAL_SNR
    return _public(config) | {
        "_class_name": config["_class_name"],
        "_diffusers_version": _version(),
        "prediction_type": model.variant.prediction,
    }


def _write_tokenizer(folder: Path, model: StableDiffusion) -> None:
    folder.mkdir()
    own = _own_tokenizer(model)
    if not own:
        model.tokenizer.save_pretrained(str(folder))
        # The files that older programs read.
        model.tokenizer.backend_tokenizer.model.save(str(folder))
    for name, content in own.items():
        (folder / name).write_bytes(content)


def _own_tokenizer(model: StableDiffusion) -> dict[str, bytes]:
    """The tokenizer's files of the folder the model came from, by name; nothing where there is none to be read."""
    folder = _source_file(model.origin, "tokenizer")
    if folder is None or not has_tokenizer(folder):
        return {}
    try:
        # By name: a link among the others could lead to a file that is nobody's business.
        files = {name: (folder / name).read_bytes() for name in TOKENIZER_FILES if (folder / name).is_file()}
        if settings := files.get(_SETTINGS):
            files[_SETTINGS] = json.dumps(_public(parse_json(settings)), indent=2, ensure_ascii=False).encode()
    except (OSError, DocumentError, AttributeError) as error:
        _LOG.warning("the tokenizer of %s cannot be read (%s): the one in use is saved", model.source, error)
        return {}
    return files


def _source_file(origin: Origin | None, name: str) -> Path | None:
    """A file or folder of the Diffusers folder that the model came from, if it is still there."""
    path = origin.path / name if origin and origin.kind == "folder" else None
    return path if path and path.exists() else None


def _version() -> str:
    import diffusers

    return str(diffusers.__version__)
