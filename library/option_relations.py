"""What options of different groups demand of each other; a script's own ``problems()`` and ``main`` put them together.

Imports nothing heavy.
"""

from library.data.options import CacheOptions
from library.diffusion.options import LossOptions, NoiseOptions
from library.errors import Problem
from library.models.options import ModelOptions, PromptOptions
from library.runtime_options import RuntimeOptions
from library.training.options import LengthOptions, OptimizerOptions


def missing(value: object, flag: str, remedy: str) -> list[Problem]:
    """A problem when an option that a script cannot do without is absent."""
    return [] if value is not None else [Problem(f"{flag} is missing", flag, remedy)]


def prediction_problems(model: ModelOptions, loss: LossOptions) -> list[Problem]:
    """Loss weights that do not fit what the model predicts."""
    found = []
    if loss.scale_v_pred_loss_like_noise_pred and not model.v_parameterization:
        found.append(
            Problem(
                "--scale_v_pred_loss_like_noise_pred is for models that predict velocity",
                "--scale_v_pred_loss_like_noise_pred",
                "Add --v_parameterization if the model does, or leave it out.",
            )
        )
    if loss.v_pred_like_loss and model.v_parameterization:
        found.append(
            Problem(
                "--v_pred_like_loss is for models that predict noise, but --v_parameterization is given",
                "--v_pred_like_loss",
                "Leave one of the two out.",
            )
        )
    return found


def model_notices(model: ModelOptions, prompts: PromptOptions, noise: NoiseOptions) -> list[str]:
    """Combinations that work but are rarely meant."""
    found = []
    if model.v2 and prompts.clip_skip is not None:
        found.append(
            f"--clip_skip {prompts.clip_skip} with --v2 is unusual: the text encoder of SD 2.x comes without its last "
            "layer already"
        )
    if noise.zero_terminal_snr and not model.v_parameterization:
        found.append("--zero_terminal_snr without --v_parameterization: at the last timestep there is nothing to learn")
    return found


def fused_problems(optimizer: OptimizerOptions, length: LengthOptions, runtime: RuntimeOptions) -> list[Problem]:
    """What does not go together with updating weights within the backward pass."""
    if not optimizer.fused_backward_pass:
        return []
    found = []
    if length.gradient_accumulation_steps > 1:
        found.append(
            Problem(
                "--fused_backward_pass uses each gradient at once, so none can be added up over "
                f"{length.gradient_accumulation_steps} batches",
                "--fused_backward_pass, --gradient_accumulation_steps",
                "Leave one of the two out.",
            )
        )
    if runtime.mixed_precision == "fp16":
        found.append(
            Problem(
                "--fused_backward_pass cannot look for overflow in fp16 before it changes weights",
                "--fused_backward_pass, --mixed_precision fp16",
                "Use --mixed_precision bf16, or leave --fused_backward_pass out.",
            )
        )
    return found


def static_graph_problems(length: LengthOptions, runtime: RuntimeOptions) -> list[Problem]:
    """DDP learns the graph in the first backward pass, which accumulation makes without exchanging gradients."""
    if not runtime.ddp_static_graph or length.gradient_accumulation_steps == 1:
        return []
    return [
        Problem(
            "--ddp_static_graph needs gradients exchanged after every batch, and here they are added up over "
            f"{length.gradient_accumulation_steps} batches first",
            "--ddp_static_graph, --gradient_accumulation_steps",
            "Leave --ddp_static_graph out.",
        )
    ]


def fp8_problems(runtime: RuntimeOptions) -> list[Problem]:
    """Weights in 8 bits cannot be trained, for scripts that train the model itself."""
    if not runtime.narrows_base:
        return []
    flag = "--fp8_base" if runtime.fp8_base else "--fp8_base_unet"
    return [
        Problem(
            f"{flag} keeps a frozen model in 8 bits, and this script trains the model itself",
            flag,
            "Leave it out; --full_bf16 halves the memory of trained weights. Networks (train_network.py) and new words "
            "(train_textual_inversion.py) leave the model frozen.",
        )
    ]


def fp8_network_problems(runtime: RuntimeOptions, module: str | None) -> list[Problem]:
    """Networks of other authors compute with the frozen weights themselves, which they then cannot read."""
    if not runtime.narrows_base or module is None or module.startswith("networks."):
        return []
    flag = "--fp8_base" if runtime.fp8_base else "--fp8_base_unet"
    return [
        Problem(
            f"{flag} does not work with --network_module {module}, which computes with the frozen weights itself",
            flag,
            "Leave it out, or use a module of networks (networks.lora, for example).",
        )
    ]


def snr_problems(noise: NoiseOptions, loss: LossOptions) -> list[Problem]:
    """The same weight twice: once in how often a timestep comes, once in its loss."""
    if noise.timestep_distribution != "snr" or not loss.min_snr_gamma:
        return []
    return [
        Problem(
            "--timestep_distribution snr draws timesteps in proportion to their Min-SNR weight, and --min_snr_gamma "
            "would weigh them once more",
            "--timestep_distribution, --min_snr_gamma",
            "Leave one of the two out; --timestep_snr_gamma sets the gamma of the distribution.",
        )
    ]


def cached_text_notices(cache: CacheOptions, *, trains_text: bool) -> list[str]:
    """Captions are not encoded once while their encoding is trained."""
    if cache.cache_text_encoder_outputs and trains_text:
        return ["--cache_text_encoder_outputs has no effect while the text encoder is trained"]
    return []
