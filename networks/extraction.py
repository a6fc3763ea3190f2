"""From two models to a LoRA: the difference of each layer's weights, approximated by a product of thin matrices."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from library.errors import UserError, problems_of, raise_if_any
from library.models.detect import SourceFacts
from library.models.options import ModelOptions
from networks.lora_files import card, summary, write_lora
from networks.merging import Kept, report_kept
from networks.tool_models import described_model, loaded_model
from networks.tool_options import usable_device

if TYPE_CHECKING:
    from torch import Tensor

    from library.models.stable_diffusion import StableDiffusion
    from networks.base import Layer
    from networks.low_rank_math import LowRank

log = logging.getLogger(__name__)

BASE_FLAG: Final = "--model_org"
TUNED_FLAG: Final = "--model_tuned"


@dataclass(frozen=True, slots=True)
class Ranks:
    """What is extracted.

    Attributes:
        dim: Rank of linear layers and 1x1 convolutions.
        conv_dim: Rank of 3x3 convolutions; None leaves the convolution blocks out.
        quantile: Numbers are limited to this quantile.
        min_diff: A text encoder that differs no more is left out.
    """

    dim: int
    conv_dim: int | None
    quantile: float
    min_diff: float


@dataclass(frozen=True, slots=True)
class Pair:
    """The two models: how each is loaded, and which kind of Stable Diffusion they are."""

    base: ModelOptions
    tuned: ModelOptions
    version: str


def check_models(base: str, tuned: str, *, v2: bool, v_parameterization: bool) -> Pair:
    """Look at both models before anything heavy is imported.

    Raises:
        UserError: One is not there, of another kind, or contradicts ``v2``; all problems together.
    """
    found: list[tuple[SourceFacts, ModelOptions]] = []
    raise_if_any(
        problems_of(
            [
                lambda: found.append(described_model(base, BASE_FLAG, v2=v2)),
                lambda: found.append(described_model(tuned, TUNED_FLAG, v2=v2)),
            ]
        )
    )
    (first, base_options), (second, tuned_options) = found
    velocity = v_parameterization or "v_prediction" in (first.prediction, second.prediction)
    version = ("sd_v2" if v2 else "sd_v1") + "_v" * velocity
    return Pair(base_options, tuned_options, version)


def extract(
    pair: Pair,
    target: Path,
    *,
    ranks: Ranks,
    load_precision: str | None,
    save_precision: str | None,
    device: str | None,
    has_card: bool,
) -> None:
    """Load both models and write the LoRA of their difference.

    Args:
        pair: The models.
        target: The file to write.
        ranks: What is extracted.
        load_precision: Number format that weights are rounded to first; as they are when absent.
        save_precision: Number format of the result; float when absent.
        device: Where to compute; the CPU when absent.
        has_card: Whether the file gets a model card.

    Raises:
        UserError: A model cannot be loaded, they have different layers or no difference, or the file cannot be written.
    """
    from tqdm import tqdm

    from library.models.precision import DTYPES

    place = usable_device(device)
    dtype = DTYPES[load_precision or "float"]
    base = loaded_model(pair.base, BASE_FLAG, dtype=dtype)
    tuned = loaded_model(pair.tuned, TUNED_FLAG, dtype=dtype)
    layers = _differing_layers(base, tuned, ranks)
    changes: dict[str, LowRank] = {}
    kept: dict[str, Kept] = {}
    for name, (before, after) in tqdm(layers.items(), desc="extracting"):
        difference = after.weight.to(place).float() - before.weight.to(place).float()
        _check_finite(difference, name)
        changes[name], kept[name] = _approximated(difference, ranks)
    if not any(whole for _, whole in kept.values()):
        raise UserError(
            "the two models do not differ in any layer that a LoRA changes",
            where=f"{BASE_FLAG}, {TUNED_FLAG}",
            remedy="Give the model that was trained, and the one that its training started from.",
        )
    report_kept(kept, "a larger --dim keeps more, and so does --clamp_quantile=1")
    record = summary(changes, pair.version) | {"ss_network_dim": str(ranks.dim), "ss_network_alpha": str(ranks.dim)}
    metadata = record | (card(target, pair.version) if has_card else {})
    write_lora(target, changes, metadata, DTYPES[save_precision or "float"])


def _differing_layers(
    base: "StableDiffusion", tuned: "StableDiffusion", ranks: Ranks
) -> "dict[str, tuple[Layer, Layer]]":
    """The layers to extract from, both models' by the module's name."""
    from networks.base import named_text_encoder
    from networks.low_rank import TEXT_ENCODER_PREFIX, UNET_PREFIX
    from networks.network import CONVOLUTION_BLOCKS, TEXT_BLOCKS, TRANSFORMER_BLOCKS, layers_of

    blocks = TRANSFORMER_BLOCKS + (CONVOLUTION_BLOCKS if ranks.conv_dim else ())
    pairs = _paired(*(layers_of(model.unet, UNET_PREFIX, blocks) for model in (base, tuned)))
    texts = (named_text_encoder(model.text_encoder) for model in (base, tuned))
    in_text = _paired(*(layers_of(text, TEXT_ENCODER_PREFIX, TEXT_BLOCKS) for text in texts))
    largest = max(float((after.weight - before.weight).abs().max()) for before, after in in_text.values())
    if largest > ranks.min_diff:
        return in_text | pairs
    log.info(
        "the text encoder is left out: its weights differ by %.3g at the most, which is not above --min_diff %g",
        largest,
        ranks.min_diff,
    )
    return pairs


def _paired(before: "Mapping[str, Layer]", after: "Mapping[str, Layer]") -> "dict[str, tuple[Layer, Layer]]":
    """Both models' layers by name.

    Raises:
        UserError: They have different ones.
    """
    differing = sorted(before.keys() ^ after.keys()) or [
        name for name, layer in before.items() if layer.weight.shape != after[name].weight.shape
    ]
    if differing:
        raise UserError(
            f"the two models have different layers, for instance {differing[0]}",
            where=f"{BASE_FLAG}, {TUNED_FLAG}",
            remedy="Give the model that was trained, and the one that its training started from.",
        )
    return {name: (layer, after[name]) for name, layer in before.items()}


def _check_finite(difference: "Tensor", name: str) -> None:
    if not bool(difference.isfinite().all()):
        raise UserError(
            f"the difference of the two models is not finite in {name}",
            where=f"{BASE_FLAG}, {TUNED_FLAG}",
            remedy="One of them holds values that are not finite: take another save of its training.",
        )


def _approximated(difference: "Tensor", ranks: Ranks) -> "tuple[LowRank, Kept]":
    """The nearest change of the rank for this layer, and how much of the difference it keeps."""
    from networks.low_rank_math import Decomposition, LowRank, clamped

    wanted = ranks.conv_dim if difference.ndim == 4 and difference.shape[2:] != (1, 1) else ranks.dim
    matrix = difference.flatten(1)
    up, down = clamped(*Decomposition.of_matrix(matrix).truncated(wanted or ranks.dim), ranks.quantile)
    whole = float(matrix.double().square().sum())
    lost = float((matrix - up @ down).double().square().sum())
    ones = (1,) * (difference.ndim - 2)
    change = LowRank(down.reshape(-1, *difference.shape[1:]), up.reshape(*up.shape, *ones), float(down.shape[0]))
    return change, (max(whole - lost, 0.0), whole)
