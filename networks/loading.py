"""From options to a network that is attached to the model; the module is found by its import path.

Importing this module imports nothing heavy, so the options can be checked first.
"""

import difflib
import importlib
import inspect
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Final

from library.errors import Problem, UserError
from library.files import read_tensors
from library.training.source_classes import is_import_path, is_installed
from networks.adapter_files import ALPHA, kind_of
from networks.arguments import split_arguments
from networks.checks import LYCORIS, OWN, base_weight_problems, lycoris_problems, own_problems
from networks.options import NetworkOptions

if TYPE_CHECKING:
    from torch import Tensor, nn

    from library.models.stable_diffusion import StableDiffusion
    from networks.base import AdapterNetwork, ParameterGroup

log = logging.getLogger(__name__)

LORA: Final = "networks.lora"
MATCHED: Final = "<All keys matched successfully>"

_OTHER_FAMILIES: Final = ("anima", "chroma", "flux", "hunyuan", "lllite", "lumina", "sd3")


def network_arguments(options: NetworkOptions) -> dict[str, object] | None:
    """``--network_args`` by name, for the metadata, with the dropout that goes with them; None when none are given."""
    if not options.network_args:
        return None
    return {"dropout": options.network_dropout} | split_arguments(options.network_args)


def check_network(options: NetworkOptions) -> list[Problem]:
    """What is wrong with the network module, its arguments and its files, as far as names and headers tell."""
    if options.network_module is None:
        return [
            Problem("--network_module is missing", "--network_module", f"Give --network_module {LORA} to train a LoRA.")
        ]
    return (
        _module_problems(options.network_module)
        + own_problems(options)
        + lycoris_problems(options)
        + base_weight_problems(options)
    )


def _module_problems(path: str) -> list[Problem]:
    package, _, name = path.partition(".")
    if package == "networks" and not (Path(__file__).parent / f"{name}.py").is_file():
        if any(family in name for family in _OTHER_FAMILIES):
            what, remedy = f"{path} is for other models than Stable Diffusion 1 and 2", f"Use {LORA}."
        else:
            near = difflib.get_close_matches(path, OWN, n=1)
            hint = f"Did you mean {near[0]}? " if near else ""
            what, remedy = f"there is no network module {path}", f"{hint}There are {', '.join(OWN)}."
        return [Problem(what, "--network_module", remedy)]
    if not is_import_path(path):
        remedy = f"Write package.module; for LoRA give {LORA}."
        return [Problem(f"{path!r} is no import path of a network module", "--network_module", remedy)]
    # The top package alone: looking further down would import it.
    return [] if is_installed(path) else [_not_installed(path)]


def _not_installed(path: str) -> Problem:
    package = path.split(".")[0]
    if package == LYCORIS:
        remedy = "Install it: pip install lycoris-lora"
    else:
        remedy = f"Install the package that provides {package}, or check the spelling; for LoRA give {LORA}."
    return Problem(f"the network module {path} is not installed", "--network_module", remedy)


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


def build_network(
    options: NetworkOptions,
    *,
    model: "StableDiffusion",
    seed: int,
    settle: "Callable[[StableDiffusion], None] | None" = None,
) -> "AdapterNetwork":
    """Merge the base weights into ``model``, then create the network, draw its weights by ``seed``, attach and load it.

    Args:
        options: The network.
        model: The base model; changed in place.
        seed: Seed of the run.
        settle: Called with the model in between, when its weights are final and nothing is attached.

    Raises:
        UserError: The module, an argument or a file cannot be used.
    """
    from library.randomness import seeded_globals
    from networks.base import KeyedInitialization, named_text_encoder
    from networks.third_party import check_algorithm, check_any_layer, explained, made_compatible

    assert options.network_module is not None, "checked before"
    module = import_network_module(options.network_module)
    check_algorithm(module, split_arguments(options.network_args))
    text_encoder = named_text_encoder(model.text_encoder)
    merge_weights(_base_weights(options), text_encoder, model.unet)
    if settle is not None:
        settle(model)
    # Ours make nothing of the VAE, which may not have been needed yet.
    vae = None if options.network_module in OWN else model.vae
    # Modules of other authors draw from the global generators.
    with seeded_globals(seed, "init"), made_compatible(module, model.unet):
        network = explained(
            module, "create the network", lambda: _create(module, options, vae, text_encoder, model.unet)
        )
        if isinstance(network, KeyedInitialization):
            network.initialize(seed)
        network.apply_to(
            text_encoder,
            model.unet,
            not options.network_train_unet_only,
            not options.network_train_text_encoder_only,
        )
    check_any_layer(module, network)
    if options.network_weights is not None:
        explained(module, "load the network file", lambda: _load(network, options.network_weights))
    attached: AdapterNetwork = network
    return attached


def _create(
    module: ModuleType, options: NetworkOptions, vae: "nn.Module | None", text_encoder: "nn.Module", unet: "nn.Module"
) -> Any:
    arguments = split_arguments(options.network_args)
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


def _base_weights(options: NetworkOptions) -> "Iterator[tuple[Path, Mapping[str, Tensor], float]]":
    for path, given in zip_longest(options.base_weights, options.base_weights_multiplier):
        yield path, read_tensors(path).tensors, 1.0 if given is None else given


def merge_weights(
    files: "Iterable[tuple[Path, Mapping[str, Tensor], float]]", text_encoder: "nn.Module", unet: "nn.Module"
) -> None:
    """Fold network files of LoRA and OFT into the weights of a model, one after the other.

    Args:
        files: Each with its tensors and its strength.
        text_encoder: The text encoder, by the names that network files use.
        unet: The U-Net.

    Raises:
        UserError: A file is of another kind, or fits the model nowhere.
    """
    from networks import lora, oft

    for path, tensors, multiplier in files:
        create: Callable[..., Any] = (oft if kind_of(tensors) == "OFT" else lora).create_network_from_weights
        try:
            network, weights = create(
                multiplier, str(path), None, text_encoder, unet, weights_sd=tensors, for_inference=True
            )
            network.merge_to(text_encoder, unet, weights)
        except UserError as error:
            raise UserError.of(replace(problem, where=str(path)) for problem in error.problems) from error
        log.info("merged %s into the model, multiplier %s", path.name, multiplier)


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
