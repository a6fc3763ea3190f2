"""Options of the network (adapter) that is trained. Imports nothing heavy."""

from dataclasses import dataclass
from pathlib import Path

from library.errors import Problem
from library.options import near_remedy, option, pair_problems, repeated_keys
from networks.arguments import split_arguments
from networks.oft_settings import DEFAULT_CONSTRAINT, OFT


@dataclass(frozen=True, kw_only=True, slots=True)
class NetworkOptions:
    """Network."""

    network_module: str | None = option(
        None, metavar="MODULE", help="Import path of the kind of network, for example networks.lora or lycoris.kohya."
    )
    network_weights: Path | None = option(None, metavar="FILE", help="Network file to start from.")
    network_dim: int | None = option(
        None, minimum=1, metavar="N", help="Rank of the network; the module's own default (4 for LoRA) when absent."
    )
    network_alpha: float = option(
        1.0, minimum=0, metavar="ALPHA", help="Strength of the network is alpha / rank. 0 means the rank."
    )
    network_dropout: float | None = option(
        None, minimum=0, maximum=1, metavar="RATE", help="How often (0 to 1) a value inside the network is left out."
    )
    network_args: tuple[str, ...] = option(
        (), metavar="KEY=VALUE", help="Further arguments of the network module, for example: conv_dim=4 conv_alpha=1"
    )
    network_train_unet_only: bool = option(False, help="Train the U-Net's part only.")
    network_train_text_encoder_only: bool = option(False, help="Train the text encoder's part only.")
    dim_from_weights: bool = option(False, help="Take the rank of each layer from --network_weights.")
    scale_weight_norms: float | None = option(
        None, minimum=0, metavar="NORM", help="Scale layers down to this norm after each step (1 to begin with)."
    )
    base_weights: tuple[Path, ...] = option(
        (), metavar="FILE", help="Network files to merge into the base model before training."
    )
    base_weights_multiplier: tuple[float, ...] = option(
        (), metavar="X", help="Strength of each file in --base_weights; 1 where absent."
    )
    unet_lr: float | None = option(
        None, minimum=0, metavar="RATE", help="Learning rate of the U-Net's part; --learning_rate when absent."
    )
    text_encoder_lr: tuple[float, ...] | None = option(
        None, minimum=0, metavar="RATE", help="Learning rate of the text encoder's part; --learning_rate when absent."
    )
    save_model_as: str = option(
        "safetensors", choices=("ckpt", "pt", "safetensors"), help="Format of the trained file."
    )

    def problems(self) -> list[Problem]:
        """Relations inside the group, and files that are not there."""
        found = pair_problems(self.network_args, "--network_args")
        if self.network_train_unet_only and self.network_train_text_encoder_only:
            found.append(
                Problem(
                    "--network_train_unet_only and --network_train_text_encoder_only leave nothing to train",
                    "--network_train_unet_only",
                    "Keep one of them, or neither to train both parts.",
                )
            )
        if self.dim_from_weights and self.network_weights is None:
            found.append(
                Problem("--dim_from_weights needs a file", "--dim_from_weights", "Add --network_weights FILE.")
            )
        if len(self.base_weights_multiplier) > len(self.base_weights):
            found.append(
                Problem(
                    f"--base_weights_multiplier has {len(self.base_weights_multiplier)} values for "
                    f"{len(self.base_weights)} files in --base_weights",
                    "--base_weights_multiplier",
                    "Give at most one for each file.",
                )
            )
        return found + self._missing_files()

    def _missing_files(self) -> list[Problem]:
        named = [("--base_weights", path) for path in self.base_weights]
        if self.network_weights is not None:
            named.insert(0, ("--network_weights", self.network_weights))
        return [
            Problem(f"network file not found: {path}", flag, near_remedy(path))
            for flag, path in named
            if not path.is_file()
        ]

    def notices(self) -> list[str]:
        """Repeated arguments, rates of what is not trained, and what OFT and LyCORIS ask for."""
        found = [*repeated_keys(self.network_args, "--network_args"), *self._unused_rates()]
        if self.network_module == OFT:
            return found + self._oft_notices()
        if str(split_arguments(self.network_args).get("use_scalar", "false")).lower() not in ("false", "0"):
            found.append(
                "--network_args: use_scalar is folded into the weights when LyCORIS saves them, so a run that is "
                "resumed differs from one that was not interrupted"
            )
        if self.text_encoder_lr is not None and len(set(self.text_encoder_lr)) > 1:
            found.append(
                f"Stable Diffusion 1 and 2 have one text encoder: the first --text_encoder_lr, "
                f"{self.text_encoder_lr[0]:g}, is used"
            )
        return found

    def _unused_rates(self) -> list[str]:
        pairs = (
            (self.network_train_unet_only, "network_train_unet_only", self.text_encoder_lr, "text_encoder_lr"),
            (self.network_train_text_encoder_only, "network_train_text_encoder_only", self.unet_lr, "unet_lr"),
        )
        return [f"without effect with --{flag}: --{rate}" for only, flag, value, rate in pairs if only and value]

    def _oft_notices(self) -> list[str]:
        found = []
        if self.network_alpha == 1 and not self.dim_from_weights:
            found.append(
                f"--network_alpha is the constraint of {OFT}: 1, the default, hardly limits the rotations; "
                f"{DEFAULT_CONSTRAINT:g} is usual"
            )
        if self.text_encoder_lr is not None:
            found.append(f"{OFT} has no part for the text encoder: --text_encoder_lr is without effect")
        return found
