"""Options of a run's length, optimizer, schedule, files, log and previews. Imports nothing heavy."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from library.errors import Problem
from library.options import option, parse_int_or_float, repeated_keys

DEFAULT_TRAIN_STEPS: Final = 1600
_SCHEDULERS = "the complete list of learning rate schedules"
_WANDB = "logging to Weights & Biases"
_HUB = "uploading to the Hugging Face hub"
_SKIP = "starting at a chosen step"
_OFF: Final = {0: None}


@dataclass(frozen=True, kw_only=True, slots=True)
class LengthOptions:
    """Length of the run."""

    max_train_steps: int = option(DEFAULT_TRAIN_STEPS, minimum=1, metavar="N", help="Number of optimizer steps.")
    max_train_epochs: int | None = option(
        None, minimum=1, synonyms=_OFF, metavar="N", help="Number of epochs; when given, the steps follow from it."
    )
    gradient_accumulation_steps: int = option(
        1, minimum=1, metavar="N", help="Batches whose gradients are added up for one optimizer step."
    )

    def notices(self) -> list[str]:
        """Which of two lengths holds."""
        if self.max_train_epochs is not None and self.max_train_steps != DEFAULT_TRAIN_STEPS:
            return [
                f"--max_train_epochs {self.max_train_epochs} sets the length; "
                f"--max_train_steps {self.max_train_steps} is not used"
            ]
        return []


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerOptions:
    """Optimizer."""

    optimizer_type: str = option(
        "",
        metavar="NAME",
        help="AdamW (used when absent), AdamW8bit, Lion or SGDNesterov; upper and lower case are the same.",
    )
    use_8bit_adam: bool = option(False, help="Old spelling of --optimizer_type AdamW8bit.")
    use_lion_optimizer: bool = option(False, help="Old spelling of --optimizer_type Lion.")
    learning_rate: float = option(
        2e-6, minimum=0, metavar="RATE", help="Learning rate of everything that has none of its own."
    )
    max_grad_norm: float = option(
        1.0, minimum=0, metavar="NORM", help="Scale gradients down to this norm over all trained weights. 0 is off."
    )
    optimizer_args: tuple[str, ...] = option(
        (),
        metavar="KEY=VALUE",
        help="Further arguments of the optimizer, each a Python value, for example: weight_decay=0.01 betas=0.9,0.99",
    )

    def problems(self) -> list[Problem]:
        """Optimizers named twice."""
        asked = [name for name in ("use_8bit_adam", "use_lion_optimizer") if getattr(self, name)]
        if self.optimizer_type:
            asked.append("optimizer_type")
        if len(asked) < 2:
            return []
        names = " and ".join(f"--{name}" for name in asked)
        return [Problem(f"{names} each choose an optimizer", f"--{asked[0]}", "Keep --optimizer_type only.")]

    def notices(self) -> list[str]:
        """What an old spelling means, repeated arguments, and a rate that hardly trains."""
        found = [
            f"--{flag} means --optimizer_type {name}"
            for flag, name in (("use_8bit_adam", "AdamW8bit"), ("use_lion_optimizer", "Lion"))
            if getattr(self, flag)
        ]
        found += repeated_keys(self.optimizer_args, "--optimizer_args")
        if self.optimizer_type.lower().startswith(("dadapt", "prodigy")) and self.learning_rate <= 0.1:
            found.append(
                f"--learning_rate {self.learning_rate:g} is very low for {self.optimizer_type}, which finds the rate "
                "itself and multiplies it by this one: 1.0 is usual"
            )
        return found

    def settled(self) -> "OptimizerOptions":
        """The same, with old spellings replaced by ``optimizer_type``."""
        name = "AdamW8bit" if self.use_8bit_adam else "Lion" if self.use_lion_optimizer else self.optimizer_type
        return replace(self, optimizer_type=name, use_8bit_adam=False, use_lion_optimizer=False)


# Which schedules a setting belongs to.
_SCHEDULES_OF: Final = {
    "lr_decay_steps": ("warmup_stable_decay",),
    "lr_scheduler_num_cycles": ("cosine_with_restarts", "cosine_with_min_lr", "warmup_stable_decay"),
    "lr_scheduler_power": ("polynomial",),
    "lr_scheduler_timescale": ("inverse_sqrt",),
    "lr_scheduler_min_lr_ratio": ("cosine_with_min_lr", "warmup_stable_decay"),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class SchedulerOptions:
    """Learning rate schedule."""

    lr_scheduler: str = option(
        "constant",
        choices=(
            "constant",
            "constant_with_warmup",
            "linear",
            "cosine",
            "cosine_with_restarts",
            "polynomial",
            "piecewise_constant",
            "adafactor",
            "inverse_sqrt",
            "cosine_with_min_lr",
            "warmup_stable_decay",
        ),
        later_values={"adafactor": _SCHEDULERS},
        help="How the learning rate changes over the run.",
    )
    lr_scheduler_type: str = option(
        "", metavar="CLASS", later=_SCHEDULERS, help="Class of a schedule of your own, used in place of --lr_scheduler."
    )
    lr_scheduler_args: tuple[str, ...] = option(
        (),
        metavar="KEY=VALUE",
        help="Further arguments of the schedule, each a Python value; piecewise_constant needs "
        "step_rules, for example: step_rules=1:100,0.1:200,0.01",
    )
    lr_warmup_steps: int | float = option(
        0,
        metavar="N",
        parse=parse_int_or_float,
        minimum=0,
        help="Steps in which the rate rises from 0; below 1, or as '10%', a fraction of all steps.",
    )
    lr_decay_steps: int | float = option(
        0,
        metavar="N",
        parse=parse_int_or_float,
        minimum=0,
        help="Steps in which the rate falls at the end, for warmup_stable_decay; written as --lr_warmup_steps.",
    )
    lr_scheduler_num_cycles: int = option(1, minimum=1, metavar="N", help="Number of cycles of cosine_with_restarts.")
    lr_scheduler_power: float = option(1.0, minimum=0, metavar="P", help="Exponent of polynomial.")
    lr_scheduler_timescale: int | None = option(
        None, minimum=1, metavar="N", help="Time scale of inverse_sqrt, in steps."
    )
    lr_scheduler_min_lr_ratio: float | None = option(
        None,
        minimum=0,
        maximum=1,
        metavar="RATIO",
        help="Lowest rate as a fraction of the learning rate, for cosine_with_min_lr and warmup_stable_decay.",
    )

    def notices(self) -> list[str]:
        """Repeated arguments, and settings that the schedule does not have."""
        defaults = SchedulerOptions()
        unused = [
            f"--{name}"
            for name, schedules in _SCHEDULES_OF.items()
            if getattr(self, name) != getattr(defaults, name) and self.lr_scheduler not in schedules
        ]
        found = [f"without effect with --lr_scheduler {self.lr_scheduler}: {', '.join(unused)}"] if unused else []
        return found + repeated_keys(self.lr_scheduler_args, "--lr_scheduler_args")


@dataclass(frozen=True, kw_only=True, slots=True)
class SaveOptions:
    """Saving."""

    output_dir: Path | None = option(
        None, metavar="DIR", help="Folder for the trained files, states and preview images."
    )
    output_name: str | None = option(None, metavar="NAME", help="Name of the trained file, without its suffix.")
    save_precision: str | None = option(
        None, choices=("float", "fp16", "bf16"), help="Number format of the saved weights; as trained when absent."
    )
    save_every_n_epochs: int | None = option(
        None, minimum=1, synonyms=_OFF, metavar="N", help="Save after every N epochs."
    )
    save_every_n_steps: int | None = option(
        None, minimum=1, synonyms=_OFF, metavar="N", help="Save after every N steps."
    )
    save_n_epoch_ratio: int | None = option(
        None, minimum=1, synonyms=_OFF, metavar="N", help="Save about N times in the run; sets --save_every_n_epochs."
    )
    save_last_n_epochs: int | None = option(
        None, minimum=1, synonyms=_OFF, metavar="N", help="Keep only the last N of the files saved by epoch."
    )
    save_last_n_epochs_state: int | None = option(
        None, minimum=1, synonyms=_OFF, metavar="N", help="The same for states; --save_last_n_epochs when absent."
    )
    save_last_n_steps: int | None = option(
        None, minimum=1, synonyms=_OFF, metavar="N", help="Keep only files saved by step within the last N steps."
    )
    save_last_n_steps_state: int | None = option(
        None, minimum=1, synonyms=_OFF, metavar="N", help="The same for states; --save_last_n_steps when absent."
    )
    save_state: bool = option(False, help="Save, along with each file, a state that training can be resumed from.")
    save_state_on_train_end: bool = option(False, help="Save a state at the end of the run.")


@dataclass(frozen=True, kw_only=True, slots=True)
class ResumeOptions:
    """Resuming."""

    resume: Path | None = option(None, metavar="DIR", help="State folder to continue from, at the step it was saved.")
    initial_epoch: int | None = option(None, minimum=1, metavar="N", later=_SKIP, help="Epoch (from 1) to begin with.")
    initial_step: int | None = option(None, minimum=0, metavar="N", later=_SKIP, help="Step (from 0) to begin with.")
    skip_until_initial_step: bool = option(
        False, later=_SKIP, help="Pass over the data before the first step that is trained."
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class MetadataOptions:
    """Metadata in the trained file."""

    training_comment: str | None = option(None, metavar="TEXT", help="A remark of your own, stored in the file.")
    no_metadata: bool = option(False, help="Store only the least that other programs need.")
    metadata_title: str | None = option(None, metavar="TEXT", help="Title; the output name when absent.")
    metadata_author: str | None = option(None, metavar="TEXT", help="Author.")
    metadata_description: str | None = option(None, metavar="TEXT", help="Description.")
    metadata_license: str | None = option(None, metavar="TEXT", help="License.")
    metadata_tags: str | None = option(None, metavar="TEXT", help="Tags, separated by commas.")
    metadata_usage_hint: str | None = option(None, metavar="TEXT", help="How the file is meant to be used.")
    metadata_thumbnail: str | None = option(
        None, metavar="FILE", help="Thumbnail: an image file, or a URL that starts with 'data:'."
    )
    metadata_merged_from: str | None = option(None, metavar="TEXT", help="Models this one was merged from.")
    metadata_trigger_phrase: str | None = option(None, metavar="TEXT", help="Words that call up what was trained.")
    metadata_preprocessor: str | None = option(None, metavar="TEXT", help="Preprocessing the model expects.")
    metadata_is_negative_embedding: str | None = option(
        None, metavar="TEXT", help="Whether an embedding is meant for negative prompts."
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class LoggingOptions:
    """Training log."""

    logging_dir: Path | None = option(
        None, metavar="DIR", help="Folder for TensorBoard logs; giving it switches logging on."
    )
    log_with: str | None = option(
        None,
        choices=("tensorboard", "wandb", "all"),
        later_values={"wandb": _WANDB, "all": _WANDB},
        help="What to log with; tensorboard when --logging_dir is given.",
    )
    log_prefix: str | None = option(None, metavar="TEXT", help="Put before the time stamp in the log folder's name.")
    log_tracker_name: str | None = option(None, metavar="NAME", help="Name of the log within its folder.")
    wandb_run_name: str | None = option(
        None, metavar="NAME", help="Name of the run at Weights & Biases; without effect until that is available."
    )
    log_tracker_config: Path | None = option(
        None, metavar="FILE", later=_WANDB, help="TOML file with settings of the loggers."
    )
    wandb_api_key: str | None = option(None, metavar="KEY", later=_WANDB, help="Key to log in to Weights & Biases.")
    log_config: bool = option(False, help="Write the options of the run, without secrets and paths, to the log.")

    def problems(self) -> list[Problem]:
        """A logger without its folder."""
        if self.log_with not in ("tensorboard", "all") or self.logging_dir is not None:
            return []
        return [Problem(f"--log_with {self.log_with} needs a folder", "--log_with", "Add --logging_dir FOLDER.")]


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

    def problems(self) -> list[Problem]:
        """Previews without prompts."""
        settled = self.settled()
        if not (settled.sample_at_first or settled.sample_every_n_steps or settled.sample_every_n_epochs):
            return []
        if self.sample_prompts is not None:
            return []
        wanted = ("sample_every_n_epochs", "sample_every_n_steps", "sample_at_first")
        flag = next(f"--{name}" for name in wanted if getattr(settled, name))
        return [Problem(f"{flag} needs prompts", flag, "Add --sample_prompts FILE.")]

    def notices(self) -> list[str]:
        """Intervals that switch previews off, and which of two holds."""
        found = [
            f"--{name} {getattr(self, name)} switches these previews off"
            for name in ("sample_every_n_steps", "sample_every_n_epochs")
            if getattr(self, name) is not None and getattr(self, name) <= 0
        ]
        settled = self.settled()
        if settled.sample_every_n_epochs and settled.sample_every_n_steps:
            found.append("--sample_every_n_epochs is used, --sample_every_n_steps is not")
        return found

    def settled(self) -> "PreviewOptions":
        """The same, with intervals of 0 and less taken as absent."""
        steps, epochs = self.sample_every_n_steps, self.sample_every_n_epochs
        return replace(
            self,
            sample_every_n_steps=steps if steps and steps > 0 else None,
            sample_every_n_epochs=epochs if epochs and epochs > 0 else None,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class HubOptions:
    """Hugging Face hub."""

    huggingface_repo_id: str | None = option(
        None, metavar="OWNER/NAME", later=_HUB, help="Repository that saved files are uploaded to."
    )
    huggingface_repo_type: str | None = option(None, metavar="TYPE", later=_HUB, help="Type of the repository.")
    huggingface_path_in_repo: str | None = option(None, metavar="PATH", later=_HUB, help="Folder in the repository.")
    huggingface_token: str | None = option(None, metavar="TOKEN", later=_HUB, help="Access token of the hub.")
    huggingface_repo_visibility: str | None = option(
        None, metavar="VISIBILITY", later=_HUB, help="'public' makes a new repository public; otherwise it is private."
    )
    save_state_to_huggingface: bool = option(False, later=_HUB, help="Upload states as well.")
    resume_from_huggingface: bool = option(
        False, later=_HUB, help="--resume names a state on the hub: owner/name/path:revision:type."
    )
    async_upload: bool = option(False, later=_HUB, help="Upload while training goes on.")
