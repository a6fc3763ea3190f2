"""Build the modules of a model from a configuration and weights, without holding the weights twice.

A module is made on the meta device, where it costs nothing, and takes the given tensors as its parameters, the VAE when
it is first used. Modules are in evaluation mode and want no gradient: what trains them says so. Names and shapes of
weights are checked at once; ``tensors`` is emptied on the way.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any, Final

import torch
from torch import Tensor, nn

from library.errors import UserError
from library.models.deferred import DeferredModule
from library.models.structure import Config
from library.wording import named

_SHOWN: Final = 3
_LAYER_COUNTS: Final = (
    "layers_per_block",
    "transformer_layers_per_block",
    "reverse_transformer_layers_per_block",
    "num_hidden_layers",
)
_TEXT_FIELDS: Final = (
    *("vocab_size", "hidden_size", "intermediate_size", "projection_dim", "max_position_embeddings"),
    *("num_hidden_layers", "num_attention_heads", "hidden_act", "layer_norm_eps", "attention_dropout"),
    *("initializer_range", "initializer_factor", "pad_token_id", "bos_token_id", "eos_token_id"),
)


def build_unet(config: Config, tensors: dict[str, Tensor], *, dtype: torch.dtype, where: str) -> Any:
    """A ``UNet2DConditionModel`` with ``tensors`` as its weights."""
    from diffusers import UNet2DConditionModel

    return _prepare("U-Net", UNet2DConditionModel.from_config, config, tensors, dtype, where).module


def prepare_vae(config: Config, tensors: dict[str, Tensor], *, dtype: torch.dtype, where: str) -> DeferredModule:
    """An ``AutoencoderKL`` that takes ``tensors`` as its weights when it is first used."""
    from diffusers import AutoencoderKL

    return _prepare("VAE", AutoencoderKL.from_config, config, tensors, dtype, where)


def build_text_encoder(config: Config, tensors: dict[str, Tensor], *, dtype: torch.dtype, where: str) -> Any:
    """A ``CLIPTextModel`` with ``tensors`` (flat names) as its weights."""
    from transformers import CLIPTextConfig, CLIPTextModel

    def make(config: Config) -> Any:
        # Nothing else: a configuration may name a hub repository whose code transformers would fetch and run.
        return CLIPTextModel(CLIPTextConfig(**{name: config[name] for name in _TEXT_FIELDS if name in config}))

    module = _prepare("text encoder", make, config, tensors, dtype, where).module
    # The only buffer of the three modules, a constant that is in no file.
    positions = module.embeddings.position_embedding.num_embeddings
    module.embeddings.position_ids = torch.arange(positions).expand(1, -1)
    return module


def _prepare(
    part: str, make: Any, config: Config, tensors: dict[str, Tensor], dtype: torch.dtype, where: str
) -> DeferredModule:
    _check_size(config, len(tensors), part, where)
    try:
        with torch.device("meta"):
            module = make(config)
    except Exception as error:  # whatever the configuration makes the library stumble over
        raise UserError(
            f"the configuration of the {part} cannot be used: {error}",
            where=where,
            remedy="Check config.json, or use an unchanged copy of the model.",
        ) from error
    weights = _fitting(module, tensors, part=part, where=where)
    return DeferredModule(module.eval().requires_grad_(False), weights, dtype)


def _check_size(config: Config, weights: int, part: str, where: str) -> None:
    """Refuse a configuration that asks for more layers than there are weights for: making them could take for ever.

    Raises:
        UserError: It does.
    """
    counts = [max([1, *_numbers(config.get(name))]) for name in _LAYER_COUNTS]
    lists = [len(value) for value in config.values() if isinstance(value, list)]
    layers = math.prod(counts) * max([1, *lists])
    if layers > weights:
        raise UserError(
            f"the configuration of the {part} asks for {layers} layers, and there are {weights} weights",
            where=where,
            remedy="Check config.json, or use an unchanged copy of the model.",
        )


def _numbers(value: object) -> list[int]:
    """The whole numbers in ``value``, which may be one, or lists of them."""
    if isinstance(value, list):
        return [number for inner in value for number in _numbers(inner)]
    return [value] if isinstance(value, int) else []


def _fitting(module: nn.Module, tensors: dict[str, Tensor], *, part: str, where: str) -> dict[str, Tensor]:
    """``tensors`` in the shapes of the weights of ``module``; ``tensors`` is empty afterwards.

    Raises:
        UserError: Names or shapes are not the module's; a few are named.
    """
    expected = {name: tensor.shape for name, tensor in module.state_dict().items()}
    _check_names(expected, tensors, part, where)
    ready = {}
    for name, shape in expected.items():
        tensor = tensors.pop(name)
        # A 1x1 convolution and a matrix hold the same numbers.
        if tensor.shape != shape and _without_ones(tensor.shape) == _without_ones(shape):
            tensor = tensor.reshape(shape)
        ready[name] = tensor
    wrong = [f"{name} is {tuple(ready[name].shape)}, not {tuple(expected[name])}" for name in expected
             if ready[name].shape != expected[name]]  # fmt: skip
    if wrong:
        raise UserError(
            f"the weights of the {part} do not fit its configuration: {named(wrong, _SHOWN)}",
            where=where,
            remedy="Check that the file belongs to this model and is a Stable Diffusion 1.x or 2.x model.",
        )
    return ready


def _check_names(expected: Mapping[str, object], found: Mapping[str, object], part: str, where: str) -> None:
    missing = [name for name in expected if name not in found]
    unexpected = [name for name in found if name not in expected]
    if not missing and not unexpected:
        return
    said = [f"{len(missing)} are missing ({named(missing, _SHOWN)})"] if missing else []
    said += [f"{len(unexpected)} are not known ({named(unexpected, _SHOWN)})"] if unexpected else []
    raise UserError(
        f"of the {len(expected)} weights of the {part}, " + " and ".join(said),
        where=where,
        remedy="The file is incomplete or of another kind of model; Stable Diffusion 1.x or 2.x is needed.",
    )


def _without_ones(shape: Iterable[int]) -> list[int]:
    sizes = list(shape)
    while sizes and sizes[-1] == 1:
        sizes.pop()
    return sizes
