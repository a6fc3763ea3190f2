"""Options of ``train_textual_inversion.py`` and ``train_textual_inversion_XTI.py``; imports nothing heavy."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Final

from library.data.options import (
    CacheOptions,
    CaptionOptions,
    CheckOptions,
    ImageOptions,
    LoaderOptions,
    SourceOptions,
    ValidationOptions,
)
from library.data.schema import CAPTION_DROPOUT_KEYS
from library.diffusion.options import LossOptions, NoiseOptions
from library.errors import Problem
from library.models.embedding_options import EmbeddingOptions
from library.models.options import AttentionOptions, ModelOptions, PromptOptions
from library.new_words import file_name
from library.option_relations import (
    cached_text_notices,
    fused_problems,
    model_notices,
    prediction_problems,
    snr_problems,
    static_graph_problems,
)
from library.runtime_options import ConsoleOptions, DeepSpeedOptions, RuntimeOptions
from library.training.options import (
    EmaOptions,
    HubOptions,
    LengthOptions,
    LoggingOptions,
    MetadataOptions,
    OptimizerOptions,
    PreviewOptions,
    ResumeOptions,
    SaveOptions,
    SchedulerOptions,
)

_NO_DROPOUT: Final = "a new word is learnt from its captions"


@dataclass(frozen=True, kw_only=True, slots=True)
class TextualInversionOptions:
    """Options of both scripts, by topic."""

    ignored_in_files: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(sorted(CAPTION_DROPOUT_KEYS), _NO_DROPOUT),
        "weigts": "an embedding to go on from is given as weights",
    }

    model: ModelOptions
    embedding: EmbeddingOptions
    source: SourceOptions
    check: CheckOptions
    image: ImageOptions
    captions: CaptionOptions
    prompts: PromptOptions
    cache: CacheOptions
    loader: LoaderOptions
    length: LengthOptions
    optimizer: OptimizerOptions
    scheduler: SchedulerOptions
    noise: NoiseOptions
    loss: LossOptions
    runtime: RuntimeOptions
    attention: AttentionOptions
    ema: EmaOptions
    save: SaveOptions
    resume: ResumeOptions
    metadata: MetadataOptions
    preview: PreviewOptions
    logging: LoggingOptions
    console: ConsoleOptions
    validation: ValidationOptions
    hub: HubOptions
    deepspeed: DeepSpeedOptions

    def problems(self) -> list[Problem]:
        """What the groups make wrong together."""
        return [
            *prediction_problems(self.model, self.loss),
            *fused_problems(self.optimizer, self.length, self.runtime),
            *static_graph_problems(self.length, self.runtime),
            *snr_problems(self.noise, self.loss),
            *self._rate_problems(),
        ]

    def _rate_problems(self) -> list[Problem]:
        if self.optimizer.learning_rate > 0:
            return []
        return [Problem("the learning rate is 0: nothing is trained", "--learning_rate", "Begin with 1e-3.")]

    def notices(self) -> list[str]:
        """What is worth knowing about the groups together."""
        narrow = "--full_fp16" if self.runtime.full_fp16 else "--full_bf16" if self.runtime.full_bf16 else None
        return [
            *model_notices(self.model, self.prompts, self.noise),
            *cached_text_notices(self.cache, trains_text=True),
            *([f"{narrow} has no effect: the few values of a new word stay in 32 bits"] if narrow else []),
        ]


def named(options: TextualInversionOptions) -> TextualInversionOptions:
    """The same; without ``--output_name`` results are named after the new word."""
    if options.save.output_name or not options.embedding.token_string:
        return options
    return replace(options, save=replace(options.save, output_name=file_name(options.embedding.token_string)))
