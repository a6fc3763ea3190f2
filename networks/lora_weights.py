"""Fit the tensors of a LoRA file to the modules of a network, or say why they do not fit."""

from collections.abc import Mapping

import torch
from torch import Tensor

from library.errors import UserError
from networks.adapter_files import ALPHA, DOWN, UP, require_lora
from networks.lora_module import LoRAModule


def conform(weights: Mapping[str, Tensor], modules: Mapping[str, LoRAModule], *, where: str) -> dict[str, Tensor]:
    """``weights`` in the shapes of ``modules``, with the alphas a file may leave out.

    A linear layer's (r, n) and a 1x1 convolution's (r, n, 1, 1) stand for each other, because checkpoints of SD2 come
    with either. Tensors of other modules are passed on as they are.

    Args:
        weights: Tensors of a network file.
        modules: The network's modules by name.
        where: The file, for the message.

    Raises:
        UserError: The file is no LoRA, or a module's rank or width differs.
    """
    require_lora(weights, where=where)
    found = dict(weights)
    for name, module in modules.items():
        if name + DOWN not in weights or name + UP not in weights:
            continue
        found[name + DOWN] = _shaped(weights[name + DOWN], module.lora_down.weight)
        found[name + UP] = _shaped(weights[name + UP], module.lora_up.weight)
        found[name + ALPHA] = weights.get(name + ALPHA, torch.tensor(float(weights[name + DOWN].shape[0])))
    _check_shapes(found, modules, where)
    return found


def _shaped(tensor: Tensor, target: Tensor) -> Tensor:
    if tensor.ndim >= 2 and tensor.flatten(1).shape == target.flatten(1).shape:
        return tensor.reshape(target.shape)
    return tensor


def _check_shapes(weights: Mapping[str, Tensor], modules: Mapping[str, LoRAModule], where: str) -> None:
    present = {name: module for name, module in modules.items() if name + DOWN in weights}
    ranks = {name: weights[name + DOWN].shape[0] for name in present}
    differing = [name for name, module in present.items() if ranks[name] != module.rank]
    if differing:
        name, others = differing[0], len(differing) - 1
        raise UserError(
            f"{name} has rank {ranks[name]} in the file and rank {modules[name].rank} here"
            + (f"; {others} more modules differ" if others else ""),
            where=where,
            remedy=f"Add --dim_from_weights to take the ranks of the file, or set --network_dim {ranks[name]}.",
        )
    for name, module in present.items():
        for part, own in ((DOWN, module.lora_down.weight), (UP, module.lora_up.weight)):
            given = weights.get(name + part)
            if given is not None and given.shape != own.shape:
                raise UserError(
                    f"{name} has the shape {tuple(given.shape)} in the file and {tuple(own.shape)} in this model",
                    where=where,
                    remedy="The file was made for a model of another width (SD1 and SD2 differ).",
                )
