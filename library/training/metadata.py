"""What a result says of itself: the ``ss_*`` record of the training, and the ``modelspec.*`` card of the model.

All values are text, as the safetensors header wants them; None is written "None". Paths are reduced to their last part.
"""

import base64
import json
import mimetypes
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from library.documents import home_expanded
from library.errors import Problem
from library.files import legacy_hash_of_file, sha256_of_file
from library.training.clock import iso_date, now
from library.training.options import MetadataOptions
from library.training.privacy import last_part, model_name, shareable

IMPLEMENTATION_VERSION: Final = "sd-training-toolkit/1.0"
MODELSPEC_VERSION: Final = "1.0.1"
STABILITY: Final = "https://github.com/Stability-AI/generative-models"

# What stays with --no_metadata: what other programs need to load the file.
MINIMUM_KEYS: Final = (
    "ss_v2",
    "ss_base_model_version",
    "ss_network_module",
    "ss_network_dim",
    "ss_network_alpha",
    "ss_network_args",
)

# Options recorded under their own name.
_RECORDED: Final = (
    "adaptive_noise_scale",
    "cache_latents",
    "caption_dropout_every_n_epochs",
    "caption_dropout_rate",
    "caption_tag_dropout_rate",
    "clip_skip",
    "face_crop_aug_range",
    "fp8_base",
    "fp8_base_unet",
    "full_fp16",
    "gradient_accumulation_steps",
    "gradient_checkpointing",
    "huber_c",
    "huber_scale",
    "huber_schedule",
    "ip_noise_gamma",
    "ip_noise_gamma_random_strength",
    "learning_rate",
    "loss_type",
    "lowram",
    "lr_scheduler",
    "lr_warmup_steps",
    "max_grad_norm",
    "max_token_length",
    "max_validation_steps",
    "min_snr_gamma",
    "mixed_precision",
    "multires_noise_discount",
    "multires_noise_iterations",
    "network_alpha",
    "network_dim",
    "network_dropout",
    "network_module",
    "noise_offset",
    "noise_offset_random_strength",
    "output_name",
    "prior_loss_weight",
    "resize_interpolation",
    "scale_weight_norms",
    "training_comment",
    "unet_lr",
    "v2",
    "validate_every_n_epochs",
    "validate_every_n_steps",
    "validation_seed",
    "validation_split",
    "zero_terminal_snr",
)
# Recorded where timesteps are not drawn as everywhere else.
_DISTRIBUTION: Final = ("timestep_distribution", "timestep_logit_mean", "timestep_logit_std", "timestep_snr_gamma")


@dataclass(frozen=True, kw_only=True, slots=True)
class RunFacts:
    """What is known of a run when it starts, beyond its options.

    Attributes:
        session_id: Number of the session.
        started_at: Start, in seconds since 1970.
        seed: Seed of the run, given or drawn.
        train_images: Training images times repeats.
        reg_images: Regularisation images times repeats.
        validation_images: Validation images times repeats.
        batches_per_epoch: Batches of an epoch.
        epochs: Epochs of the run.
        total_steps: Optimizer steps of the run.
        optimizer: The optimizer's class and arguments.
        base_model_version: "sd_v1", "sd_v1_v", "sd_v2" or "sd_v2_v".
        model: Path or hub id of the base model.
        vae: Path or hub id of the VAE used in place of the model's.
        network_args: Arguments of the network, None if none were given.
    """

    session_id: int
    started_at: float
    seed: int
    train_images: int
    reg_images: int
    validation_images: int = 0
    batches_per_epoch: int
    epochs: int
    total_steps: int
    optimizer: str
    base_model_version: str
    model: str
    vae: str | None = None
    network_args: Mapping[str, object] | None = None


def training_metadata(options: Mapping[str, object], facts: RunFacts, dataset: Mapping[str, str]) -> dict[str, str]:
    """The ``ss_*`` record of a run that starts.

    Args:
        options: All option values by name.
        facts: What is known beyond the options.
        dataset: The keys that describe the data set, made where the data set is known.
    """
    shared = shareable(options)
    record: dict[str, object] = {f"ss_{name}": shared.get(name) for name in _RECORDED}
    record |= {
        "ss_session_id": facts.session_id,
        "ss_training_started_at": facts.started_at,
        "ss_seed": facts.seed,
        "ss_num_train_images": facts.train_images,
        "ss_num_reg_images": facts.reg_images,
        "ss_num_validation_images": facts.validation_images,
        "ss_num_batches_per_epoch": facts.batches_per_epoch,
        "ss_num_epochs": facts.epochs,
        "ss_max_train_steps": facts.total_steps,
        "ss_optimizer": facts.optimizer,
        "ss_base_model_version": facts.base_model_version,
        "ss_text_encoder_lr": _first(shared.get("text_encoder_lr")),
        "ss_debiased_estimation": shared.get("debiased_estimation_loss"),
        "ss_sd_scripts_commit_hash": "(unknown)",
    }
    if shared.get(_DISTRIBUTION[0], "uniform") != "uniform":
        record |= {f"ss_{name}": shared.get(name) for name in _DISTRIBUTION}
    if isinstance(record["ss_output_name"], str):
        record["ss_output_name"] = last_part(record["ss_output_name"])
    if facts.network_args is not None:
        record["ss_network_args"] = json.dumps(shareable(facts.network_args))
    record |= _source("ss_sd_model_name", "ss_sd_model_hash", "ss_new_sd_model_hash", facts.model)
    if facts.vae is not None:
        record |= _source("ss_vae_name", "ss_vae_hash", "ss_new_vae_hash", facts.vae)
    return {name: _text(value) for name, value in record.items()} | dict(dataset)


def _text(value: object) -> str:
    return str(tuple(value) if isinstance(value, list) else value)


def _first(rates: object) -> object:
    """The rate of the only text encoder; files for other models name more."""
    return next(iter(rates), None) if isinstance(rates, (list, tuple)) else rates


def _source(name_key: str, hash_key: str, sha256_key: str, source: str) -> dict[str, object]:
    """Name and hashes of a model the run started from; a hub id has no hashes."""
    path = home_expanded(Path(source))
    if path.is_file():
        hashes = {hash_key: legacy_hash_of_file(path), sha256_key: sha256_of_file(path)}
    else:
        hashes = dict.fromkeys((hash_key, sha256_key), "IsADirectory") if path.exists() else {}
    return {name_key: model_name(source), **hashes}


def file_metadata(
    record: Mapping[str, str], card: Mapping[str, str], *, step: int, epoch: int, no_metadata: bool = False
) -> dict[str, str]:
    """What goes into a file saved after ``step`` steps and ``epoch`` epochs.

    Args:
        record: The ``ss_*`` record of the run.
        card: The ``modelspec.*`` card.
        step: Number of finished optimizer steps.
        epoch: Number of finished epochs.
        no_metadata: Keep only what other programs need of the record.
    """
    if no_metadata:
        return {name: record[name] for name in MINIMUM_KEYS if name in record} | dict(card)
    progress = {"ss_training_finished_at": str(now()), "ss_steps": str(step), "ss_epoch": str(epoch)}
    return {**record, **progress, **card}


Kind = Literal["checkpoint", "diffusers", "lora", "textual-inversion"]

_ARCHITECTURES: Final = {
    "sd_v1": "stable-diffusion-v1",
    "sd_v1_v": "stable-diffusion-v1",
    "sd_v2": "stable-diffusion-v2-512",
    "sd_v2_v": "stable-diffusion-v2-768-v",
}
_DEFAULT_TITLES: Final = {
    "checkpoint": "Checkpoint",
    "diffusers": "Checkpoint",
    "lora": "LoRA",
    "textual-inversion": "TextualInversion",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelFacts:
    """What a model card says beyond the options for it.

    Attributes:
        kind: What the file holds.
        base_model_version: "sd_v1", "sd_v1_v", "sd_v2" or "sd_v2_v".
        resolution: Trained size: a side, (width, height), or text such as "512,768".
        output_name: Base name of the results, the title where none is given.
        min_timestep: Lowest trained timestep, where the range is narrowed.
        max_timestep: Highest trained timestep, where the range is narrowed.
        clip_skip: Layer of the text encoder used, where it is not the last.
    """

    kind: Kind
    base_model_version: str
    resolution: int | str | tuple[int, ...] | None = None
    output_name: str | None = None
    min_timestep: int | None = None
    max_timestep: int | None = None
    clip_skip: int | None = None


def modelspec(options: MetadataOptions, facts: ModelFacts, *, timestamp: float) -> dict[str, str]:
    """The ``modelspec.*`` card of a file written at ``timestamp`` (seconds since 1970)."""
    version = facts.base_model_version
    suffix = f"/{facts.kind}" if facts.kind in ("lora", "textual-inversion") else ""
    timesteps = None
    if facts.min_timestep is not None or facts.max_timestep is not None:
        timesteps = f"{facts.min_timestep or 0},{1000 if facts.max_timestep is None else facts.max_timestep}"
    output_name = last_part(facts.output_name) if facts.output_name else None
    entries = {
        "sai_model_spec": MODELSPEC_VERSION,
        "architecture": _ARCHITECTURES[version] + suffix,
        "implementation": "diffusers" if facts.kind in ("lora", "diffusers") else STABILITY,
        "implementation_version": IMPLEMENTATION_VERSION,
        "title": options.metadata_title or output_name or f"{_DEFAULT_TITLES[facts.kind]}@{timestamp}",
        "date": iso_date(timestamp),
        "resolution": _resolution(facts.resolution, 768 if version == "sd_v2_v" else 512),
        "prediction_type": "v" if version.endswith("_v") else "epsilon",
        "timestep_range": timesteps,
        "encoder_layer": None if facts.clip_skip is None else str(facts.clip_skip),
        "author": options.metadata_author,
        "description": options.metadata_description,
        "license": options.metadata_license,
        "tags": options.metadata_tags,
        "usage_hint": options.metadata_usage_hint,
        "thumbnail": _thumbnail(options.metadata_thumbnail),
        "merged_from": options.metadata_merged_from,
        "trigger_phrase": options.metadata_trigger_phrase,
        "preprocessor": options.metadata_preprocessor,
        "is_negative_embedding": options.metadata_is_negative_embedding,
    }
    return {f"modelspec.{name}": value for name, value in entries.items() if value is not None}


def _resolution(resolution: int | str | tuple[int, ...] | None, default: int) -> str:
    if resolution is None:
        resolution = default
    sides = str(resolution).split(",") if isinstance(resolution, (int, str)) else [str(side) for side in resolution]
    return f"{sides[0].strip()}x{sides[-1].strip()}"


def check_metadata(options: MetadataOptions) -> list[Problem]:
    """What is wrong with the metadata options; imports nothing heavy."""
    thumbnail = options.metadata_thumbnail
    if thumbnail is None or thumbnail.startswith("data:") or home_expanded(Path(thumbnail)).is_file():
        return []
    return [
        Problem(
            f"thumbnail not found: {thumbnail}",
            where="--metadata_thumbnail",
            remedy="Give an image file, or a URL that starts with 'data:'.",
        )
    ]


def _thumbnail(source: str | None) -> str | None:
    """A ``data:`` URL; an image file becomes one."""
    if source is None or source.startswith("data:"):
        return source
    path = home_expanded(Path(source))
    media_type = mimetypes.guess_type(path.name)[0] or "image/png"
    return f"data:{media_type};base64,{base64.b64encode(path.read_bytes()).decode('ascii')}"
