"""What ends a run from outside the program, told as what it is: memory that ran out, another process that is gone."""

import errno
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import torch

from library.errors import UserError, first_line

_NO_MEMORY: Final = re.compile(
    r"DefaultCPUAllocator|not enough memory|out of memory|Cannot allocate memory|Storage size calculation overflowed",
    re.I,
)
_PEER_GONE: Final = re.compile(r"gloo|nccl|Connection (closed|reset) by peer|Broken pipe", re.I)

Values = Mapping[str, Any]
"""The values of all options by name; an option that a script does not have is absent."""


@dataclass(frozen=True, slots=True)
class _Saving:
    """A way to need less memory.

    Attributes:
        options: What to give.
        saves: What it saves; "not measured" where nobody has.
        is_left: Whether the options of a run leave it open.
    """

    options: str
    saves: str
    is_left: Callable[[Values], bool]


def _trains_model(values: Values) -> bool:
    return "network_module" not in values and "token_string" not in values


def _has(values: Values, name: str, *off: object) -> bool:
    """Whether the script has an option, and it is off."""
    return name in values and values[name] in (off or (False,))


_SAVINGS: Final = (
    _Saving(
        "a smaller --train_batch_size (batch_size in a data set's file), with more --gradient_accumulation_steps",
        "activations in proportion, for the same result; not measured",
        lambda values: values["largest_batch"] > 1,
    ),
    _Saving(
        "--gradient_checkpointing",
        "most of the activations; about a third slower; not measured",
        lambda values: _has(values, "gradient_checkpointing"),
    ),
    _Saving(
        "--cache_latents",
        "the VAE and its activations during training, 0.34 GB in fp32 by its size; not measured",
        lambda values: (
            _has(values, "cache_latents")
            and not values["cache_latents_to_disk"]
            and not values["color_aug"]
            and not values["random_crop"]
        ),
    ),
    _Saving(
        "--mixed_precision bf16 --full_bf16 --fused_backward_pass --max_grad_norm 0",
        "half of everything: 7.00 instead of 14.09 GiB, measured on a CPU with a whole SD 1.5",
        lambda values: _trains_model(values) and _has(values, "fused_backward_pass"),
    ),
    _Saving(
        "--mixed_precision bf16 (fp16 on GPUs before RTX 30)",
        "half of the frozen weights and of most activations; not measured",
        lambda values: not _trains_model(values) and _has(values, "mixed_precision", "no"),
    ),
    _Saving(
        "--fp8_base, with --mixed_precision",
        "half of the frozen weights in bf16: 1.52 instead of 2.29 GiB, measured on a CPU with one image of 64x64",
        lambda values: not _trains_model(values) and _has(values, "fp8_base") and not values["fp8_base_unet"],
    ),
    _Saving(
        "--network_train_unet_only --cache_text_encoder_outputs",
        "the text encoder during training, 0.49 GB in fp32 by its size; not measured",
        lambda values: _has(values, "network_train_unet_only"),
    ),
    _Saving(
        "--optimizer_type AdamW8bit",
        "6 of the 16 bytes of each trained value; not measured",
        lambda values: values["optimizer_type"].lower() in ("", "adamw", "adam"),
    ),
    _Saving(
        "--max_data_loader_n_workers 0",
        "of main memory, that of each process that loads data; not measured",
        lambda values: values["max_data_loader_n_workers"] > 0,
    ),
    _Saving(
        "a smaller --resolution",
        "activations in proportion to the area, for other results; not measured",
        lambda values: True,
    ),
)


@contextmanager
def breakdowns_explained(values: Values, *, largest_batch: int, world: int, where: str) -> Iterator[None]:
    """Turn errors that mean a breakdown into ones for the user.

    Args:
        values: The options of the run.
        largest_batch: Images in its largest batch.
        world: Number of processes.
        where: The device.

    Raises:
        UserError: Memory ran out, or another process has ended.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if _is_out_of_memory(error):
            raise _out_of_memory({**values, "largest_batch": largest_batch}, error, where) from error
        if world > 1 and _is_lost_peer(error):
            raise UserError(
                "another process of this run has ended, and no step can be made without it",
                where="several processes",
                remedy="Its own message says why; without one, the system has ended it, mostly for want of memory. "
                "What was saved is good.",
            ) from error
        raise


@contextmanager
def memory_explained(*, where: str, remedy: str) -> Iterator[None]:
    """Turn the error of memory that ran out into one for the user, where no batch is trained on yet.

    Args:
        where: The options that decide how much is needed.
        remedy: What needs less.

    Raises:
        UserError: Memory ran out.
    """
    try:
        yield
    except Exception as error:
        if not _is_out_of_memory(error):
            raise
        raise UserError(f"memory ran out: {first_line(error)}", where=where, remedy=remedy) from error


def _is_out_of_memory(error: Exception) -> bool:
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and _NO_MEMORY.search(str(error)) is not None


def _is_lost_peer(error: Exception) -> bool:
    is_known = isinstance(error, torch.distributed.DistError)
    return is_known or (isinstance(error, RuntimeError | OSError) and _PEER_GONE.search(str(error)) is not None)


def _out_of_memory(values: Values, error: Exception, where: str) -> UserError:
    savings = [f"\n    {one.options}: {one.saves}" for one in _SAVINGS if one.is_left(values)]
    return UserError(
        f"memory ran out: {first_line(error)}",
        where=where,
        remedy="These need less, the first the least trouble; docs/precision_and_memory.md tells more:"
        + "".join(savings),
    )
