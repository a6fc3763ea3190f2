"""Parts that were only rounded for the run are saved as their source has them.

A part that is not trained has the precision of the run, for speed; saved so, every training would cost the VAE some of
its precision.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from torch import Tensor

from library.errors import UserError
from library.files import TensorFile, read_tensors
from library.models.deferred import DeferredModule
from library.models.detect import PARTS, weight_file
from library.models.ldm_file import split_checkpoint
from library.models.ldm_keys import text_from_sd1, vae_from_folder
from library.models.origin import Origin, unchanged_file
from library.models.stable_diffusion import StableDiffusion

_Weights = Mapping[str, Tensor]

_FOLDER_NAMES: Final[Mapping[str, Callable[[_Weights], dict[str, Tensor]]]] = {
    "unet": dict,
    "vae": vae_from_folder,
    "text_encoder": text_from_sd1,
}


@dataclass(frozen=True, slots=True)
class ExactPart:
    """Stands for a module whose weights are those of its source, for whoever writes them."""

    config: Any
    tensors: dict[str, Tensor]

    @property
    def dtype(self) -> torch.dtype:
        """The number format of its weights, the narrowest of several."""
        return min((tensor.dtype for tensor in self.tensors.values()), key=lambda dtype: dtype.itemsize)

    def state_dict(self) -> dict[str, Tensor]:
        """The weights by the module's names."""
        return self.tensors


def with_exact_parts(model: StableDiffusion) -> StableDiffusion:
    """``model`` with every part that is its source, rounded to 16 bits, in the source's own precision.

    Compared are all weights, so a trained part, a replaced VAE or a source that has changed stay as they are.
    """
    narrow = [part for part in PARTS if getattr(model, part).dtype.itemsize < torch.float32.itemsize]
    if not narrow or model.origin is None:
        return model
    originals = _originals(model.origin, model, narrow)
    exact: dict[str, Any] = {
        part: ExactPart(getattr(model, part).config, found)
        for part, weights in originals.items()
        if (found := _unrounded(getattr(model, part).state_dict(), weights)) is not None
    }
    return _with_parts(model, exact)


def _with_parts(model: StableDiffusion, parts: dict[str, Any]) -> StableDiffusion:
    """``model`` with ``parts`` by name in place of its own."""
    others = {part: module for part, module in parts.items() if part != "vae"}
    if "vae" in parts:
        others["deferred_vae"] = DeferredModule.of(parts["vae"])
    return replace(model, **others)


def in_source_precision(model: StableDiffusion) -> StableDiffusion:
    """``model``, which was loaded and changed in float32, with each weight in the number format that its source has."""
    assert model.origin is not None, "it was loaded"
    originals = _originals(model.origin, model, list(PARTS))
    parts: dict[str, Any] = {
        part: ExactPart(getattr(model, part).config, _cast_as(getattr(model, part).state_dict(), weights))
        for part, weights in originals.items()
    }
    return _with_parts(model, parts)


def _cast_as(tensors: _Weights, source: _Weights) -> dict[str, Tensor]:
    return {name: tensor.to(source[name].dtype) if name in source else tensor for name, tensor in tensors.items()}


def _originals(origin: Origin, model: StableDiffusion, parts: list[str]) -> dict[str, _Weights]:
    """The weights of ``parts`` in the model's source, mapped; nothing where it cannot be read any more."""
    try:
        if origin.kind == "file":
            file = unchanged_file(origin)
            return {} if file is None else _parts_of(file, model, parts)
        files = {part: read_tensors(weight_file(origin.path / part, part), mapped=True) for part in parts}
        return {part: _FOLDER_NAMES[part](file.tensors) for part, file in files.items()}
    except (OSError, UserError):
        return {}


def _parts_of(file: TensorFile, model: StableDiffusion, parts: list[str]) -> dict[str, _Weights]:
    split = split_checkpoint(file, model.variant.name, where=model.source)
    return {part: split[part].tensors for part in parts}


def _unrounded(rounded: _Weights, source: _Weights) -> dict[str, Tensor] | None:
    """The tensors of ``source`` in the shapes of ``rounded``, if rounding makes them the same bit by bit."""
    found = {}
    for name, tensor in rounded.items():
        original = source.get(name)
        if original is None or original.numel() != tensor.numel():
            return None
        found[name] = original.reshape(tensor.shape)
        if not torch.equal(found[name].to(tensor.dtype), tensor.cpu()):
            return None
    return found
