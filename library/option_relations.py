"""What options of different groups demand of each other; a script's own ``problems()`` and ``main`` put them together.

Imports nothing heavy.
"""

from library.diffusion.options import LossOptions, NoiseOptions
from library.errors import Problem
from library.models.options import ModelOptions, PromptOptions


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
