"""Which Stable Diffusion a model is: everything about it that its weights' shapes alone don't say."""

from dataclasses import dataclass
from typing import Final, Literal

Family = Literal["sd1", "sd2"]
Prediction = Literal["epsilon", "v_prediction"]

LATENT_SCALE: Final = 0.18215
"""Factor from VAE latents to the U-Net's latents (Rombach et al. 2022: 1 / their standard deviation)."""

TEXT_WIDTHS: Final[dict[Family, int]] = {"sd1": 768, "sd2": 1024}
"""Width of the text encoder: CLIP ViT-L/14 for SD1, OpenCLIP ViT-H/14 for SD2."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """A kind of Stable Diffusion model.

    Attributes:
        name: The family: ``"sd1"`` (1.x) or ``"sd2"`` (2.x).
        prediction: What the U-Net predicts: the noise or the velocity (Salimans and Ho 2022).
        text_width: Width of the text encoder's hidden states.
        latent_scale: Factor from VAE latents to the U-Net's latents.
        latent_channels: Channels of a latent image.
    """

    name: Family
    prediction: Prediction
    text_width: int
    latent_scale: float = LATENT_SCALE
    latent_channels: int = 4

    @property
    def base_model_version(self) -> str:
        """The ``ss_base_model_version`` of model files: sd_v1, sd_v1_v, sd_v2 or sd_v2_v."""
        return ("sd_v1" if self.name == "sd1" else "sd_v2") + ("_v" if self.prediction == "v_prediction" else "")


def variant_of(*, v2: bool, v_parameterization: bool, text_width: int | None = None) -> Variant:
    """The variant that the flags describe, with the full model's text width unless ``text_width`` says otherwise."""
    name: Family = "sd2" if v2 else "sd1"
    return Variant(
        name=name,
        prediction="v_prediction" if v_parameterization else "epsilon",
        text_width=text_width or TEXT_WIDTHS[name],
    )
