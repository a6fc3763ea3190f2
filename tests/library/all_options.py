"""An options class with every group that training a network uses, for tests."""

from dataclasses import dataclass

from library.data.options import (
    CacheOptions,
    CaptionOptions,
    CheckOptions,
    ImageOptions,
    LoaderOptions,
    SourceOptions,
    ValidationOptions,
)
from library.diffusion.options import LossOptions, NoiseOptions
from library.errors import Problem
from library.models.options import AttentionOptions, ModelOptions, PromptOptions
from library.option_relations import model_notices, prediction_problems
from library.runtime_options import ConsoleOptions, DeepSpeedOptions, RuntimeOptions
from library.training.options import (
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
from networks.options import NetworkOptions


@dataclass(frozen=True, kw_only=True, slots=True)
class AllOptions:
    """Every group."""

    model: ModelOptions
    network: NetworkOptions
    source: SourceOptions
    check: CheckOptions
    images: ImageOptions
    captions: CaptionOptions
    cache: CacheOptions
    loader: LoaderOptions
    prompts: PromptOptions
    length: LengthOptions
    optimizer: OptimizerOptions
    scheduler: SchedulerOptions
    noise: NoiseOptions
    loss: LossOptions
    runtime: RuntimeOptions
    attention: AttentionOptions
    save: SaveOptions
    resume: ResumeOptions
    preview: PreviewOptions
    logging: LoggingOptions
    metadata: MetadataOptions
    validation: ValidationOptions
    hub: HubOptions
    console: ConsoleOptions
    deepspeed: DeepSpeedOptions

    def problems(self) -> list[Problem]:
        return prediction_problems(self.model, self.loss)

    def notices(self) -> list[str]:
        return model_notices(self.model, self.prompts, self.noise)
