"""Make network modules of other authors work with the model classes of today's diffusers and transformers."""

import difflib
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import Any, TypeVar

from diffusers.models.embeddings import TimestepEmbedding
from torch import nn

from library.errors import UserError

log = logging.getLogger(__name__)

Result = TypeVar("Result")


@contextmanager
def made_compatible(module: ModuleType, unet: nn.Module) -> Iterator[None]:
    """Inside the block ``module`` can create a network for ``unet``; afterwards both are as they were.

    LyCORIS finds layers by class name and by path. In diffusers' U-Net it finds those of ``time_embedding`` by both and
    refuses the duplicates (4.0 to 4.1.3), so the class carries another name meanwhile. Its presets are attributes of
    the class, which a later network in the same process would inherit, so they are put back. What it makes of a file
    of ``full`` holds the changes already, and would hold them twice after loading; that of ``ia3`` fails (4.1.3), and
    the preset ``ia3`` names layers as if they were at the top of the model.
    """
    with ExitStack() as stack:
        if is_lycoris(module):
            stack.enter_context(_class_settings_kept(module))
            stack.enter_context(_time_embedding_renamed(unet))
            stack.enter_context(_maker_replaced(module, "FullModule", _empty_full))
            stack.enter_context(_maker_replaced(module, "IA3Module", _empty_ia3))
            stack.enter_context(_ia3_names_anywhere(module))
        yield


def is_lycoris(module: ModuleType) -> bool:
    """Whether ``module`` belongs to the package LyCORIS."""
    return module.__name__.split(".")[0] == "lycoris"


def check_algorithm(module: ModuleType, arguments: Mapping[str, object]) -> None:
    """Refuse an ``algo`` that LyCORIS has not.

    Raises:
        UserError: Naming those that it has.
    """
    known = getattr(module, "network_module_dict", None)
    algorithm = str(arguments.get("algo") or "lora").lower()
    if is_lycoris(module) and known and algorithm not in known:
        near = difflib.get_close_matches(algorithm, known, n=1)
        raise UserError(
            f"{module.__name__} has no algorithm {algorithm!r}",
            where="--network_args",
            remedy=(f"Did you mean {near[0]}? " if near else "") + f"It has {', '.join(known)}.",
        )


def check_any_layer(module: ModuleType, network: nn.Module) -> None:
    """Refuse a network without parameters.

    Raises:
        UserError: It has none.
    """
    if next(network.parameters(), None) is None:
        raise UserError(
            f"{module.__name__} found no layer to adapt",
            where="--network_args",
            remedy="Choose other layers, with LyCORIS for example preset=full or preset=attn-mlp, and train the part "
            "of the model that they are in.",
        )


@contextmanager
def _maker_replaced(module: ModuleType, name: str, make: Callable[..., object]) -> Iterator[None]:
    """Let the class ``name`` make modules from a file with ``make``; the host loads the values afterwards."""
    owner = getattr(module, name, None)
    if owner is None or "make_module_from_state_dict" not in vars(owner):
        yield
        return
    before = vars(owner)["make_module_from_state_dict"]
    owner.make_module_from_state_dict = classmethod(make)
    try:
        yield
    finally:
        owner.make_module_from_state_dict = before


def _empty_full(cls: Callable[..., nn.Module], name: str, layer: nn.Module, *_weights: object) -> nn.Module:
    return cls(name, layer, 1)


def _empty_ia3(
    cls: Callable[..., nn.Module], name: str, layer: nn.Module, _weight: object, on_input: object
) -> nn.Module:
    return cls(name, layer, 1, train_on_input=bool(on_input))


@contextmanager
def _ia3_names_anywhere(module: ModuleType) -> Iterator[None]:
    presets: dict[str, dict[str, Any]] = getattr(module, "PRESET", {})
    before = presets.get("ia3")
    if before is None:
        yield
        return
    names = {key: [f".*{name}$" for name in before[key]] for key in before if key.endswith("target_name")}
    overrides = {f".*{name}$": value for name, value in before.get("name_algo_map", {}).items()}
    presets["ia3"] = {**before, **names, "name_algo_map": overrides}
    try:
        yield
    finally:
        presets["ia3"] = before


@contextmanager
def _class_settings_kept(module: ModuleType) -> Iterator[None]:
    classes = [value for value in vars(module).values() if isinstance(value, type) and issubclass(value, nn.Module)]
    kept = [(owner, name, value) for owner in classes for name, value in vars(owner).items() if name.isupper()]
    try:
        yield
    finally:
        for owner, name, value in kept:
            setattr(owner, name, value)


@contextmanager
def _time_embedding_renamed(unet: nn.Module) -> Iterator[None]:
    renamed = type("TimeMLP", (TimestepEmbedding,), {})
    embeddings = [part for part in unet.modules() if type(part) is TimestepEmbedding]
    for embedding in embeddings:
        embedding.__class__ = renamed
    try:
        yield
    finally:
        for embedding in embeddings:
            embedding.__class__ = TimestepEmbedding


def explained(module: ModuleType, action: str, call: Callable[[], Result]) -> Result:
    """The result of ``call``; an exception of a third-party ``module`` becomes a message for the user.

    Raises:
        UserError: From our own modules as it is, otherwise saying that ``module`` failed to do ``action``.
    """
    try:
        return call()
    except UserError:
        raise
    except Exception as error:
        if module.__name__.split(".")[0] == "networks":
            raise
        first_line = (str(error).splitlines() or [""])[0]
        raise UserError(
            f"{module.__name__} could not {action}: {type(error).__name__}: {first_line}",
            where="--network_module, --network_args",
            remedy="Compare --network_args and the files given with the documentation of that package.",
        ) from error
