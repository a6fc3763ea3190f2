"""Train DreamBooth: the model itself learns a few images of something, beside a word for it.

Usage: ``accelerate launch train_db.py --dataset_config x.toml --pretrained_model_name_or_path model ...``, or plain
``python train_db.py ...``; ``--help`` lists every option.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

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
from library.errors import Problem, raise_if_any, run_script
from library.full_model_options import DreamBoothOptions, ModelFileOptions, TrainedParts
from library.models.options import AttentionOptions, ModelOptions, PromptOptions
from library.option_relations import (
    cached_text_notices,
    fp8_problems,
    fused_problems,
    model_notices,
    prediction_problems,
    snr_problems,
    static_graph_problems,
)
from library.runtime import start_runtime
from library.runtime_options import ConsoleOptions, DeepSpeedOptions, RuntimeOptions
from library.script_options import read_options
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

if TYPE_CHECKING:
    from library.inputs import Inputs


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """Options of ``train_db.py``, by topic."""

    model: ModelOptions
    dreambooth: DreamBoothOptions
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
    file: ModelFileOptions
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
            *self.parts.problems(),
            *fused_problems(self.optimizer, self.length, self.runtime),
            *static_graph_problems(self.length, self.runtime),
            *snr_problems(self.noise, self.loss),
            *fp8_problems(self.runtime),
            *self.dreambooth.problems_with(self.runtime, self.prompts, self.cache),
        ]

    def notices(self) -> list[str]:
        """What is worth knowing about the groups together."""
        return [
            *model_notices(self.model, self.prompts, self.noise),
            *cached_text_notices(self.cache, trains_text=self.parts.text_encoder),
            *self.dreambooth.notices_with(self.length),
        ]

    @property
    def parts(self) -> TrainedParts:
        """What of the model is trained."""
        return self.dreambooth.parts(self.optimizer.learning_rate)

    @property
    def caches_text(self) -> bool:
        """Whether captions are encoded once, before training."""
        return self.cache.cache_text_encoder_outputs and not self.parts.text_encoder


def main(argv: list[str]) -> int:
    """Check everything quickly, then train; returns the exit code."""
    options = read_options(Options, argv, prog="train_db.py", description=__doc__.splitlines()[0])
    # Looking at data needs NumPy; --help and mistakes in options do not wait for it.
    from library.caption_lengths import length_problems
    from library.data.support import DREAMBOOTH
    from library.full_model_checks import full_model_dry_run, full_model_inputs
    from library.inspection import inspect_data

    inspected = inspect_data(options, support=DREAMBOOTH)
    if inspected is not None:
        return inspected
    inputs = full_model_inputs(options, support=DREAMBOOTH)
    if options.dreambooth.no_token_padding:
        raise_if_any(length_problems(inputs, options.prompts))
    if options.check.dry_run:
        return full_model_dry_run(options, inputs)
    return train(options, inputs)


def train(options: Options, inputs: "Inputs") -> int:
    """Train the model; everything heavy is imported from here on."""
    from library.cached_conditioning import text_conditioning
    from library.conditioning import TextConditioning, UnpaddedConditioning
    from library.data.setup import prepare_data
    from library.full_model import load_trained_model, train_full_model
    from library.models.attention import use_attention
    from library.task import DenoisingTask
    from library.training.rates import try_rates

    parts = options.parts
    runtime = start_runtime(
        options.runtime,
        find_unused_parameters=parts.leaves_unused(clip_skip=options.prompts.clip_skip),
        seed=inputs.seed,
    )
    try_rates(options, runtime.device)
    data = prepare_data(inputs.spec, inputs.records)

    # The model: trained parts stay in fp32, the others have the precision of the run.
    model = load_trained_model(options.model, options.prompts, parts, runtime)
    use_attention(model.unet, model.deferred_vae, options.attention, dtype=runtime.weight_dtype)

    # What is learnt.
    text: TextConditioning
    if options.dreambooth.no_token_padding:
        text = UnpaddedConditioning.of(model, options.prompts)
    else:
        text = text_conditioning(model, options.prompts, data, runtime, cached=options.caches_text)
    task = DenoisingTask.of(
        model,
        text,
        runtime,
        noise=options.noise,
        loss=options.loss,
        vae_batch_size=options.cache.vae_batch_size,
    )
    return train_full_model(task, options, script="train_db.py", tracker_name="dreambooth", inputs=inputs, data=data)


if __name__ == "__main__":
    run_script(main)
