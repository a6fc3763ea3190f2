"""Convert a whole model between a single checkpoint file and a Diffusers folder, both ways.

Usage, from anywhere: ``python tools/convert_diffusers20_original_sd.py MODEL_TO_LOAD MODEL_TO_SAVE``. A name to save
that ends in ``.safetensors`` or ``.ckpt`` asks for a checkpoint, any other for a folder.
"""

import ast
import json
import logging
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from library.documents import parse_json  # noqa: E402
from library.errors import Problem, UserError, raise_if_any, run_script  # noqa: E402
from library.files import read_header  # noqa: E402
from library.models.detect import (  # noqa: E402
    SourceFacts,
    describe_source,
    family_problems,
    read_config,
    scheduler_prediction,
    weight_file,
)
from library.models.formats import ModelFormat, format_of_name, overwriting_problems, suffix_of  # noqa: E402
from library.models.hub import fetch_configuration  # noqa: E402
from library.models.options import ModelOptions, PromptOptions  # noqa: E402
from library.option_positions import missing_positions, name_positions, split_positions  # noqa: E402
from library.options import option, parse_options  # noqa: E402
from library.runtime import set_up_logging  # noqa: E402
from library.runtime_options import ConsoleOptions  # noqa: E402

log = logging.getLogger("convert_diffusers20_original_sd")

DESCRIPTION = (
    "Convert a Stable Diffusion 1.x or 2.x model: from a checkpoint file, a Diffusers folder or the hub, to a "
    "checkpoint file (.safetensors, .ckpt) or a Diffusers folder."
)
ORDER: Final = ("model_to_load", "model_to_save")
_STORED: Final = {"F16": "fp16", "BF16": "bf16"}
_PRECISIONS: Final = ("fp16", "bf16", "float")


def _metadata(raw: object) -> str:
    """Metadata as JSON text, from JSON or from a Python table of texts (nothing in it is run)."""
    if raw == "":
        return ""
    try:
        content = parse_json(str(raw))
    except ValueError:
        try:
            content = ast.literal_eval(str(raw))
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            content = None
    if not isinstance(content, dict):
        raise ValueError('expects a table such as {"title": "cats"}')
    return json.dumps({str(key): value if isinstance(value, str) else str(value) for key, value in content.items()})


@dataclass(frozen=True, kw_only=True, slots=True)
class PlaceOptions:
    """Models."""

    model_to_load: str | None = option(
        None, metavar="PATH", help="Checkpoint file, Diffusers folder, or hub id such as 'owner/model'."
    )
    model_to_save: Path | None = option(
        None, metavar="FILE", help="Name ending in .safetensors or .ckpt for a checkpoint; any other for a folder."
    )
    v1: bool = option(False, help="The model is Stable Diffusion 1.x; needed only where the file does not tell.")
    v2: bool = option(False, help="The model is Stable Diffusion 2.x; needed only where the file does not tell.")
    v_parameterization: bool = option(
        False, help="The model predicts velocity (SD 2.x at 768 pixels), which a folder's scheduler is told."
    )
    variant: str | None = option(
        None,
        choices=("fp16",),
        metavar="fp16",
        help="Save in fp16 unless another precision is asked for. Weights called fp16 are read where a folder has no "
        "full ones; the full ones, rounded, are the same.",
    )
    reference_model: str | None = option(
        None,
        metavar="DIR",
        help="Diffusers folder whose scheduler, tokenizer and size of images go into the folder that is saved.",
    )
    unet_use_linear_projection: bool = option(
        False, help="Accepted for old command lines: the U-Net of SD 2.x always has linear projections in a folder."
    )

    def problems(self) -> list[Problem]:
        """What is missing or contradictory."""
        found = missing_positions({name: getattr(self, name) for name in ORDER})
        if self.v1 and self.v2:
            found.append(Problem("--v1 and --v2 are both given", "--v1", "A model is one of the two."))
        suffix = "" if self.model_to_save is None else self.model_to_save.suffix.lower()
        if suffix in (".pt", ".pth", ".bin", ".safetensor"):
            what = f"a checkpoint ends in .safetensors or .ckpt, not {suffix}"
            found.append(Problem(what, "model_to_save", "Change the name."))
        return found


@dataclass(frozen=True, kw_only=True, slots=True)
class SaveOptions:
    """What is saved."""

    fp16: bool = option(False, help="Save in fp16.")
    bf16: bool = option(False, help="Save in bf16.")
    float: bool = option(False, help="Save in fp32.")
    save_precision_as: str | None = option(
        None,
        choices=_PRECISIONS,
        synonyms={"no": None},
        help="The same, in another spelling; as the weights are when absent.",
    )
    epoch: int = option(0, minimum=0, help="Finished epochs, for a .ckpt; added to those of a .ckpt that is read.")
    global_step: int = option(0, minimum=0, help="Finished steps, for a .ckpt; added to those of a .ckpt that is read.")
    metadata: str | None = option(
        None, metavar="JSON", parse=_metadata, help='Texts for the metadata, such as {"title": "cats"}.'
    )
    use_safetensors: bool = option(False, help="Save the weights of a folder as .safetensors instead of .bin.")

    def problems(self) -> list[Problem]:
        """Precisions that contradict each other."""
        asked = self._asked()
        if len(asked) < 2:
            return []
        what = f"several precisions are asked for: {', '.join(asked)}"
        return [Problem(what, f"--{asked[0]}", "Choose one.")]

    def _asked(self) -> list[str]:
        named = [name for name in _PRECISIONS if getattr(self, name)]
        return list(dict.fromkeys([*named, *([self.save_precision_as] if self.save_precision_as else [])]))

    @property
    def precision(self) -> str | None:
        """The precision to save in; None keeps that of the weights."""
        return next(iter(self._asked()), None)


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """The tool's options."""

    place: PlaceOptions
    save: SaveOptions

    @property
    def format(self) -> ModelFormat:
        """What is written."""
        assert self.place.model_to_save is not None, "asked for with the options"
        return format_of_name(self.place.model_to_save, safetensors=self.save.use_safetensors)

    @property
    def precision(self) -> str | None:
        """The precision to save in; None keeps that of the weights."""
        return self.save.precision or self.place.variant

    def notices(self) -> list[str]:
        """What has no effect."""
        if self.place.model_to_save is None:
            return []
        found = []
        has_file = bool(suffix_of(self.format))
        if self.place.reference_model and has_file:
            found.append("--reference_model has no effect: a checkpoint file has no scheduler and no tokenizer")
        if self.save.use_safetensors and has_file:
            found.append("--use_safetensors has no effect: the name of the file says what it is")
        if self.save.metadata and self.format == "ckpt":
            found.append("--metadata has no effect: a .ckpt has no place for it")
        if (self.save.epoch or self.save.global_step) and self.format != "ckpt":
            found.append("--epoch and --global_step have no effect: only a .ckpt has them")
        return found


def main(argv: list[str]) -> int:
    """Convert a model; returns the exit code."""
    set_up_logging(ConsoleOptions())
    words, rest = split_positions(Options, argv)
    given = [*name_positions(words, ORDER), *rest]
    options = parse_options(Options, given, prog=f"{Path(__file__).name} {' '.join(ORDER)}", description=DESCRIPTION)
    place, target = options.place, options.place.model_to_save
    assert place.model_to_load is not None, "asked for with the options"
    assert target is not None, "asked for with the options"
    facts = _described(place.model_to_load, "model_to_load")
    reference = None if place.reference_model is None else _reference(place.reference_model)
    model = _model_options(place, facts, reference)
    replaced = overwriting_problems(target, source=facts.path, where=f"model_to_save {target}")
    raise_if_any([*_family_problems(place, facts, model), *replaced, *_not_a_folder(reference)])
    _convert(options, model, facts, reference)
    return 0


def _convert(options: Options, model: ModelOptions, facts: SourceFacts, reference: SourceFacts | None) -> None:
    """Load and save."""
    import torch

    from library.models.model_saving import save_model
    from library.models.origin import origin_of
    from library.models.stable_diffusion import load_stable_diffusion

    dtypes = {"fp16": torch.float16, "bf16": torch.bfloat16, "float": torch.float32}
    target = options.place.model_to_save
    assert target is not None, "asked for with the options"
    dtype = dtypes[options.precision or _stored_precision(facts)]
    loaded = load_stable_diffusion(model, PromptOptions(), dtype=dtype)
    if reference is not None and reference.path is not None:
        size = read_config(reference.path / "unet/config.json").get("sample_size")
        loaded.unet.register_to_config(sample_size=size)
        loaded = replace(loaded, origin=origin_of(reference.path))
    if target.exists():
        log.warning("%s exists and is replaced", target)
    save_model(
        target,
        loaded,
        format=options.format,
        dtype=dtype,
        metadata=json.loads(options.save.metadata or "{}"),
        step=options.save.global_step,
        epoch=options.save.epoch,
    )
    log.info("wrote %s: %s, %s", target, options.format, loaded.variant.base_model_version)


def _described(source: str, name: str) -> SourceFacts:
    """What the model at ``source`` is; mistakes are told of the option ``name``."""
    try:
        return describe_source(source)
    except UserError as error:
        raise UserError.of(replace(problem, where=f"{name} {source}") for problem in error.problems) from error


def _reference(source: str) -> SourceFacts | None:
    """The model that gives scheduler and tokenizer; None where the hub does not give it."""
    facts = _described(source, "--reference_model")
    if facts.kind != "hub":
        return facts
    try:
        folder = fetch_configuration(source, flag="--reference_model")
    except UserError as error:
        told = "--reference_model: %s; the scheduler and tokenizer that come with this program are used"
        log.warning(told, error.problems[0].what)
        return None
    return SourceFacts(kind="folder", name=source, path=folder, prediction=scheduler_prediction(folder))


def _model_options(place: PlaceOptions, facts: SourceFacts, reference: SourceFacts | None) -> ModelOptions:
    """How the model is to be loaded, from what was given and what the model says of itself."""
    v2 = place.v2 or (facts.family == "sd2" and not place.v1)
    stated = facts.prediction or (reference.prediction if reference else None)
    if v2 and not place.v_parameterization and stated is None:
        log.warning("the model does not say whether it predicts velocity, as those for 768 pixels do: noise is assumed")
    return ModelOptions(
        pretrained_model_name_or_path=place.model_to_load,
        v2=v2,
        v_parameterization=place.v_parameterization or stated == "v_prediction",
    )


def _family_problems(place: PlaceOptions, facts: SourceFacts, model: ModelOptions) -> list[Problem]:
    """Whether it is known, without contradiction, if the model is an SD1 or an SD2."""
    if facts.family is None and facts.kind == "file" and not (place.v1 or place.v2):
        what = "the file does not tell whether it is a Stable Diffusion 1.x or 2.x model"
        return [Problem(what, f"model_to_load {place.model_to_load}", "Add --v1 or --v2.")]
    remedy = "Leave out --v1." if place.v1 else "Leave out --v2."
    return [replace(problem, where="model_to_load", remedy=remedy) for problem in family_problems(facts, model)]


def _not_a_folder(reference: SourceFacts | None) -> list[Problem]:
    if reference is None or reference.kind == "folder":
        return []
    what = "--reference_model is no Diffusers folder"
    return [Problem(what, f"--reference_model {reference.name}", "Give the folder of a model, or its hub id.")]


def _stored_precision(facts: SourceFacts) -> str:
    """The precision of the U-Net's weights, where a header tells; fp32 otherwise."""
    if facts.path is None:
        return "float"
    path = weight_file(facts.path / "unet", "unet") if facts.kind == "folder" else facts.path
    header = read_header(path)
    found = {entry["dtype"] for name, entry in header.items() if name != "__metadata__" and "dtype" in entry}
    return next((name for dtype, name in _STORED.items() if dtype in found and "F32" not in found), "float")


if __name__ == "__main__":
    run_script(main)
