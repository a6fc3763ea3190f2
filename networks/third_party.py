"""Make network modules of other authors work with the model classes of today's diffusers and transformers."""

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import TypeVar

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
    the class, which a later network in the same process would inherit, so they are put back.
    """
    with ExitStack() as stack:
        if module.__name__.split(".")[0] == "lycoris":
            stack.enter_context(_class_settings_kept(module))
            stack.enter_context(_time_embedding_renamed(unet))
        yield


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
