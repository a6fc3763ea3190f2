"""Options of the network (adapter) that is trained. Imports nothing heavy."""

from dataclasses import dataclass
from pathlib import Path

from library.errors import Problem
from library.options import near_remedy, option, pair_problems, repeated_keys


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
        """Repeated arguments, and text encoder rates beyond the only one that counts."""
        found = repeated_keys(self.network_args, "--network_args")
        if self.text_encoder_lr is not None and len(set(self.text_encoder_lr)) > 1:
            found.append(
                f"Stable Diffusion 1 and 2 have one text encoder: the first --text_encoder_lr, "
                f"{self.text_encoder_lr[0]:g}, is used"
            )
        return found
