"""The readers of the program, each as a function of the file that it is to read: it answers, or raises UserError."""

from collections.abc import Callable, Mapping
from pathlib import Path
from random import Random

from library.data.caption_files import UnreadableCaptionError, caption_in, read_text
from library.data.captions import caption_for
from library.data.config import read_spec
from library.data.file_facts import _facts_or_damage
from library.data.findings import Finding, warnings_of
from library.data.image_headers import UnreadableImageError, displayed_size
from library.data.images import decode
from library.data.info_file import info_of, keep_info
from library.data.latent_files import check_latents, picture_of
from library.data.lint import lint
from library.data.options import CacheOptions, CaptionOptions, ImageOptions, SourceOptions
from library.data.records import scan
from library.data.setup import prepare_data
from library.data.spec import CaptionRules, SubsetSpec
from library.errors import UserError, raise_if_any
from library.files import read_metadata, read_tensors
from library.models.caption_tokens import CaptionTokens
from library.models.detect import describe_source
from library.models.embedding_files import check_embedding_file, read_embedding
from library.models.recognise import checkpoint_family
from library.models.structure import carried_structure
from library.training.arguments import read_arguments
from library.training.log_targets import tracker_settings
from library.training.options import LoggingOptions
from library.training.prompt_files import load_prompts
from networks.adapter_files import lora_dims, require_lora, shapes_in_file

Read = Callable[[Path], object]

IMAGES = "images"
"""Folder beside the file, with images in it."""

_CAPTION_RULES = (
    CaptionRules(),
    CaptionRules(shuffle_caption=True, keep_tokens=1, caption_tag_dropout_rate=0.3, enable_wildcard=True),
    CaptionRules(shuffle_caption=True, keep_tokens_separator="|||", secondary_separator=";;;", token_warmup_step=0.5),
)


def read_dataset_file(path: Path) -> None:
    """``--dataset_config``, up to the buckets."""
    _check_data(SourceOptions(dataset_config=path))


def read_metadata_file(path: Path) -> None:
    """``--in_json``, and what the tools make of the file."""
    from finetune.metadata_files import read_entries, write_entries

    entries = read_entries(path)
    write_entries(path.with_name("written.jsonl"), entries)
    write_entries(path.with_name("written.json"), entries)
    _check_data(SourceOptions(in_json=path, train_data_dir=path.parent / IMAGES))


def _check_data(source: SourceOptions) -> None:
    spec, findings = read_spec(source, ImageOptions(resolution=(64, 64)), CaptionOptions(), CacheOptions())
    records, found = scan(spec)
    told = [*findings, *found, *lint(spec, records)]
    _refuse(told)
    prepare_data(spec, records)


def _refuse(findings: list[Finding]) -> None:
    for finding in warnings_of(findings):
        str(finding).encode()


def _as_any(path: Path, *roles: Read) -> None:
    """Read ``path`` in each of these roles; it is refused when all of them refuse it."""
    refusals = []
    for role in roles:
        try:
            role(path)
        except UserError as error:
            refusals.append(error)
    if len(refusals) == len(roles):
        raise refusals[0]


def read_option_file(path: Path) -> None:
    """``--config_file``, and ``--log_tracker_config``."""
    from library.options import parse_options
    from train_network import Options

    _as_any(
        path,
        lambda path: parse_options(Options, ["--config_file", str(path)], prog="", description=""),
        lambda path: tracker_settings(LoggingOptions(log_tracker_config=path)),
    )


def read_prompt_file(path: Path) -> None:
    """``--sample_prompts``."""
    load_prompts(path)


def read_caption(path: Path) -> None:
    """A caption file, through the caption rules to tokens."""
    try:
        text = read_text(path)
    except UnreadableCaptionError as error:
        raise UserError(str(error), remedy="Mend it.") from error
    tokens = CaptionTokens(limit=75, weighted=True)
    caption = ""
    for rules in _CAPTION_RULES:
        written, _ = caption_in(text, all_lines=rules.enable_wildcard)
        caption = caption_for(written, rules, Random(0), epoch=1, step=3, total_steps=10)
    tokens(caption)


def read_safetensors(path: Path) -> None:
    """A ``.safetensors`` file as a model, a network and an embedding."""
    carried_structure(read_metadata(path), where=str(path))
    _as_any(path, read_tensors, _read_network, _read_model, _read_embedding)


def read_torch_file(path: Path) -> None:
    """A torch file as a model and as an embedding."""
    _as_any(path, _read_and_copy, _read_model, _read_embedding)


def _read_and_copy(path: Path) -> None:
    for tensor in read_tensors(path, mapped=True).tensors.values():
        tensor.clone()


def _read_network(path: Path) -> None:
    shapes = shapes_in_file(path)
    require_lora(shapes, where=str(path))
    lora_dims(shapes)


def _read_model(path: Path) -> None:
    describe_source(str(path))
    checkpoint_family(read_tensors(path, mapped=True).tensors, where=str(path))


def _read_embedding(path: Path) -> None:
    raise_if_any(check_embedding_file(path, vectors=1, layered=False))
    read_embedding(path, vectors=1, width=4, layered=False)


def read_latents(path: Path) -> None:
    """An ``.npz`` file in the place of an image."""
    subset = SubsetSpec(image_dir=path.parent, name="images", where="test")
    _refuse(check_latents(path, subset, None)[1])
    picture_of(path)


def read_image(path: Path) -> None:
    """An image, by its header and decoded."""
    try:
        displayed_size(path)
    except UnreadableImageError as error:
        raise UserError(str(error), remedy="Replace it.") from error
    _facts_or_damage(path)
    decode(path)


def read_info_file(path: Path) -> None:
    """``metadata_cache.json``, which is written anew where it is wrong."""
    for finding in keep_info(path.parent, info_of("images", [("0.png", "a cat", (64, 64))])):
        str(finding).encode()


def read_argument(path: Path) -> None:
    """``--optimizer_args KEY=VALUE`` and its like."""
    text = path.read_bytes().decode("utf-8", "replace")
    raise_if_any(read_arguments([text], flag="--optimizer_args")[1])


def read_model_folder(path: Path) -> None:
    """The configuration of a text encoder in a Diffusers folder, and a model built by it."""
    import torch

    from library.models.parts import build_text_encoder
    from library.models.stable_diffusion import _read_part

    describe_source(str(path.parent.parent))
    part = _read_part(path.parent, "text_encoder")
    build_text_encoder(part.config, part.tensors, dtype=torch.float32, where=str(path))


READERS: Mapping[str, Read] = {
    "dataset file": read_dataset_file,
    "option file": read_option_file,
    "metadata file": read_metadata_file,
    "prompt file": read_prompt_file,
    "caption": read_caption,
    "arguments": read_argument,
    "safetensors": read_safetensors,
    "torch file": read_torch_file,
    "latents": read_latents,
    "image": read_image,
    "info file": read_info_file,
    "model config": read_model_folder,
}


TEXT_CONFIG = {
    "vocab_size": 16,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "max_position_embeddings": 4,
    "hidden_act": "quick_gelu",
    "eos_token_id": 2,
}
"""A text encoder of a few hundred numbers."""


def prepare(folder: Path) -> None:
    """Put into ``folder`` what the readers look for beside their file: two images, and a model without its config."""
    import numpy as np
    from PIL import Image
    from safetensors.numpy import save_file

    (folder / IMAGES).mkdir(parents=True)
    for number in range(2):
        Image.new("RGB", (64, 64), (number, 2, 3)).save(folder / IMAGES / f"{number}.png")
        (folder / IMAGES / f"{number}.txt").write_text("a cat, red")
    for part in ("unet", "vae", "text_encoder"):
        (folder / part).mkdir()
        (folder / part / "config.json").write_text("{}")
        (folder / part / "diffusion_pytorch_model.safetensors").write_bytes(b"\2\0\0\0\0\0\0\0{}")
    shapes = {"embeddings.token_embedding.weight": (16, 8), "embeddings.position_embedding.weight": (4, 8)}
    layer = "encoder.layers.0"
    for name in [f"{layer}.self_attn.{part}_proj" for part in ("q", "k", "v", "out")] + [
        f"{layer}.mlp.fc1",
        f"{layer}.mlp.fc2",
    ]:
        shapes |= {f"{name}.weight": (8, 8), f"{name}.bias": (8,)}
    for name in (f"{layer}.layer_norm1", f"{layer}.layer_norm2", "final_layer_norm"):
        shapes |= {f"{name}.weight": (8,), f"{name}.bias": (8,)}
    save_file(
        {name: np.zeros(shape, np.float32) for name, shape in shapes.items()},
        folder / "text_encoder" / "model.safetensors",
    )
