"""From options to a network that is attached to the model; the module is found by its import path.

Importing this module imports nothing heavy, so the options can be checked first.
"""

import importlib
import importlib.util
import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import zip_longest
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Final

from library.errors import Problem, UserError
from library.files import read_tensors
from networks.adapter_files import ALPHA, Shape, is_pointwise_shape, lora_dims, require_lora, shapes_in_file
from networks.lora_settings import DEFAULT_DIM, RANK_ARGUMENTS, read_settings
from networks.options import NetworkOptions

if TYPE_CHECKING:
    from torch import nn

    from library.models.stable_diffusion import StableDiffusion
    from networks.base import AdapterNetwork, ParameterGroup

log = logging.getLogger(__name__)

LORA: Final = "networks.lora"
LYCORIS: Final = "lycoris"
MATCHED: Final = "<All keys matched successfully>"

_LATER: Final = ("networks.dylora", "networks.lora_fa", "networks.oft")
_OTHER_FAMILIES: Final = ("anima", "chroma", "flux", "hunyuan", "lllite", "lumina", "sd3")


def network_arguments(options: NetworkOptions) -> dict[str, object] | None:
    """``--network_args`` by name, for the metadata, with the dropout that goes with them; None when none are given."""
    if not options.network_args:
        return None
    return {"dropout": options.network_dropout} | _split(options.network_args)


def _split(arguments: Sequence[str]) -> dict[str, object]:
    """``key=value`` texts by key; of a repeated key the last value holds."""
    pairs = (text.partition("=") for text in arguments)
    return {name.strip(): value.strip() for name, _, value in pairs}


def check_network(options: NetworkOptions) -> list[Problem]:
    """What is wrong with the network module, its arguments and its files, as far as names and headers tell."""
    if options.network_module is None:
        return [
            Problem("--network_module is missing", "--network_module", f"Give --network_module {LORA} to train a LoRA.")
        ]
    problems = _module_problems(options.network_module)
    if options.network_module == LORA:
        problems += _collected(partial(_settings_of, options))
        if options.network_weights is not None:
            problems += _collected(partial(_check_network_weights, options.network_weights, options))
    for path in options.base_weights:
        problems += _collected(partial(_check_lora_file, path))
    return problems


def _collected(check: Callable[[], object]) -> list[Problem]:
    try:
        check()
    except UserError as error:
        return list(error.problems)
    return []


def _module_problems(path: str) -> list[Problem]:
    package, _, name = path.partition(".")
    if package == "networks" and not (Path(__file__).parent / f"{name}.py").is_file():
        if path in _LATER:
            what, remedy = f"{path} is not available yet", f"Use {LORA}."
        elif any(family in name for family in _OTHER_FAMILIES):
            what, remedy = f"{path} is for other models than Stable Diffusion 1 and 2", f"Use {LORA}."
        else:
            what, remedy = f"there is no network module {path}", f"Use {LORA}, or the import path of another package."
        return [Problem(what, "--network_module", remedy)]
    # The top package alone: looking further down would import it.
    return [] if importlib.util.find_spec(package) else [_not_installed(path)]


def _not_installed(path: str) -> Problem:
    package = path.split(".")[0]
    if package == LYCORIS:
        remedy = "Install it: pip install lycoris-lora"
    else:
        remedy = f"Install the package that provides {package}, or check the spelling; for LoRA give {LORA}."
    return Problem(f"the network module {path} is not installed", "--network_module", remedy)


def _settings_of(options: NetworkOptions) -> object:
    arguments = _split(options.network_args)
    if options.dim_from_weights:
        arguments = {name: value for name, value in arguments.items() if name not in RANK_ARGUMENTS}
    return read_settings(options.network_dim, options.network_alpha, options.network_dropout, arguments)


def _check_lora_file(path: Path) -> dict[str, Shape]:
    """Names and shapes in a LoRA file, empty where only loading it can tell; a file of another kind is refused."""
    shapes = shapes_in_file(path)
    if shapes:
        require_lora(shapes, where=str(path))
    return shapes


def _check_network_weights(path: Path, options: NetworkOptions) -> None:
    """Refuse a file that is no LoRA, or whose rank the new network will not have."""
    shapes = _check_lora_file(path)
    if options.dim_from_weights or "block_dims" in _split(options.network_args):
        return
    dims = _base_dims(shapes)
    own = options.network_dim or DEFAULT_DIM
    if dims and own not in dims:
        given = max(dims, key=dims.count)
        raise UserError(
            f"the network file has rank {given}, the new network rank {own}",
            where=f"--network_weights {path}",
            remedy=f"Add --dim_from_weights to take the ranks of the file, or set --network_dim {given}.",
        )


def _base_dims(shapes: Mapping[str, Shape]) -> list[int]:
    """Ranks of the linear layers and 1x1 convolutions in a LoRA file."""
    return list(lora_dims({name: shape for name, shape in shapes.items() if is_pointwise_shape(shape)}).values())


def import_network_module(path: str) -> ModuleType:
    """The module at the import path ``path``.

    Raises:
        UserError: It is not installed, fails to import, or is no network module.
    """
    try:
        module = importlib.import_module(path)
    except ModuleNotFoundError as error:
        if error.name is None or not (path + ".").startswith(error.name + "."):
            raise UserError(
                f"the network module {path} needs {error.name}, which is not installed",
                where="--network_module",
                remedy=f"Install {error.name}.",
            ) from error
        raise UserError.of([_not_installed(path)]) from error
    except Exception as error:
        raise UserError(
            f"the network module {path} fails to import: {type(error).__name__}: {error}",
            where="--network_module",
            remedy="Install a version of it that works with the torch and diffusers installed here.",
        ) from error
    missing = [name for name in ("create_network", "create_network_from_weights") if not hasattr(module, name)]
    if missing:
        raise UserError(
            f"{path} is not a network module: it has no {' and no '.join(missing)}",
            where="--network_module",
            remedy=f"Give {LORA}, lycoris.kohya or the like.",
        )
    return module


def build_network(options: NetworkOptions, *, model: "StableDiffusion", seed: int) -> "AdapterNetwork":
    """Merge the base weights into ``model``, then create the network, draw its weights by ``seed``, attach and load it.

    Raises:
        UserError: The module, an argument or a file cannot be used.
    """
    from library.randomness import seeded_globals
    from networks.base import KeyedInitialization, named_text_encoder
    from networks.third_party import explained, made_compatible

    assert options.network_module is not None, "checked before"
    module = import_network_module(options.network_module)
    text_encoder = named_text_encoder(model.text_encoder)
    _merge_base_weights(options, text_encoder, model.unet)
    # Modules of other authors draw from the global generators.
    with seeded_globals(seed, "init"), made_compatible(module, model.unet):
        network = explained(
            module, "create the network", lambda: _create(module, options, model.vae, text_encoder, model.unet)
        )
        if isinstance(network, KeyedInitialization):
            network.initialize(seed)
        network.apply_to(
            text_encoder,
            model.unet,
            not options.network_train_unet_only,
            not options.network_train_text_encoder_only,
        )
    if options.network_weights is not None:
        explained(module, "load the network file", lambda: _load(network, options.network_weights))
    attached: AdapterNetwork = network
    return attached


def _create(
    module: ModuleType, options: NetworkOptions, vae: "nn.Module", text_encoder: "nn.Module", unet: "nn.Module"
) -> Any:
    arguments = _split(options.network_args)
    if options.network_dropout is not None:
        arguments.setdefault("dropout", options.network_dropout)
    if options.dim_from_weights:
        assert options.network_weights is not None, "checked before"
        weights = read_tensors(options.network_weights).tensors
        network, _ = module.create_network_from_weights(
            1.0, str(options.network_weights), vae, text_encoder, unet, weights_sd=weights, **arguments
        )
        return network
    return module.create_network(
        1.0,
        options.network_dim,
        options.network_alpha,
        vae,
        text_encoder,
        unet,
        neuron_dropout=options.network_dropout,
        **arguments,
    )


def _load(network: "AdapterNetwork", path: Path | None) -> None:
    assert path is not None
    # Every kind of network has alphas, under the same names.
    weights = {name for name in read_tensors(path).tensors if not name.endswith(ALPHA)}
    if not weights & network.state_dict().keys():
        raise UserError(
            "nothing in the file belongs to this network",
            where=f"--network_weights {path}",
            remedy="Give a file of the same --network_module, with the parts (U-Net, text encoder) that are trained.",
        )
    report = network.load_weights(str(path))
    pairs = report._asdict() if hasattr(report, "_asdict") else report if isinstance(report, dict) else {}
    differing = {str(kind).replace("_", " "): list(keys) for kind, keys in pairs.items() if keys}
    if not differing:
        log.info("load network weights from %s: %s", path.name, MATCHED)
    for kind, keys in differing.items():
        log.warning("load network weights from %s: %d %s, for instance %s", path.name, len(keys), kind, keys[0])


def _merge_base_weights(options: NetworkOptions, text_encoder: "nn.Module", unet: "nn.Module") -> None:
    if not options.base_weights:
        return
    from networks.lora import create_network_from_weights

    for path, given in zip_longest(options.base_weights, options.base_weights_multiplier):
        multiplier = 1.0 if given is None else given
        network, weights = create_network_from_weights(
            multiplier, str(path), None, text_encoder, unet, for_inference=True
        )
        network.merge_to(text_encoder, unet, weights)
        log.info("merged base weights %s, multiplier %s", path.name, multiplier)


def parameter_groups(
    network: "AdapterNetwork", *, text_encoder_lr: float | None, unet_lr: float | None, lr: float
) -> "list[ParameterGroup]":
    """The network's parameter groups (``params``, ``lr``, ``name``); parameters in no group are frozen.

    Args:
        network: An attached network.
        text_encoder_lr: Learning rate of the text encoder's part; ``lr`` when None.
        unet_lr: Learning rate of the U-Net's part; ``lr`` when None.
        lr: The general learning rate.

    Raises:
        UserError: No group remains.
    """
    prepare = network.prepare_optimizer_params
    rates = (lr if text_encoder_lr is None else text_encoder_lr, lr if unet_lr is None else unet_lr, lr)
    result = prepare(*rates[: len(inspect.signature(prepare).parameters)])
    raw, names = result if isinstance(result, tuple) else (result, [])
    groups = [{**group, "params": list(group["params"])} for group in raw]
    if not any(group["params"] for group in groups):
        raise UserError(
            "nothing is trained: every learning rate is 0",
            where="--learning_rate, --unet_lr, --text_encoder_lr",
            remedy="Give a learning rate above 0 for at least one part.",
        )
    for group, name in zip(groups, names, strict=False):
        group["name"] = name
    trained = {id(parameter) for group in groups for parameter in group["params"]}
    for parameter in network.parameters():
        parameter.requires_grad_(id(parameter) in trained)
    return groups
