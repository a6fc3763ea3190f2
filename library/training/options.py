"""Options of a run's length, optimizer, schedule, files, log and previews. Imports nothing heavy."""

import re
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Final

from library.errors import Problem
from library.options import choose_from, option, parse_int_or_float, repeated_keys
from library.training.hub_options import HubOptions as HubOptions
from library.training.log_options import SAMPLER_NAMES as SAMPLER_NAMES
from library.training.log_options import LoggingOptions as LoggingOptions
from library.training.log_options import PreviewOptions as PreviewOptions
from library.training.log_options import flags

DEFAULT_TRAIN_STEPS: Final = 1600
LR_SCHEDULERS: Final = (
    "constant",
    "constant_with_warmup",
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "piecewise_constant",
    "inverse_sqrt",
    "cosine_with_min_lr",
    "warmup_stable_decay",
)
RELATIVE_STEP: Final = "adafactor"
"""The schedule that AdaFactor has of its own; it may be followed by a colon and the rate shown at first."""
_AUTOMATIC: Final = Path("auto")
_OFF: Final = {0: None}


def _below_1(value: float) -> str | None:
    return None if value < 1 else "must be below 1: an average that keeps all of itself never changes"


def _not_a_name(value: str) -> str | None:
    """Results, previews, report and manifest lie side by side: the name is a part of each of their names."""
    if value not in (".", "..") and not re.search(r"[/\\\x00-\x1f\x7f-\x9f]", value):
        return None
    return "must be a name alone: no folders, which --output_dir is for, and no control characters"


@dataclass(frozen=True, kw_only=True, slots=True)
class LengthOptions:
    """Length of the run."""

    max_train_steps: int = option(DEFAULT_TRAIN_STEPS, minimum=1, metavar="N", help="Number of optimizer steps.")
    max_train_epochs: int | None = option(
        None, minimum=1, synonyms=_OFF, metavar="N", help="Number of epochs; the steps follow from it. 0 is off."
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
        help="AdamW (used when absent), AdamW8bit, Lion, Prodigy, AdaFactor or another of docs/optimizers.md (upper "
        "and lower case are the same), a class of torch.optim, or an import path: package.module.Class.",
    )
    use_8bit_adam: bool = option(False, help="Old spelling of --optimizer_type AdamW8bit.")
    use_lion_optimizer: bool = option(False, help="Old spelling of --optimizer_type Lion.")
    learning_rate: float = option(
        2e-6, minimum=0, metavar="RATE", help="Learning rate of everything that has none of its own."
    )
    max_grad_norm: float = option(
        1.0, minimum=0, metavar="NORM", help="Scale gradients down to this norm over all trained weights. 0 is off."
    )
    on_nonfinite: str = option(
        "stop",
        choices=("stop", "skip"),
        help="When loss or gradient of a step is not finite: end the run, or leave the step out, which counts as a "
        "step and changes no weight. After 40 in a row the run ends in any case.",
    )
    optimizer_args: tuple[str, ...] = option(
        (),
        metavar="KEY=VALUE",
        help="Further arguments of the optimizer, each a Python value, for example: weight_decay=0.01 betas=0.9,0.99",
    )
    fused_backward_pass: bool = option(
        False,
        help="Update each weight as soon as its gradient is known, and free the gradient: far less memory for "
        "fine_tune.py and train_db.py. Needs --max_grad_norm 0, one batch a step and one process.",
    )

    def problems(self) -> list[Problem]:
        """Optimizers named twice, and looking at a gradient that is never whole."""
        found = []
        if self.fused_backward_pass and self.on_nonfinite == "skip":
            found.append(
                Problem(
                    "--fused_backward_pass cannot leave out a step: it has changed most weights when it comes to a "
                    "gradient that is not finite",
                    "--fused_backward_pass, --on_nonfinite skip",
                    "Leave one of the two out.",
                )
            )
        if self.fused_backward_pass and self.max_grad_norm > 0:
            found.append(
                Problem(
                    f"--fused_backward_pass cannot keep the gradient's norm below {self.max_grad_norm:g}: gradients "
                    "are used one by one",
                    "--fused_backward_pass, --max_grad_norm",
                    "Add --max_grad_norm 0.",
                )
            )
        return found + self._named_twice()

    def _named_twice(self) -> list[Problem]:
        asked = [name for name in ("use_8bit_adam", "use_lion_optimizer") if getattr(self, name)]
        if self.optimizer_type:
            asked.append("optimizer_type")
        if len(asked) < 2:
            return []
        names = " and ".join(f"--{name}" for name in asked)
        return [Problem(f"{names} each choose an optimizer", f"--{asked[0]}", "Keep --optimizer_type only.")]

    def notices(self) -> list[str]:
        """What an old spelling means, and repeated arguments."""
        found = [
            f"--{flag} means --optimizer_type {name}"
            for flag, name in (("use_8bit_adam", "AdamW8bit"), ("use_lion_optimizer", "Lion"))
            if getattr(self, flag)
        ]
        found += repeated_keys(self.optimizer_args, "--optimizer_args")
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
        metavar="NAME",
        help=f"How the learning rate changes over the run: {', '.join(LR_SCHEDULERS)}, or {RELATIVE_STEP}.",
    )
    lr_scheduler_type: str = option(
        "",
        metavar="CLASS",
        help="Class of a schedule, used in place of --lr_scheduler: one of torch.optim.lr_scheduler, or an import "
        "path: package.module.Class. It is made with --lr_scheduler_args, and advances once an optimizer step.",
    )
    lr_scheduler_args: tuple[str, ...] = option(
        (),
        flag_aliases=("scheduler_args",),
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
    lr_scheduler_num_cycles: int = option(
        1,
        minimum=0,
        metavar="N",
        help="Number of cycles of cosine_with_restarts; half waves of cosine_with_min_lr and warmup_stable_decay, of "
        "which the second rises again. With 0 the rate stays as it is.",
    )
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

    def problems(self) -> list[Problem]:
        """A schedule that there is not."""
        name = self.lr_scheduler
        if name in LR_SCHEDULERS or name.partition(":")[0] == RELATIVE_STEP:
            return []
        remedy = choose_from(name, [*LR_SCHEDULERS, RELATIVE_STEP], "Available")
        return [Problem(f"--lr_scheduler knows no schedule {name!r}", where="--lr_scheduler", remedy=remedy)]

    def notices(self) -> list[str]:
        """Repeated arguments, and settings that the schedule does not have."""
        defaults = SchedulerOptions()
        unused = [
            f"--{name}"
            for name, schedules in _SCHEDULES_OF.items()
            if getattr(self, name) != getattr(defaults, name)
            and (self.lr_scheduler_type or self.lr_scheduler not in schedules)
        ]
        if self.lr_scheduler_type and self.lr_scheduler != defaults.lr_scheduler:
            unused.append("--lr_scheduler")
        chosen = f"_type {self.lr_scheduler_type}" if self.lr_scheduler_type else f" {self.lr_scheduler}"
        found = [f"without effect with --lr_scheduler{chosen}: {', '.join(unused)}"] if unused else []
        return found + repeated_keys(self.lr_scheduler_args, "--lr_scheduler_args")


@dataclass(frozen=True, kw_only=True, slots=True)
class SaveOptions:
    """Saving."""

    output_dir: Path | None = option(
        None, metavar="DIR", help="Folder for the trained files, states and preview images."
    )
    output_name: str | None = option(
        None, check=_not_a_name, metavar="NAME", help="Name of the trained file, without its suffix."
    )
    save_precision: str | None = option(
        None,
        choices=("float", "fp16", "bf16"),
        synonyms={"fp32": "float"},
        help="Number format of the saved weights; as trained when absent.",
    )
    save_every_n_epochs: int | None = option(
        None, minimum=1, synonyms=_OFF, metavar="N", help="Save after every N epochs. 0 is off."
    )
    save_every_n_steps: int | None = option(
        None, minimum=1, synonyms=_OFF, metavar="N", help="Save after every N steps. 0 is off."
    )
    save_n_epoch_ratio: int | None = option(
        None, minimum=1, synonyms=_OFF, metavar="N", help="Save about N times; sets --save_every_n_epochs. 0 is off."
    )
    save_last_n_epochs: int | None = option(
        None, minimum=1, synonyms=_OFF, metavar="N", help="Keep only the last N files saved by epoch. 0 keeps all."
    )
    save_last_n_epochs_state: int | None = option(
        None, minimum=1, synonyms=_OFF, metavar="N", help="The same for states; --save_last_n_epochs when absent or 0."
    )
    save_last_n_steps: int | None = option(
        None,
        minimum=1,
        synonyms=_OFF,
        metavar="N",
        help="Keep only files saved by step within the last N steps. 0 keeps all.",
    )
    save_last_n_steps_state: int | None = option(
        None, minimum=1, synonyms=_OFF, metavar="N", help="The same for states; --save_last_n_steps when absent or 0."
    )
    save_state: bool = option(False, help="Save, along with each file, a state that training can be resumed from.")
    save_state_on_train_end: bool = option(False, help="Save a state at the end of the run.")
    save_state_every_minutes: float | None = option(
        None,
        above=0,
        synonyms=_OFF,
        metavar="M",
        help="Save a state every M minutes, each in the place of the one before: what a long run loses at most. "
        "0 is off.",
    )

    def notices(self) -> list[str]:
        """How many of what is not saved in between are kept."""
        cadences = {
            "--save_every_n_epochs": (
                self.save_every_n_epochs or self.save_n_epoch_ratio,
                ("save_last_n_epochs", "save_last_n_epochs_state"),
            ),
            "--save_every_n_steps": (self.save_every_n_steps, ("save_last_n_steps", "save_last_n_steps_state")),
        }
        found = []
        if self.save_n_epoch_ratio and self.save_every_n_epochs:
            found.append("--save_n_epoch_ratio is used, --save_every_n_epochs is not")
        for flag, (cadence, names) in cadences.items():
            unused = [name for name in names if getattr(self, name) is not None]
            if unused and not cadence:
                found.append(f"without effect without {flag}: {flags(unused)}")
        unused = [name for name in ("save_last_n_epochs_state", "save_last_n_steps_state") if getattr(self, name)]
        if unused and not self.save_state:
            found.append(f"without effect without --save_state: {flags(unused)}")
        return found


@dataclass(frozen=True, kw_only=True, slots=True)
class EmaOptions:
    """Average of the weights (EMA)."""

    ema: bool = option(False, help="Keep an exponential moving average of the trained weights, and save that as well.")
    ema_decay: float = option(
        0.9999,
        minimum=0,
        check=_below_1,
        metavar="RATE",
        help="How much of the average stays at a step; in the first n steps it is (1 + n) / (10 + n), if that is less.",
    )
    ema_device: str = option(
        "device",
        choices=("device", "cpu"),
        help="Where the average is kept: beside the trained weights, or in the memory of the CPU (slower).",
    )
    ema_save: str = option(
        "both",
        choices=("both", "ema", "model"),
        help="Which files are written: the average (its name ends with -ema), the weights as trained, or both.",
    )
    ema_previews: bool = option(False, help="Make preview images with the average.")

    @property
    def saved(self) -> tuple[str, ...]:
        """What is saved: "model", the weights as trained, "ema", their average, or both."""
        return ("model", "ema") if self.ema and self.ema_save == "both" else (self.ema_save if self.ema else "model",)

    def notices(self) -> list[str]:
        """Settings of an average that is not kept."""
        if self.ema:
            return []
        defaults = EmaOptions()
        given = [one.name for one in fields(self) if getattr(self, one.name) != getattr(defaults, one.name)]
        return [f"without effect without --ema: {', '.join(f'--{name}' for name in given)}"] if given else []


@dataclass(frozen=True, kw_only=True, slots=True)
class ResumeOptions:
    """Resuming."""

    resume: Path | None = option(
        None,
        metavar="DIR",
        help="State folder to continue from, at the step it was saved; 'auto' takes the newest whole one that a run "
        "with this --output_name has left in --output_dir, and begins anew where there is none.",
    )
    resume_allow_changes: bool = option(
        False, help="Continue although options, data or model have changed since the state was saved."
    )
    initial_epoch: int | None = option(
        None, minimum=1, metavar="N", help="Epoch (from 1) to begin with, whatever the state says."
    )
    initial_step: int | None = option(
        None,
        minimum=0,
        metavar="N",
        help="Step (from 0) to begin with, whatever the state says; wins over --initial_epoch.",
    )
    skip_until_initial_step: bool = option(
        False,
        help="Accepted for old command lines: a run that begins later always begins there in the data, too, and "
        "passing over what comes before takes no time.",
    )

    @property
    def is_automatic(self) -> bool:
        """Whether the state to continue from is searched."""
        return self.resume == _AUTOMATIC

    def notices(self) -> list[str]:
        """Which of two beginnings holds."""
        found = []
        if self.initial_step is not None and self.initial_epoch is not None:
            found.append(f"--initial_step {self.initial_step} is where the run begins; --initial_epoch is not used")
        if self.resume_allow_changes and self.resume is None:
            found.append("without effect without --resume: --resume_allow_changes")
        return found


@dataclass(frozen=True, kw_only=True, slots=True)
class MetadataOptions:
    """Metadata in the trained file."""

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
class RecordOptions:
    """Record of the training in the trained file."""

    training_comment: str | None = option(None, metavar="TEXT", help="A remark of your own, stored in the file.")
    no_metadata: bool = option(False, help="Store only the least that other programs need.")

    def notices(self) -> list[str]:
        """A remark that is not stored."""
        unused = self.no_metadata and self.training_comment
        return ["without effect with --no_metadata: --training_comment"] if unused else []
