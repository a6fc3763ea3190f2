"""Options of the training log and of preview images. Imports nothing heavy."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from library.errors import Problem
from library.options import option


def flags(names: Iterable[str]) -> str:
    """Options by name as flags, one after another."""
    return ", ".join(f"--{name}" for name in names)


@dataclass(frozen=True, kw_only=True, slots=True)
class LoggingOptions:
    """Training log."""

    logging_dir: Path | None = option(
        None, metavar="DIR", help="Folder for TensorBoard logs; giving it switches logging on."
    )
    log_with: str | None = option(
        None,
        choices=("tensorboard", "wandb", "all"),
        help="What to log with; tensorboard when --logging_dir is given. wandb needs that package.",
    )
    log_prefix: str | None = option(None, metavar="TEXT", help="Put before the time stamp in the log folder's name.")
    log_tracker_name: str | None = option(
        None, metavar="NAME", help="Name of the log within its folder, and of the project at Weights & Biases."
    )
    wandb_run_name: str | None = option(None, metavar="NAME", help="Name of the run at Weights & Biases.")
    log_tracker_config: Path | None = option(
        None, metavar="FILE", help="TOML file with settings of the loggers, in sections [tensorboard] and [wandb]."
    )
    wandb_api_key: str | None = option(None, metavar="KEY", help="Key to log in to Weights & Biases.")
    log_config: bool = option(False, help="Write the options of the run, without secrets and paths, to the log.")
    no_report: bool = option(False, help="Do not write the HTML report of the run at its end.")
    no_manifest: bool = option(False, help="Do not write the manifest, from which tools/reproduce.py repeats the run.")

    @property
    def targets(self) -> tuple[str, ...]:
        """What is logged with: "tensorboard", "wandb", both or nothing."""
        if self.log_with == "all":
            return ("tensorboard", "wandb")
        if self.log_with is not None:
            return (self.log_with,)
        return ("tensorboard",) if self.logging_dir is not None else ()

    def problems(self) -> list[Problem]:
        """A logger without its folder."""
        if self.log_with not in ("tensorboard", "all") or self.logging_dir is not None:
            return []
        return [Problem(f"--log_with {self.log_with} needs a folder", "--log_with", "Add --logging_dir FOLDER.")]

    def notices(self) -> list[str]:
        """Settings of logs that are not kept."""
        found = []
        unused = [name for name in ("log_tracker_name", "log_tracker_config", "log_config") if getattr(self, name)]
        if unused and not self.targets:
            found.append(f"without effect without --logging_dir or --log_with: {flags(unused)}")
        if self.log_prefix and self.logging_dir is None:
            found.append("without effect without --logging_dir: --log_prefix")
        unused = [name for name in ("wandb_run_name", "wandb_api_key") if getattr(self, name)]
        if unused and "wandb" not in self.targets:
            found.append(f"without effect without --log_with wandb or all: {flags(unused)}")
        return found


SAMPLER_NAMES: Final = (
    "ddim",
    "pndm",
    "lms",
    "euler",
    "euler_a",
    "heun",
    "dpm_2",
    "dpm_2_a",
    "dpmsolver",
    "dpmsolver++",
    "dpmsingle",
    "k_lms",
    "k_euler",
    "k_euler_a",
    "k_dpm_2",
    "k_dpm_2_a",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class PreviewOptions:
    """Preview images."""

    sample_every_n_steps: int | None = option(None, metavar="N", help="Make preview images every N steps.")
    sample_at_first: bool = option(False, help="Make preview images before the first step too.")
    sample_every_n_epochs: int | None = option(
        None, metavar="N", help="Make preview images every N epochs; wins over --sample_every_n_steps."
    )
    sample_prompts: Path | None = option(
        None, metavar="FILE", help="Prompts of the preview images: .txt (one a line), .toml or .json."
    )
    sample_sampler: str = option("ddim", choices=SAMPLER_NAMES, help="Sampler of the preview images.")

    def notices(self) -> list[str]:
        """Intervals that switch previews off, which of two holds, and what previews lack."""
        found = [
            f"--{name} {getattr(self, name)} switches these previews off"
            for name in ("sample_every_n_steps", "sample_every_n_epochs")
            if getattr(self, name) is not None and getattr(self, name) <= 0
        ]
        steps, epochs = self._intervals()
        if not (self.sample_at_first or steps or epochs):
            plain = PreviewOptions()
            names = ("sample_prompts", "sample_sampler")
            unused = [name for name in names if getattr(self, name) != getattr(plain, name)]
            if unused:
                found.append(
                    "no previews are made without --sample_every_n_epochs, --sample_every_n_steps or "
                    f"--sample_at_first: {flags(unused)} without effect"
                )
        elif self.sample_prompts is None:
            found.append("no previews are made without --sample_prompts FILE")
        elif steps and epochs:
            found.append("--sample_every_n_epochs is used, --sample_every_n_steps is not")
        return found

    def settled(self) -> "PreviewOptions":
        """The same, with intervals of 0 and less taken as absent."""
        steps, epochs = self._intervals()
        return replace(self, sample_every_n_steps=steps, sample_every_n_epochs=epochs)

    def _intervals(self) -> tuple[int | None, int | None]:
        steps, epochs = self.sample_every_n_steps, self.sample_every_n_epochs
        return steps if steps and steps > 0 else None, epochs if epochs and epochs > 0 else None
