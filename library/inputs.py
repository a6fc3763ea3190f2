"""Everything a training run reads, checked before anything heavy is imported.

What is wrong with the model, the data set, the prompts, the optimizer and the output folder is reported together.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from library.data.config import read_spec
from library.data.findings import Finding, warnings_of
from library.data.lint import lint
from library.data.options import CacheOptions, CaptionOptions, CheckOptions, ImageOptions, SourceOptions
from library.data.records import ImageRecord, scan
from library.data.spec import DataSpec
from library.diffusion.samplers import check_sampler
from library.errors import Problem, UserError, raise_if_any
from library.models.caption_tokens import CaptionTokens
from library.models.detect import check_model_source
from library.models.options import ModelOptions, PromptOptions
from library.training.lr_schedulers import check_lr_scheduler
from library.training.metadata import check_metadata
from library.training.naming import check_saving
from library.training.optimizers import check_optimizer
from library.training.options import (
    LoggingOptions,
    MetadataOptions,
    OptimizerOptions,
    PreviewOptions,
    ResumeOptions,
    SaveOptions,
    SchedulerOptions,
)
from library.training.prompt_files import PreviewPrompt, load_prompts
from library.training.states import check_state
from library.training.tracking import check_logging

log = logging.getLogger(__name__)

T = TypeVar("T")


class InputOptions(Protocol):
    """The groups of a script's options that name inputs."""

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


@dataclass(frozen=True, kw_only=True, slots=True)
class Inputs:
    """What the checks have read on the way.

    Attributes:
        spec: The data sets.
        records: Their images.
        prompts: The preview prompts; empty when no previews are made.
    """

    spec: DataSpec
    records: tuple[ImageRecord, ...]
    prompts: tuple[PreviewPrompt, ...]


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


def check_inputs(options: InputOptions, *, more: Sequence[Problem] = ()) -> Inputs:
    """Read and check everything but the weights; warnings go to the log.

    Args:
        options: The script's options.
        more: Problems that the script itself has found.

    Raises:
        UserError: With every problem found.
    """
    problems = list(more)
    source = check_model_source(options.model, options.prompts)
    problems += source.problems
    problems += check_optimizer(options.optimizer)
    problems += check_lr_scheduler(options.scheduler)
    problems += check_saving(options.save)
    problems += check_metadata(options.metadata)
    problems += check_logging(options.logging)
    if options.resume.resume is not None:
        problems += check_state(options.resume.resume)
    prompts = _collected(lambda: _prompts(options.preview), problems) or ()
    read = _collected(lambda: read_data(options), problems)
    raise_if_any(list(dict.fromkeys(problems)))
    assert read is not None, "without problems there is data"
    for notice in source.notices:
        log.warning(notice)
    return Inputs(spec=read[0], records=read[1], prompts=prompts)


def _prompts(options: PreviewOptions) -> tuple[PreviewPrompt, ...]:
    settled = options.settled()
    wanted = settled.sample_at_first or settled.sample_every_n_epochs or settled.sample_every_n_steps
    if not wanted or settled.sample_prompts is None:
        return ()
    prompts = load_prompts(settled.sample_prompts, default_sampler=settled.sample_sampler)
    for sampler in {prompt.sampler for prompt in prompts}:
        check_sampler(sampler, where="--sample_sampler, --sample_prompts")
    return prompts


def read_data(options: InputOptions) -> tuple[DataSpec, tuple[ImageRecord, ...]]:
    """The data sets and their images; warnings go to the log.

    Raises:
        UserError: With every error found.
    """
    found = check_data(options)
    for finding in warnings_of(found.findings):
        log.warning("%s", finding)
    return found.spec, found.records


def check_data(options: InputOptions) -> DataCheck:
    """Read the data sets and say what is wrong with them.

    A real run stays quick; where a check is asked for without training, every image is decoded and every caption cut
    into tokens as well.

    Raises:
        UserError: The dataset file cannot be read at all.
    """
    spec, findings = read_spec(options.source, options.image, options.captions, options.cache)
    records, found = scan(spec)
    findings = [*findings, *found, *lint(spec, records)]
    if options.check.dry_run or options.check.validate_dataset:
        from library.data.lint_thorough import lint_thoroughly

        findings += lint_thoroughly(spec, records, caption_tokens(options.prompts))
    return DataCheck(spec=spec, records=records, findings=tuple(dict.fromkeys(findings)))


def caption_tokens(options: PromptOptions) -> CaptionTokens:
    """How captions fall into tokens, as the options say."""
    return CaptionTokens.of(max_token_length=options.max_token_length, weighted=options.weighted_captions)


def _collected(read: Callable[[], T], problems: list[Problem]) -> T | None:
    """What ``read`` returns; its problems are added to ``problems`` instead of ending the checks."""
    try:
        return read()
    except UserError as error:
        problems.extend(error.problems)
        return None
