"""Merge network files into a whole model, of which nothing else changes."""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

from library.errors import Problem, problems_of, raise_if_any
from library.files import TORCH_SUFFIXES, read_metadata, read_tensors
from library.models.detect import SourceFacts, weight_file
from library.models.formats import format_of_name, overwriting_problems, suffix_of
from library.models.options import ModelOptions
from library.training.clock import now
from library.training.metadata import ModelFacts, modelspec
from library.training.options import MetadataOptions
from networks.adapter_files import ALPHA, kind_of
from networks.loading import merge_weights
from networks.lora_contents import Contents, check_lora, describe, family_problem, of_each
from networks.lora_files import check_finite
from networks.tool_models import described_model, loaded_model
from networks.tool_options import MergedOptions, required

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)

FLAG: Final = "--sd_model"


def model_target_problems(source: str, target: Path | None) -> list[Problem]:
    """What stands against writing a model made from ``source`` to ``target``, as far as its name tells."""
    if target is None:
        return required(target, "--save_to", "merged.safetensors")
    if target.suffix.lower() in set(TORCH_SUFFIXES) - {".ckpt"}:
        what = f"a model ends in .safetensors or .ckpt, not {target.suffix}"
        return [Problem(what, "--save_to", "Change the name.")]
    if Path(source).is_file() and not suffix_of(format_of_name(target, safetensors=True)):
        what = f"{target.name} does not say which kind of file it is"
        return [Problem(what, "--save_to", "Let the name end in .safetensors or .ckpt, as the model is one file.")]
    return []


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeJob:
    """What is merged into which model.

    Attributes:
        facts: The model.
        model: How it is loaded.
        merged: The networks.
        sources: What their headers tell.
    """

    facts: SourceFacts
    model: ModelOptions
    merged: MergedOptions
    sources: list[Contents]


def check_merge(source: str, target: Path, merged: MergedOptions, *, v2: bool) -> MergeJob:
    """Look at everything that takes part, before anything heavy is imported.

    Args:
        source: The model.
        target: What is to be written.
        merged: The networks.
        v2: Whether the model is said to be an SD2.

    Raises:
        UserError: Something is not there, of another kind, or does not belong together; all problems together.
    """
    found: list[tuple[SourceFacts, ModelOptions]] = []
    sources: list[Contents] = []
    problems = problems_of(
        [
            lambda: found.append(described_model(source, FLAG, v2=v2)),
            lambda: sources.extend(of_each(partial(describe, flag="--models"), merged.paths)),
        ]
    )
    problems += problems_of(partial(check_mergeable, contents) for contents in sources)
    path = found[0][0].path if found else None
    raise_if_any([*problems, *overwriting_problems(target, source=path, where=f"--save_to {target}")])
    ((facts, model),) = found
    raise_if_any([one for contents in sources for one in family_problem(contents, "sd2" if v2 else "sd1", FLAG)])
    return MergeJob(facts=facts, model=model, merged=merged, sources=sources)


def check_mergeable(contents: Contents) -> None:
    """Refuse a network that cannot become part of a model's weights here.

    Raises:
        UserError: Saying what it is.
    """
    if kind_of(contents.shapes) != "OFT":
        check_lora(contents)


def merge_into_model(job: MergeJob, target: Path, *, save_precision: str | None, has_card: bool) -> None:
    """Load the model, merge, and write it to ``target``.

    Args:
        job: What is merged into which model.
        target: The file or folder to write.
        save_precision: Number format of the result; each weight keeps its own when absent.
        has_card: Whether the result gets a model card.

    Raises:
        UserError: Something cannot be read, merged or written.
    """
    from library.models.exact_parts import in_source_precision
    from library.models.model_saving import save_model
    from library.models.precision import save_dtype
    from networks.base import named_text_encoder

    model = loaded_model(job.model, FLAG)
    merge_weights(_networks(job), named_text_encoder(model.text_encoder), model.unet)
    if target.exists():
        log.warning("%s exists and is replaced", target)
    version = _version(job)
    save_model(
        target,
        in_source_precision(model),
        format=format_of_name(target, safetensors=_has_safetensors(job.facts)),
        dtype=save_dtype(save_precision),
        metadata=_metadata(job, target, version) if has_card else _stated(job.facts),
        step=0,
        epoch=0,
    )
    log.info("wrote %s", target)


def _networks(job: MergeJob) -> "Iterator[tuple[Path, Mapping[str, Tensor], float]]":
    """The networks with their tensors, rounded to ``--precision``, and strengths, read one at a time."""
    from library.models.precision import DTYPES

    dtype = DTYPES[job.merged.precision]
    for path, factor in zip(job.merged.paths, job.merged.factors, strict=True):
        file = read_tensors(path)
        shapes = {name: tuple(tensor.shape) for name, tensor in file.tensors.items()}
        check_mergeable(Contents(path, shapes, file.metadata))
        check_finite(file.tensors, path)
        tensors = {name: t if name.endswith(ALPHA) else t.to(dtype) for name, t in file.tensors.items()}
        yield path, tensors, factor


def _version(job: MergeJob) -> str:
    """What the model is: what it says of itself, or for a bare checkpoint what the networks say."""
    known = [contents.base_version for contents in job.sources if contents.base_version]
    family = "sd_v2" if job.model.v2 else "sd_v1"
    if job.facts.prediction is None and known:
        return known[0]
    return family + "_v" * (job.facts.prediction == "v_prediction")


def _metadata(job: MergeJob, target: Path, version: str) -> dict[str, str]:
    in_folder = not suffix_of(format_of_name(target, safetensors=True))
    facts = ModelFacts(
        kind="diffusers" if in_folder else "checkpoint", base_model_version=version, output_name=target.stem
    )
    stated = _stated(job.facts)
    names = [stated.get("modelspec.title") or Path(job.facts.name).stem, *(source.title for source in job.sources)]
    return stated | modelspec(MetadataOptions(metadata_merged_from=", ".join(names)), facts, timestamp=now())


def _stated(facts: SourceFacts) -> dict[str, str]:
    """What a model in one file says of itself."""
    return read_metadata(facts.path) if facts.kind == "file" and facts.path is not None else {}


def _has_safetensors(facts: SourceFacts) -> bool:
    """Whether a folder keeps its weights in safetensors files."""
    if facts.kind != "folder" or facts.path is None:
        return True
    return weight_file(facts.path / "unet", "unet").suffix == ".safetensors"
