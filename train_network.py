"""Train a LoRA, or another network that adapts Stable Diffusion.

Usage: ``accelerate launch train_network.py --dataset_config x.toml --network_module networks.lora ...``, or plain
``python train_network.py ...``; ``--help`` lists every option.
"""

from dataclasses import dataclass
from functools import partial
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
from library.errors import Problem, run_script
from library.inputs import check_inputs
from library.models.options import AttentionOptions, ModelOptions, PromptOptions
from library.option_relations import (
    cached_text_notices,
    fp8_network_problems,
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
    RecordOptions,
    ResumeOptions,
    SaveOptions,
    SchedulerOptions,
)
from networks.loading import check_network
from networks.options import NetworkOptions
from networks.size import trained_values

if TYPE_CHECKING:
    from library.inputs import Inputs


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """Options of ``train_network.py``, by topic."""

    model: ModelOptions
    network: NetworkOptions
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
    record: RecordOptions
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
            *fp8_network_problems(self.runtime, self.network.network_module),
        ]

    def notices(self) -> list[str]:
        """What is worth knowing about the groups together."""
        trains_text = not self.network.network_train_unet_only
        return [
            *model_notices(self.model, self.prompts, self.noise),
            *cached_text_notices(self.cache, trains_text=trains_text),
        ]


def main(argv: list[str]) -> int:
    """Check everything quickly, then train; returns the exit code."""
    options = read_options(Options, argv, prog="train_network.py", description=__doc__.splitlines()[0])
    # Looking at data needs NumPy; --help and mistakes in options do not wait for it.
    from library.inspection import dry_run, inspect_data

    inspected = inspect_data(options)
    if inspected is not None:
        return inspected
    inputs = check_inputs(options, more=check_network(options.network), captions_once=caches_text(options))
    if options.check.dry_run:
        values = trained_values(options.network, options.model)
        return dry_run(options, inputs, suffix=f".{options.network.save_model_as}", trained_values=values)
    return train(options, inputs)


def train(options: Options, inputs: "Inputs") -> int:
    """Train a network; everything heavy is imported from here on."""
    from library.breakdowns import memory_explained
    from library.cached_conditioning import text_conditioning
    from library.data.setup import prepare_data
    from library.models.attention import use_attention
    from library.models.fp8 import narrow_base
    from library.models.stable_diffusion import load_stable_diffusion
    from library.results import Result
    from library.run import train as run
    from library.task import DenoisingTask
    from library.training.rates import try_rates
    from networks.loading import build_network, network_arguments
    from networks.training import NetworkTraining

    runtime = start_runtime(options.runtime, find_unused_parameters=may_leave_unused(options), seed=inputs.seed)
    try_rates(options, runtime.device)
    data = prepare_data(inputs.spec, inputs.records)

    # The base model: frozen, in the precision of the run, or narrower.
    model = load_stable_diffusion(options.model, options.prompts, dtype=runtime.weight_dtype)
    use_attention(model.unet, model.deferred_vae, options.attention, dtype=runtime.weight_dtype)

    # The network: its own weights stay in fp32.
    smaller = "Give a smaller rank: --network_dim, or conv_dim in --network_args; 4 to 128 are usual."
    with memory_explained(where="--network_dim, --network_args", remedy=smaller):
        network = build_network(
            options.network,
            model=model,
            seed=runtime.seed,
            settle=partial(narrow_base, options=options.runtime, dtype=runtime.weight_dtype),
        )
    task = DenoisingTask.of(
        model,
        text_conditioning(model, options.prompts, data, runtime, cached=caches_text(options)),
        runtime,
        noise=options.noise,
        loss=options.loss,
        vae_batch_size=options.cache.vae_batch_size,
    )
    method = NetworkTraining(
        network,
        task,
        options.network,
        learning_rate=options.optimizer.learning_rate,
        gradient_checkpointing=options.runtime.gradient_checkpointing,
        save_precision=options.save.save_precision,
        offload_checkpoints=options.runtime.cpu_offload_checkpointing,
    )
    result = Result(
        script="train_network.py",
        kind="lora",
        suffix=f".{options.network.save_model_as}",
        tracker_name="network_train",
        record=options.record,
        network_args=network_arguments(options.network),
    )
    return run(method, task, result, options=options, inputs=inputs, data=data)


def caches_text(options: Options) -> bool:
    """Whether captions are encoded once, before training."""
    return options.cache.cache_text_encoder_outputs and options.network.network_train_unet_only


def may_leave_unused(options: Options) -> bool:
    """Whether a step may leave weights without a gradient, for which processes must then look every time.

    Layers of the text encoder behind ``--clip_skip`` have none, nor modules left out by module dropout; of networks of
    other authors nothing is known.
    """
    return (
        options.prompts.clip_skip is not None
        or not (options.network.network_module or "").startswith("networks.")
        or any(argument.startswith("module_dropout") for argument in options.network.network_args)
    )


if __name__ == "__main__":
    run_script(main)
