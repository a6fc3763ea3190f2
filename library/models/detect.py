"""What a model path is, before anything heavy is imported: file, folder or hub id, SD1 or SD2, or a mistake.

Only configurations and the list of names in a weight file are read.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Final, Literal

from library.documents import DocumentError, home_expanded, path_objection, read_table
from library.errors import Problem, UserError
from library.files import read_metadata
from library.models.ldm_keys import UNET_PREFIX
from library.models.options import ModelOptions, PromptOptions
from library.models.recognise import (
    MODEL_FLAG,
    MODEL_REMEDY,
    MODEL_SUFFIXES,
    VAE_FLAG,
    VAE_REMEDY,
    check_vae,
    checkpoint_family,
    tensor_names,
)
from library.models.tokenizer import has_tokenizer, tokenizer_folders
from library.models.variant import TEXT_WIDTHS, Family, Prediction
from library.wording import named

PARTS: Final = ("unet", "vae", "text_encoder")
"""The folders of a Diffusers model that hold weights."""

LATENT_CHANNELS: Final = 4

_WEIGHTS: Final = (
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.fp16.safetensors",
    "diffusion_pytorch_model.bin",
    "diffusion_pytorch_model.fp16.bin",
)
WEIGHT_FILES: Final = {
    "unet": _WEIGHTS,
    "vae": _WEIGHTS,
    "text_encoder": ("model.safetensors", "model.fp16.safetensors", "pytorch_model.bin", "pytorch_model.fp16.bin"),
}
"""Names of a part's weights in its folder, best first."""

_HUB_ID: Final = re.compile(r"[\w.-]+/[\w.-]+")
_OTHER_PARTS: Final = ("text_encoder_2", "transformer", "prior")
_OTHER_PIPELINES: Final = ("XL", "Flux", "StableDiffusion3", "Cascade", "Video")
_PREDICTIONS: Final[Mapping[object, Prediction]] = {
    "epsilon": "epsilon",
    "v": "v_prediction",
    "v_prediction": "v_prediction",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceFacts:
    """What is known of a model before it is loaded.

    Attributes:
        kind: A single file, a Diffusers folder, or a model on the hub.
        name: What to call it: the file's or folder's name, or the hub id.
        path: Where it is; None on the hub.
        family: SD1 or SD2; None where only loading tells.
        text_width: Width of the text encoder, where it is told.
        in_channels: Input channels of the U-Net, where they are told: 4, or 9 for inpainting.
        prediction: What the model says it predicts, if it says.
    """

    kind: Literal["file", "folder", "hub"]
    name: str
    path: Path | None = None
    family: Family | None = None
    text_width: int | None = None
    in_channels: int | None = None
    prediction: Prediction | None = None


@dataclass(frozen=True, slots=True)
class SourceCheck:
    """What :func:`check_model_source` found: mistakes that end the run, and notices to show."""

    problems: tuple[Problem, ...]
    notices: tuple[str, ...]


def check_model_source(model: ModelOptions, prompts: PromptOptions) -> SourceCheck:
    """Check the base model, the VAE and the tokenizer folder as far as files can tell without loading them."""
    problems: list[Problem] = []
    notices: list[str] = []
    try:
        facts = describe_source(model.pretrained_model_name_or_path)
        problems += family_problems(facts, model)
        problems += _channel_problems(facts)
        notices += prediction_notices(facts, model)
    except UserError as error:
        problems += error.problems
    try:
        if model.vae:
            describe_vae(model.vae)
    except UserError as error:
        problems += error.problems
    folder = prompts.tokenizer_cache_dir
    if folder and folder.exists() and not folder.is_dir():
        problems.append(Problem("not a folder", f"--tokenizer_cache_dir {folder}", "Give a folder, or leave it out."))
    elif folder and not any(map(has_tokenizer, tokenizer_folders(folder, "sd2" if model.v2 else "sd1"))):
        notices.append(f"--tokenizer_cache_dir: {folder.name} has no tokenizer, so the program's own is used")
    return SourceCheck(tuple(problems), tuple(notices))


def describe_source(source: str | None) -> SourceFacts:
    """What the model at ``source`` is.

    Args:
        source: A path or a hub id, as given.

    Raises:
        UserError: Nothing given, nothing there, or something that is no Stable Diffusion 1.x or 2.x model.
    """
    if not source:
        raise UserError("no base model is given", where=MODEL_FLAG, remedy=MODEL_REMEDY)
    path = local_path(source, MODEL_FLAG)
    if path is None:
        return SourceFacts(kind="hub", name=source)
    return _describe_folder(path) if path.is_dir() else _describe_file(path)


def describe_vae(source: str) -> Path | None:
    """The local file or folder of a replacement VAE, or None when it is a hub id.

    Raises:
        UserError: Nothing there, or no VAE.
    """
    path = local_path(source, VAE_FLAG)
    if path is None:
        return None
    if path.is_dir():
        folder = vae_folder(path)
        weight_file(folder, "vae")
        return folder
    names = tensor_names(path)
    if names:
        check_vae(names, where=f"{VAE_FLAG} {path}")
    return path


def vae_folder(folder: Path) -> Path:
    """The folder with the VAE's ``config.json``: ``folder`` itself or its ``vae``.

    Raises:
        UserError: Neither has one.
    """
    for candidate in (folder, folder / "vae"):
        config = read_config(candidate / "config.json") if (candidate / "config.json").is_file() else {}
        if config.get("_class_name") == "AutoencoderKL" or "latent_channels" in config:
            return candidate
    raise UserError(f"no VAE in this folder ({_contents(folder)})", where=f"{VAE_FLAG} {folder}", remedy=VAE_REMEDY)


def weight_file(folder: Path, part: str) -> Path:
    """The file with a part's weights, ``.safetensors`` before ``.bin`` and full precision before half.

    Args:
        folder: The part's own folder.
        part: One of :data:`PARTS`.

    Raises:
        UserError: There is none.
    """
    for name in WEIGHT_FILES[part]:
        if (folder / name).is_file():
            return folder / name
    raise UserError(
        f"no weights in the folder {folder.name} ({_contents(folder)})",
        where=str(folder),
        remedy=f"Expected {WEIGHT_FILES[part][0]}: the model is incomplete; copy or download it again.",
    )


def family_problems(facts: SourceFacts, model: ModelOptions) -> list[Problem]:
    """Whether ``--v2`` contradicts what the model is."""
    if facts.family is None or (facts.family == "sd2") == model.v2:
        return []
    width = f" (its text encoder is {facts.text_width} wide)" if facts.text_width else ""
    where = f"{MODEL_FLAG} {facts.path or facts.name}"
    if model.v2:
        what = f"{facts.name} is a Stable Diffusion 1.x model{width}, but --v2 is given"
        return [Problem(what, where, "Leave out --v2.")]
    remedy = "Add --v2"
    if facts.prediction != "epsilon" and not model.v_parameterization:
        remedy += ", and --v_parameterization if it is a v-prediction model (SD 2.x at 768 pixels)"
    what = f"{facts.name} is a Stable Diffusion 2.x model{width}, but --v2 is not given"
    return [Problem(what, where, remedy + ".")]


def prediction_notices(facts: SourceFacts, model: ModelOptions) -> list[str]:
    """Whether ``--v_parameterization`` disagrees with what the model says of itself, which may be wrong."""
    if facts.prediction is None or (facts.prediction == "v_prediction") == model.v_parameterization:
        return []
    if model.v_parameterization:
        said = "predicts noise (epsilon), but --v_parameterization is given: leave it out"
    else:
        said = "predicts velocity, but --v_parameterization is not given: add it"
    return [f"{facts.name} says of itself that it {said} unless you know better; the wrong choice spoils the result"]


def local_path(source: str, flag: str) -> Path | None:
    """The existing file or folder that ``source`` names, or None when it can only be a hub id.

    Raises:
        UserError: It is a path, and nothing is there.
    """
    path = home_expanded(Path(source))
    if objection := path_objection(source):
        raise UserError(f"no such file or folder: {objection}", where=flag, remedy=MODEL_REMEDY)
    if path.exists():
        return path
    is_path = path.suffix.lower() in MODEL_SUFFIXES or (path.parent != Path() and path.parent.is_dir())
    if _HUB_ID.fullmatch(source) and not is_path:
        return None
    raise UserError(f"no such file or folder: {source}", where=flag, remedy=_near(path))


def _describe_file(path: Path) -> SourceFacts:
    names = tensor_names(path)
    contexts = [shape for name, shape in names.items() if name.endswith("attn2.to_k.weight") and len(shape) == 2]
    whole = path.parent.parent
    remedy = f"Give the model's folder: {whole}" if (whole / "model_index.json").is_file() else MODEL_REMEDY
    first = names.get(f"{UNET_PREFIX}input_blocks.0.0.weight", ())
    return SourceFacts(
        kind="file",
        name=path.name,
        path=path,
        family=checkpoint_family(names, where=f"{MODEL_FLAG} {path}", remedy=remedy) if names else None,
        text_width=contexts[0][1] if contexts else None,
        in_channels=first[1] if len(first) == 4 else None,
        prediction=_stated_prediction(read_metadata(path)),
    )


def _describe_folder(folder: Path) -> SourceFacts:
    _check_folder(folder)
    unet, text = read_config(folder / "unet/config.json"), read_config(folder / "text_encoder/config.json")
    inner = text.get("text_config")
    text = inner if isinstance(inner, dict) else text
    width = text.get("hidden_size")
    families = {known: family for family, known in TEXT_WIDTHS.items()}
    # A small model is told by its text encoder's activation: CLIP's own in SD1, the exact one in OpenCLIP's SD2.
    by_activation: Family = "sd1" if text.get("hidden_act", "quick_gelu") == "quick_gelu" else "sd2"
    return SourceFacts(
        kind="folder",
        name=folder.resolve().name,
        path=folder,
        family=families.get(width, by_activation) if isinstance(width, int) else by_activation,
        text_width=width,
        in_channels=unet.get("in_channels"),
        prediction=scheduler_prediction(folder),
    )


def scheduler_prediction(folder: Path) -> Prediction | None:
    """What the scheduler of a Diffusers folder says that the model predicts, if it says."""
    scheduler = folder / "scheduler/scheduler_config.json"
    return _PREDICTIONS.get(str(read_config(scheduler).get("prediction_type"))) if scheduler.is_file() else None


def _check_folder(folder: Path) -> None:
    """Refuse a folder that is not a whole Diffusers model of Stable Diffusion 1.x or 2.x."""
    where = f"{MODEL_FLAG} {folder}"
    index = read_config(folder / "model_index.json") if (folder / "model_index.json").is_file() else {}
    pipeline = str(index.get("_class_name", ""))
    others = [name for name in _OTHER_PARTS if (folder / name).is_dir()]
    if others or any(word in pipeline for word in _OTHER_PIPELINES):
        kind = pipeline or f"it has a folder {others[0]}"
        raise UserError(f"this is a model of another kind ({kind})", where=where, remedy=MODEL_REMEDY)
    missing = [f"{part}/config.json" for part in PARTS if not (folder / part / "config.json").is_file()]
    if missing:
        raise UserError(
            f"this folder is not a Diffusers model: {', '.join(missing)} not found ({_contents(folder)})",
            where=where,
            remedy=_folder_remedy(folder),
        )
    for part in PARTS:
        tensor_names(weight_file(folder / part, part))


def _channel_problems(facts: SourceFacts) -> list[Problem]:
    if facts.in_channels in (None, LATENT_CHANNELS):
        return []
    return [
        Problem(
            f"{facts.name} has {facts.in_channels} input channels, as inpainting models do, "
            f"and training gives it the {LATENT_CHANNELS} of a latent image",
            f"{MODEL_FLAG} {facts.path}",
            "Train on the ordinary model that it was made from.",
        )
    ]


def _stated_prediction(metadata: Mapping[str, str]) -> Prediction | None:
    stated = _PREDICTIONS.get(metadata.get("modelspec.prediction_type"))
    if stated is None and metadata.get("modelspec.architecture", "").endswith("-v"):
        return "v_prediction"
    return stated


def read_config(path: Path) -> dict[str, Any]:
    """The configuration in a JSON file of a model.

    Raises:
        UserError: It cannot be read, or is no configuration.
    """
    remedy = "Copy or download the model again."
    try:
        return read_table(path)
    except (OSError, DocumentError) as error:
        raise UserError(f"{path.name} cannot be read: {error}", where=str(path), remedy=remedy) from error


def _contents(folder: Path) -> str:
    names = sorted(entry.name + "/" * entry.is_dir() for entry in folder.iterdir()) if folder.is_dir() else []
    return f"it has {named(names, 5)}" if names else "it is empty"


def _folder_remedy(folder: Path) -> str:
    if (folder.parent / "model_index.json").is_file():
        return f"Give the folder above it: {folder.parent}"
    files = sorted(entry.name for entry in folder.iterdir() if entry.suffix.lower() in (".safetensors", ".ckpt"))
    if files:
        return f"Give the file itself: {folder / files[0]}"
    inside = sorted(entry.parent.name for entry in folder.glob("*/model_index.json"))
    if inside:
        return f"Give the folder inside it: {folder / inside[0]}"
    return MODEL_REMEDY


def _near(path: Path) -> str:
    folder = path.parent
    if not folder.is_dir():
        return f"The folder {folder} does not exist: check the path."
    names = [entry.name for entry in folder.iterdir()]
    near = get_close_matches(path.name, names, n=3, cutoff=0.6)
    near += [name for name in names if Path(name).stem == path.name and name not in near]
    return f"Did you mean {', '.join(near)}?" if near else f"Check the path: {folder} has nothing of that name."
