"""Everything a training run reads, checked before anything heavy is imported.

What is wrong with the model, the data set, the prompts, the optimizer and the output folder is reported together.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

from library.data.cache_conflicts import check_latents_alone
from library.data.config import read_spec
from library.data.findings import Finding, merged, warning, warnings_of
from library.data.fixed_captions import changing_captions
from library.data.lint import lint
from library.data.options import (
    CacheOptions,
    CaptionOptions,
    CheckOptions,
    ImageOptions,
    SourceOptions,
    ValidationOptions,
)
from library.data.records import ImageRecord, scan
from library.data.spec import DataSpec
from library.data.support import NETWORK, DataSupport
from library.data.validation import HeldOut, Split, hold_out
from library.diffusion.samplers import check_sampler
from library.errors import Problem, UserError, raise_if_any
from library.models.caption_tokens import CaptionTokens
from library.models.detect import check_model_source
from library.models.options import ModelOptions, PromptOptions
from library.training.hub import HubState, check_access, check_hub, fetch_state
from library.training.metadata import check_metadata
from library.training.naming import OutputNames, check_saving
from library.training.options import (
    HubOptions,
    LoggingOptions,
    MetadataOptions,
    OptimizerOptions,
    PreviewOptions,
    ResumeOptions,
    SaveOptions,
    SchedulerOptions,
)
from library.training.prompt_files import PreviewPrompt, load_prompts
from library.training.rates import check_rates, rate_notices
from library.training.states import check_state, newest_state, seed_of
from library.training.tracking import check_logging

log = logging.getLogger(__name__)

T = TypeVar("T")


class DataOptions(Protocol):
    """The groups of a script's options that say what is trained on."""

    @property
    def model(self) -> ModelOptions: ...  # noqa: D102
    @property
    def prompts(self) -> PromptOptions: ...  # noqa: D102
    @property
    def source(self) -> SourceOptions: ...  # noqa: D102
    @property
    def check(self) -> CheckOptions: ...  # noqa: D102
    @property
    def image(self) -> ImageOptions: ...  # noqa: D102
    @property
    def captions(self) -> CaptionOptions: ...  # noqa: D102
    @property
    def cache(self) -> CacheOptions: ...  # noqa: D102


class InputOptions(DataOptions, Protocol):
    """The groups of a script's options that name inputs."""

    @property
    def validation(self) -> ValidationOptions: ...  # noqa: D102
    @property
    def optimizer(self) -> OptimizerOptions: ...  # noqa: D102
    @property
    def scheduler(self) -> SchedulerOptions: ...  # noqa: D102
    @property
    def save(self) -> SaveOptions: ...  # noqa: D102
    @property
    def resume(self) -> ResumeOptions: ...  # noqa: D102
    @property
    def metadata(self) -> MetadataOptions: ...  # noqa: D102
    @property
    def logging(self) -> LoggingOptions: ...  # noqa: D102
    @property
    def preview(self) -> PreviewOptions: ...  # noqa: D102
    @property
    def hub(self) -> HubOptions: ...  # noqa: D102


@dataclass(frozen=True, kw_only=True, slots=True)
class Inputs:
    """What the checks have read on the way.

    Attributes:
        spec: The data sets.
        records: Their images.
        prompts: The preview prompts; empty when no previews are made.
        held_out: Images to validate on, which are not among the records; None without any.
        state: The state to continue from, in a local folder; None for a new run.
        seed: The seed of that state's run, which a run that goes on has, too; None where there is none.
    """

    spec: DataSpec
    records: tuple[ImageRecord, ...]
    prompts: tuple[PreviewPrompt, ...]
    held_out: HeldOut | None = None
    state: Path | None = None
    seed: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class DataCheck:
    """The data sets, and everything found out about them: errors too.

    Attributes:
        spec: The data sets.
        records: Their images.
        findings: What is wrong or remarkable, each once.
    """

    spec: DataSpec
    records: tuple[ImageRecord, ...]
    findings: tuple[Finding, ...]


def check_inputs(
    options: InputOptions, *, more: Sequence[Problem] = (), support: DataSupport = NETWORK, captions_once: bool = False
) -> Inputs:
    """Read and check everything but the weights; warnings go to the log.

    Args:
        options: The script's options.
        more: Problems that the script itself has found.
        captions_once: Captions are encoded before training, so they must not change.
        support: What data sets the script can use.

    Raises:
        UserError: With every problem found.
    """
    problems = list(more)
    source = check_model_source(options.model, options.prompts)
    problems += source.problems
    problems += check_rates(options)
    problems += check_saving(options.save)
    problems += check_metadata(options.metadata)
    problems += check_logging(options.logging)
    hub_problems, hub_notices = check_hub(options.hub, options.resume, options.save)
    problems += hub_problems
    if options.resume.resume is not None and not (options.resume.is_automatic or options.hub.resume_from_huggingface):
        problems += check_state(options.resume.resume)
    prompts = _collected(lambda: _prompts(options.preview), problems) or ()
    read = _collected(lambda: read_data(options, support=support), problems)
    if read is not None and captions_once:
        problems += changing_captions(read[0])
    split = None if read is None else _collected(lambda: split_data(read[0], read[1], options.validation), problems)
    raise_if_any(list(dict.fromkeys(problems)))
    assert read is not None, "without problems there is data"
    assert split is not None, "without problems there is a split"
    for notice in (*source.notices, *rate_notices(options), *hub_notices, *_data_notices(options.source, read[1])):
        log.warning(notice)
    state = None if options.check.dry_run else _state(options)
    return Inputs(
        spec=read[0],
        records=split.training,
        prompts=prompts,
        held_out=split.held_out,
        state=state,
        seed=None if state is None else seed_of(state),
    )


def _data_notices(source: SourceOptions, records: Sequence[ImageRecord]) -> list[str]:
    """What has no effect with these images."""
    if source.prior_loss_weight == 1 or any(record.is_reg for record in records):
        return []
    return ["without effect without regularisation images: --prior_loss_weight"]


def _state(options: InputOptions) -> Path | None:
    """The state to continue from; asks the hub, if it is used, whether the run may, and fetches the state from there.

    Raises:
        UserError: It may not, or there is no such state.
    """
    check_access(options.hub)
    on_hub = HubState.of(options.hub, options.resume)
    if on_hub is not None:
        return fetch_state(on_hub)
    if not options.resume.is_automatic:
        return options.resume.resume
    assert options.save.output_dir is not None, "checked before"
    names = OutputNames(folder=options.save.output_dir, name=options.save.output_name, suffix="")
    found = newest_state(names.folder, names.owns)
    if found is None:
        log.info("--resume auto: there is no state yet, the run begins")
    return found


def split_data(spec: DataSpec, records: Sequence[ImageRecord], options: ValidationOptions) -> Split:
    """The images to train on and those to validate on; warnings go to the log.

    Raises:
        UserError: One of the two is empty although both are wanted.
    """
    split = hold_out(spec, records, options)
    for finding in warnings_of(split.findings):
        log.warning("%s", finding)
    return split


def _prompts(options: PreviewOptions) -> tuple[PreviewPrompt, ...]:
    settled = options.settled()
    wanted = settled.sample_at_first or settled.sample_every_n_epochs or settled.sample_every_n_steps
    if not wanted or settled.sample_prompts is None:
        return ()
    prompts = load_prompts(settled.sample_prompts, default_sampler=settled.sample_sampler)
    for sampler in {prompt.sampler for prompt in prompts}:
        check_sampler(sampler, where="--sample_sampler, --sample_prompts")
    return prompts


def read_data(options: DataOptions, *, support: DataSupport = NETWORK) -> tuple[DataSpec, tuple[ImageRecord, ...]]:
    """The data sets and their images; warnings go to the log.

    Raises:
        UserError: With every error found.
    """
    found = check_data(options, support=support)
    for finding in warnings_of(found.findings):
        log.warning("%s", finding)
    return found.spec, found.records


def check_data(options: DataOptions, *, support: DataSupport = NETWORK) -> DataCheck:
    """Read the data sets and say what is wrong with them.

    A real run stays quick; where a check is asked for without training, every image is decoded and every caption cut
    into tokens as well.

    Raises:
        UserError: The dataset file cannot be read at all.
    """
    spec, findings = read_spec(options.source, options.image, options.captions, options.cache, support=support)
    records, found = scan(spec)
    findings = [*findings, *found, *check_latents_alone(spec, records, options.cache), *lint(spec, records)]
    findings += _below_usual_size(options.model, spec)
    if options.check.dry_run or options.check.validate_dataset:
        from library.data.lint_thorough import lint_thoroughly

        findings += lint_thoroughly(spec, records, caption_tokens(options.prompts))
    return DataCheck(spec=spec, records=records, findings=merged(findings))


def _below_usual_size(model: ModelOptions, spec: DataSpec) -> Iterator[Finding]:
    """Data sets trained at the usual size of other models."""
    if not (model.v2 and model.v_parameterization):
        return
    for width, height in dict.fromkeys(dataset.resolution for dataset in spec.datasets):
        if width * height <= 512 * 512:
            yield warning(
                f"the resolution is {width}x{height}, and Stable Diffusion 2 models with v-prediction were trained at "
                "768x768",
                "--v2, --v_parameterization, --resolution",
                "Use a resolution of 768, unless your model is one for smaller images.",
            )


def caption_tokens(options: PromptOptions, *, new_words: tuple[str, ...] = ()) -> CaptionTokens:
    """How captions fall into tokens, as the options say."""
    return CaptionTokens.of(
        max_token_length=options.max_token_length, weighted=options.weighted_captions, new_words=new_words
    )


def _collected(read: Callable[[], T], problems: list[Problem]) -> T | None:
    """What ``read`` returns; its problems are added to ``problems`` instead of ending the checks."""
    try:
        return read()
    except UserError as error:
        problems.extend(error.problems)
        return None
