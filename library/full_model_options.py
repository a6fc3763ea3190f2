"""Options of training the model itself, U-Net and text encoder. Imports nothing heavy."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from library.data.options import CacheOptions
from library.errors import Problem
from library.models.formats import ModelFormat, check_target, format_notices, model_format, suffix_of
from library.models.options import AttentionOptions, PromptOptions
from library.options import option
from library.runtime_options import RuntimeOptions
from library.training.naming import END, OutputNames
from library.training.options import EmaOptions, LengthOptions, SaveOptions

if TYPE_CHECKING:
    from library.models.size import ModelSize

_TEXT_RATE: Final = "--learning_rate_te"
_STOP: Final = "--stop_text_encoder_training"


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelFileOptions:
    """Format of the trained model."""

    save_model_as: str | None = option(
        None,
        choices=("ckpt", "safetensors", "diffusers", "diffusers_safetensors"),
        help="A single file, or a Diffusers folder; as the base model when absent.",
    )
    use_safetensors: bool = option(
        False,
        help="Write safetensors where the format is left open: without --save_model_as, or with --save_model_as "
        "diffusers.",
    )

    def notices(self) -> list[str]:
        """Which of two formats is written."""
        return format_notices(self.save_model_as, self.use_safetensors)

    def format(self, source: str | None) -> ModelFormat:
        """What results are saved as, where the base model is ``source``."""
        return model_format(self.save_model_as, self.use_safetensors, source or "")


def target_problems(save: SaveOptions, format: ModelFormat, ema: EmaOptions) -> list[Problem]:
    """Whether a final result's name is taken by something that training did not write."""
    if save.output_dir is None:
        return []
    names = OutputNames(folder=save.output_dir, name=save.output_name, suffix=suffix_of(format))
    by_weights = {"model": names, "ema": names.of_average()}
    return [problem for kind in ema.saved for problem in check_target(by_weights[kind].model(END), format)]


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainedParts:
    """Which parts of the model are trained, and how fast.

    Attributes:
        unet_lr: Learning rate of the U-Net; 0 leaves it as it is.
        text_encoder_lr: Learning rate of the text encoder; 0 leaves it as it is.
        separate: The text encoder is a parameter group of its own.
        text_encoder_stop: The step, from 0, from which on the text encoder stays as it is; None is never.
    """

    unet_lr: float
    text_encoder_lr: float
    separate: bool = False
    text_encoder_stop: int | None = None

    @property
    def unet(self) -> bool:
        """Whether the U-Net is trained."""
        return self.unet_lr > 0

    @property
    def text_encoder(self) -> bool:
        """Whether the text encoder is trained in any step."""
        return self.text_encoder_lr > 0 and (self.text_encoder_stop is None or self.text_encoder_stop > 0)

    def text_encoder_at(self, step: int) -> bool:
        """Whether the text encoder is trained in ``step``, from 0."""
        return self.text_encoder and (self.text_encoder_stop is None or step < self.text_encoder_stop)

    def values_of(self, size: "ModelSize") -> int:
        """The number of trained values of a model."""
        return self.unet * size.unet + self.text_encoder * size.text_encoder

    def leaves_unused(self, clip_skip: int | None) -> bool:
        """Whether trained weights stay without a gradient in some step.

        Layers of the text encoder behind ``clip_skip`` have none, nor has any of them once it is stopped.
        """
        return self.text_encoder and (clip_skip is not None or self.text_encoder_stop is not None)

    def problems(self) -> list[Problem]:
        """Rates that leave nothing to train."""
        if self.unet or (self.text_encoder and self.text_encoder_stop is None):
            return []
        when = f" from step {self.text_encoder_stop} on" if self.text_encoder else ""
        remedy = "Give a learning rate above 0."
        return [Problem(f"the learning rate is 0: nothing is trained{when}", "--learning_rate", remedy)]


@dataclass(frozen=True, kw_only=True, slots=True)
class DreamBoothOptions:
    """DreamBooth."""

    learning_rate_te: float | None = option(
        None, minimum=0, metavar="RATE", help="Learning rate of the text encoder; --learning_rate when absent."
    )
    stop_text_encoder_training: int | None = option(
        None,
        metavar="STEP",
        help="Leave the text encoder as it is from this step on; 0 or below never trains it. It is trained to the end "
        "when absent.",
    )
    no_token_padding: bool = option(
        False,
        help="Let the U-Net see a caption's own tokens alone, instead of filling it up to 77. Captions of one batch "
        "must then have equally many.",
    )

    def problems(self) -> list[Problem]:
        """A step at which something stops that never begins."""
        if self.learning_rate_te != 0 or (self.stop_text_encoder_training or 0) <= 0:
            return []
        return [
            Problem(
                f"{_STOP} {self.stop_text_encoder_training} stops the training of the text encoder, which {_TEXT_RATE} "
                "0 leaves out",
                _STOP,
                f"Leave one of the two out, or give a {_TEXT_RATE} above 0.",
            )
        ]

    def notices(self) -> list[str]:
        """What a step before the first one means."""
        stop = self.stop_text_encoder_training
        if stop is None or stop > 0:
            return []
        unused = [] if self.learning_rate_te is None else [f"without effect with {_STOP} {stop}: {_TEXT_RATE}"]
        return [f"{_STOP} {stop}: the text encoder is not trained", *unused]

    def parts(self, learning_rate: float) -> TrainedParts:
        """What is trained."""
        return TrainedParts(
            unet_lr=learning_rate,
            text_encoder_lr=learning_rate if self.learning_rate_te is None else self.learning_rate_te,
            separate=self.learning_rate_te is not None,
            text_encoder_stop=self.stop_text_encoder_training,
        )

    def problems_with(self, runtime: RuntimeOptions, prompts: PromptOptions, cache: CacheOptions) -> list[Problem]:
        """What does not go together with options of other groups."""
        found = []
        if runtime.ddp_static_graph and (self.stop_text_encoder_training or 0) > 0:
            found.append(
                Problem(
                    f"--ddp_static_graph promises that every step uses the same weights, which {_STOP} breaks",
                    "--ddp_static_graph",
                    "Leave one of the two out.",
                )
            )
        others = {
            f"--max_token_length {prompts.max_token_length}": prompts.max_token_length is not None,
            "--cache_text_encoder_outputs": cache.cache_text_encoder_outputs,
        }
        found += [
            Problem(
                f"--no_token_padding does not go together with {flag}, which makes all captions equally long",
                "--no_token_padding",
                "Leave one of the two out.",
            )
            for flag, given in others.items()
            if given and self.no_token_padding
        ]
        return found

    def notices_with(self, length: LengthOptions) -> list[str]:
        """A step that the run does not reach."""
        stop = self.stop_text_encoder_training
        if stop is None or length.max_train_epochs is not None or stop < length.max_train_steps:
            return []
        return [
            f"{_STOP} {stop} is not reached in {length.max_train_steps} steps: the text encoder is trained throughout"
        ]


@dataclass(frozen=True, kw_only=True, slots=True)
class FineTuningOptions:
    """Fine-tuning."""

    train_text_encoder: bool = option(False, help="Train the text encoder too.")
    learning_rate_te: float | None = option(
        None,
        minimum=0,
        metavar="RATE",
        help="Learning rate of the text encoder with --train_text_encoder; --learning_rate when absent.",
    )
    diffusers_xformers: bool = option(
        False, help="The same as --xformers; --mem_eff_attn, --xformers and --sdpa are then not looked at."
    )

    def notices(self) -> list[str]:
        """A rate for what is not trained."""
        if self.train_text_encoder or self.learning_rate_te is None:
            return []
        return [f"without effect without --train_text_encoder: {_TEXT_RATE}"]

    def notices_with(self, attention: AttentionOptions) -> list[str]:
        """What of other groups is not used."""
        others = [f"--{name}" for name in ("mem_eff_attn", "sdpa") if getattr(attention, name)]
        found = []
        if self.diffusers_xformers and others:
            found.append(f"without effect with --diffusers_xformers: {', '.join(others)}")
        return found

    def attention(self, options: AttentionOptions) -> AttentionOptions:
        """The kind of attention, of those in ``options`` and this group."""
        return replace(options, xformers=True, mem_eff_attn=False) if self.diffusers_xformers else options

    def parts(self, learning_rate: float) -> TrainedParts:
        """What is trained."""
        text_lr = learning_rate if self.learning_rate_te is None else self.learning_rate_te
        return TrainedParts(
            unet_lr=learning_rate,
            text_encoder_lr=text_lr if self.train_text_encoder else 0.0,
            separate=self.learning_rate_te is not None,
        )
