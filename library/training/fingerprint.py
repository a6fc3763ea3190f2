"""What a run is made of, as states tell it: options, data and model; and whether a run may continue from a state."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from library.training.privacy import shareable

# What neither data nor mathematics of a run depend on, and every run may change: topics by the beginnings of names, and
# single names. A cache holds what would be encoded anyway; trained weights come from the state, and of others the
# weights themselves are compared.
_FREE_TOPICS: Final = (
    "async_", "console_", "huggingface_", "initial_", "log_", "max_train_", "metadata_", "output_", "persistent_",
    "resume_", "sample_", "save_", "validate_", "wandb_",
)  # fmt: skip
_FREE: Final = frozenset((
    "cache_latents", "cache_latents_to_disk", "ddp_timeout", "deepspeed", "ema_device", "ema_previews", "ema_save",
    "gradient_accumulation_steps", "logging_dir", "max_data_loader_n_workers", "max_validation_steps",
    "network_weights", "no_manifest", "no_metadata", "no_report", "pretrained_model_name_or_path", "resume",
    "skip_cache_check", "skip_until_initial_step", "tokenizer_cache_dir", "training_comment", "use_safetensors", "vae",
    "vae_batch_size", "vae_slicing", "weights",
))  # fmt: skip
_SAME_MATHEMATICS: Final = frozenset(
    {
        "channels_last",
        "cpu_offload_checkpointing",
        "ddp_gradient_as_bucket_view",
        "ddp_static_graph",
        "diffusers_xformers",
        "dynamo_backend",
        "ema",
        "gradient_checkpointing",
        "highvram",
        "lowram",
        "mem_eff_attn",
        "on_nonfinite",
        "sdpa",
        "torch_compile",
        "xformers",
    }
)
"""Options that change how something is computed, or what is computed beside: at most the last digits differ."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Changes:
    """How a run differs from the one that a state was saved by, one line for each difference.

    Attributes:
        defining: What makes it another run.
        harmless: What changes the last digits at most.
    """

    defining: tuple[str, ...] = ()
    harmless: tuple[str, ...] = ()


def fingerprint(
    options: Mapping[str, object], *, data: Mapping[str, object], model: Mapping[str, str], total_steps: int
) -> dict[str, object]:
    """What a run is made of, without secrets and paths.

    Args:
        options: Option values that are not told by ``data``.
        data: What its data sets come to, by name.
        model: Digests of the weights that are not trained, by part.
        total_steps: Its length.
    """
    made_of = {"options": shareable(options), "data": data, "model": model, "total_steps": total_steps}
    plain: dict[str, object] = json.loads(json.dumps(made_of, default=str))
    return plain


def changes(saved: Mapping[str, Any], current: Mapping[str, Any]) -> Changes:
    """What changed from the fingerprint ``saved`` to ``current``; saving, previews and logs may change freely."""
    found = [
        *_differences(saved, current, "data", "data: "),
        *(f"the weights of the {line}" for line in _differences(saved, current, "model", "", values=False)),
    ]
    options = [line for line in _differences(saved, current, "options", "--") if not _is_free(_option(line))]
    harmless = [line for line in options if _option(line) in _SAME_MATHEMATICS]
    return Changes(defining=(*(line for line in options if line not in harmless), *found), harmless=tuple(harmless))


def _option(line: str) -> str:
    """The name of the option that a line of a difference begins with."""
    return line.removeprefix("--").partition(":")[0]


def _is_free(name: str) -> bool:
    return name in _FREE or name.startswith(_FREE_TOPICS)


def _differences(
    saved: Mapping[str, Any], current: Mapping[str, Any], part: str, lead: str, *, values: bool = True
) -> list[str]:
    before, now = saved.get(part, {}), current.get(part, {})
    return [
        f"{lead}{name}: {_shown(before, name)} -> {_shown(now, name)}" if values else f"{lead}{name}"
        for name in sorted({*before, *now})
        if before.get(name) != now.get(name)
    ]


def _shown(values: Mapping[str, Any], name: str) -> str:
    return repr(values[name]) if name in values else "(not there)"
