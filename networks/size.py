"""How large a network will be, told from the shapes in the base model's header before anything is loaded."""

import re
from pathlib import Path
from typing import Final

from library.errors import UserError
from library.models.detect import describe_source, weight_file
from library.models.options import ModelOptions
from library.models.recognise import tensor_names
from networks.loading import network_arguments
from networks.lora_settings import ARGUMENTS_OF, DEFAULT_DIM, RANK_ARGUMENTS
from networks.oft_settings import DEFAULT_BLOCKS, OFT, TARGETS
from networks.options import NetworkOptions

# The layers that OFT adapts without further arguments, which have the same names in both layouts.
_ATTENTION: Final = re.compile(r".*attn[12]\.to_(q|k|v|out\.0)\.weight")
# The layers that LoRA adapts without conv_dim, as they are called in Diffusers folders and in checkpoints.
_UNET: Final = re.compile(r".*(attn[12]\.to_(q|k|v|out\.0)|ff\.net\.(0\.proj|2)|attentions.*proj_(in|out))\.weight")
_UNET_IN_CHECKPOINT: Final = re.compile(
    r"model\.diffusion_model\..*(attn[12]\.to_(q|k|v|out\.0)|ff\.net\.(0\.proj|2)|\.proj_(in|out))\.weight"
)
_TEXT_ENCODER: Final = re.compile(
    r"(cond_stage_model|text_model|encoder)\..*(self_attn\.(q|k|v|out)_proj|mlp\.(fc[12]|c_fc|c_proj)|attn\.out_proj)\.weight"
)
# SD2's checkpoints hold the three projections of a layer in one tensor.
_JOINED: Final = re.compile(r"cond_stage_model\..*attn\.in_proj_weight")


def trained_values(options: NetworkOptions, model: ModelOptions) -> int | None:
    """The number of values in the file of a network for ``model``; None where only loading tells.

    For checkpoints of SD2, whose last text layer is unused, the number of a LoRA is a little too high.
    """
    if options.network_weights is not None or (network_arguments(options) or {}).keys() & {*RANK_ARGUMENTS, *TARGETS}:
        return None
    try:
        if options.network_module in ARGUMENTS_OF:
            return _low_rank_values(options, model.pretrained_model_name_or_path)
        if options.network_module == OFT:
            return _oft_values(options.network_dim or DEFAULT_BLOCKS, model.pretrained_model_name_or_path)
    except UserError:
        pass
    return None


def _low_rank_values(options: NetworkOptions, source: str | None) -> int | None:
    sums = _sums(source)
    parts = {
        "unet": 0 if options.network_train_text_encoder_only else sums["unet"],
        "text_encoder": 0 if options.network_train_unet_only else sums["text_encoder"],
    }
    return (options.network_dim or DEFAULT_DIM) * sum(parts.values()) if sums["unet"] else None


def _oft_values(blocks: int, source: str | None) -> int | None:
    path = _unet_file(source)
    if path is None:
        return None
    outputs = [shape[0] for name, shape in tensor_names(path).items() if _ATTENTION.fullmatch(name)]
    return sum(count * count // blocks for count in outputs) or None


def _unet_file(source: str | None) -> Path | None:
    facts = describe_source(source)
    if facts.path is None:
        return None
    return weight_file(facts.path / "unet", "unet") if facts.kind == "folder" else facts.path


def _sums(source: str | None) -> dict[str, int]:
    """Inputs plus outputs of all adapted layers, for each part of the model; 0 where the files don't tell."""
    facts = describe_source(source)
    if facts.kind == "folder" and facts.path is not None:
        return {
            part: _sum(weight_file(facts.path / part, part), pattern)
            for part, pattern in (("unet", _UNET), ("text_encoder", _TEXT_ENCODER))
        }
    if facts.kind == "file" and facts.path is not None:
        text_encoder = _sum(facts.path, _TEXT_ENCODER) + _joined_sum(facts.path)
        return {"unet": _sum(facts.path, _UNET_IN_CHECKPOINT), "text_encoder": text_encoder}
    return {"unet": 0, "text_encoder": 0}


def _sum(path: Path, pattern: re.Pattern[str]) -> int:
    return sum(sum(shape[:2]) for name, shape in tensor_names(path).items() if pattern.fullmatch(name))


def _joined_sum(path: Path) -> int:
    found = (shape for name, shape in tensor_names(path).items() if _JOINED.fullmatch(name) and shape)
    # (3 d, d): three layers of d inputs and d outputs.
    return sum(2 * shape[0] for shape in found)
