"""Where a run is: what a state keeps of it, and how it is continued from one."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from library.errors import Problem, UserError, raise_if_any
from library.option_values import text_pairs
from library.runtime import Runtime
from library.training.ema import WeightAverage
from library.training.fingerprint import Changes, changes
from library.training.foreign_states import read_foreign
from library.training.history import RunHistory
from library.training.method import TrainingMethod
from library.training.optimizer_kinds import OptimizerKind
from library.training.optimizers import kind_of
from library.training.options import OptimizerOptions, ResumeOptions
from library.training.progress import RunLength
from library.training.restoring import restore
from library.training.schedule_classes import advance
from library.training.states import TrainingState, is_foreign, read_state
from library.training.tracking import LossAverage

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim.lr_scheduler import LRScheduler

log = logging.getLogger(__name__)

_SETTINGS: Final = "optimizer_args"


class Progress:
    """Where the run is: what a state keeps, and how it is continued from one.

    Args:
        method: What is trained.
        optimizer: The prepared optimizer.
        schedule: The learning rates.
        runtime: The processes.
        made_of: The fingerprint of options, data and model.
        average: The average of the weights, if one is kept.
        history: What is logged, for the report, if one is made.

    Attributes:
        losses: The mean loss of the run.
        log: Where the run is logged, as the tracker tells it.
    """

    def __init__(
        self,
        method: TrainingMethod,
        optimizer: Any,
        schedule: "LRScheduler",
        runtime: Runtime,
        made_of: Mapping[str, Any],
        average: WeightAverage | None = None,
        history: RunHistory | None = None,
    ) -> None:
        self._method = method
        self._optimizer = optimizer
        self._schedule = schedule
        self._scaler = runtime.accelerator.scaler
        self._made_of = made_of
        self._average = average
        self._history = history
        self.losses = LossAverage()
        self.log: Mapping[str, str] = {}

    def resume(self, folder: Path | None, options: ResumeOptions, length: RunLength) -> int:
        """Continue from the state in ``folder``, or at the step that the options name.

        Returns:
            The number of steps already done, 0 for a new run. It is that of the whole run only where a state that was
            found automatically is one of a finished run.

        Raises:
            UserError: The state is not whole, belongs to another run, network or optimizer, or leaves nothing to train.
        """
        asked = _asked_step(options, length)
        if folder is None:
            step = asked or 0
            _check_left(step, length, "--initial_step, --initial_epoch")
            advance(self._schedule, step)
            return step
        if is_foreign(folder):
            state = read_foreign(folder, self._method.trained, self._optimizer, asked=asked)
        else:
            state = read_state(folder)
        step = state.step if asked is None else asked
        is_finished = options.is_automatic and step == length.total_steps
        if not is_finished:
            _check_left(step, length, "--resume, --max_train_steps, --max_train_epochs")
        self._take(state, folder, options, at=step)
        what = "the run is finished" if is_finished else "resuming"
        log.info("%s at step %d: %s", what, step, folder.name)
        return step

    def _take(self, state: TrainingState, folder: Path, options: ResumeOptions, *, at: int) -> None:
        """Put everything where ``state`` left it; ``at`` is the step to go on from."""
        found = changes(state.fingerprint, self._made_of) if state.fingerprint else Changes()
        for line in found.harmless:
            log.warning("changed since the state was saved: %s", line)
        _check_changes(found, folder, allowed=options.resume_allow_changes)
        raise_if_any(_other_optimizer(state.fingerprint, self._made_of, folder))
        try:
            self._method.trained.load_state_dict(dict(state.tensors))
        except RuntimeError as error:
            raise UserError(
                f"the state does not fit what is trained: {_differences(state.tensors, self._method.trained)}",
                where=f"--resume {folder}",
                remedy="Continue with the rank, the number of vectors and the trained parts that the state was saved "
                "with.",
            ) from error
        is_same_schedule = at == state.step and self._has_same_schedule(state)
        restore(
            state,
            optimizer=self._optimizer,
            scheduler=self._schedule,
            scaler=self._scaler,
            at=None if is_same_schedule else at,
            anew=_changed_settings(state.fingerprint, self._made_of),
        )
        self._resume_average(state)
        self.log = state.log
        if at == state.step:
            self.losses.load_state_dict(state.losses)
            if self._history is not None:
                self._history.load_state_dict(state.curves)

    def _has_same_schedule(self, state: TrainingState) -> bool:
        """Whether the run is as long as it was, with the same rates; tells where it is not."""
        before, now = state.fingerprint.get("total_steps"), self._made_of["total_steps"]
        if before is not None and before != now:
            log.warning(
                "the run has %s steps now; it had %s: the learning rates from here on are those of the new length",
                now,
                before,
            )
        return before == now and not any(
            name.startswith("lr_") for name in _changed_options(state.fingerprint, self._made_of)
        )

    def _resume_average(self, state: TrainingState) -> None:
        if self._average is not None and state.ema is not None:
            self._average.load(state.ema, state.ema_updates)
        elif self._average is not None:
            self._average.restart()
            log.warning("the state holds no average of the weights (EMA): it begins with the weights of the state")
        elif state.ema is not None:
            log.warning("the state's average of the weights (EMA) is not continued: --ema is not given")

    def capture(self, step: int, epoch: int) -> TrainingState:
        """The state after ``step`` steps."""
        return TrainingState(
            step=step,
            epoch=epoch,
            tensors=self._method.trained.state_dict(),
            optimizer=self._optimizer.state_dict(),
            scheduler=self._schedule.state_dict(),
            scaler=self._scaler.state_dict() if self._scaler is not None else None,
            ema=self._average.state_dict() if self._average is not None else None,
            ema_updates=self._average.updates if self._average is not None else 0,
            losses=self.losses.state_dict(),
            log=self.log,
            curves=self._history.state_dict() if self._history is not None else {},
            fingerprint=self._made_of,
        )


def _asked_step(options: ResumeOptions, length: RunLength) -> int | None:
    """The step, from 0, that the options let the run begin with; None where they do not say."""
    if options.initial_step is not None:
        return options.initial_step
    return None if options.initial_epoch is None else (options.initial_epoch - 1) * length.steps_per_epoch


def _check_left(step: int, length: RunLength, where: str) -> None:
    """Refuse a run that would end before its first step.

    Raises:
        UserError: It would.
    """
    if step >= length.total_steps:
        raise UserError(
            f"the run is at step {step} of {length.total_steps}: nothing is left to train",
            where=where,
            remedy="Raise the number of steps or epochs.",
        )


def _check_changes(found: Changes, folder: Path, *, allowed: bool) -> None:
    """Refuse to continue another run than the state is of, unless that is asked for.

    Raises:
        UserError: With every difference.
    """
    if allowed:
        for line in found.defining:
            log.warning("changed since the state was saved: %s", line)
        return
    raise_if_any(
        [
            Problem(
                f"changed since the state was saved: {line}",
                where=f"--resume {folder}",
                remedy="Take back the change, or give --resume_allow_changes to go on with it.",
            )
            for line in found.defining
        ]
    )


def _other_optimizer(saved: Mapping[str, Any], current: Mapping[str, Any], folder: Path) -> list[Problem]:
    """What one optimizer has gathered means nothing to another, even where the names in it are the same."""
    if "options" not in saved:
        return []
    before, now = (_optimizer(made_of["options"]) for made_of in (saved, current))
    if before is None or now is None or (before.module, before.class_name) == (now.module, now.class_name):
        return []
    return [
        Problem(
            f"the state is one of another optimizer: {before.name}, and this run has {now.name}",
            where=f"--resume {folder}, --optimizer_type",
            remedy=f"Continue with {before.name}; or start from the saved model, without --resume.",
        )
    ]


def _optimizer(options: Mapping[str, Any]) -> OptimizerKind | None:
    names = ("optimizer_type", "use_8bit_adam", "use_lion_optimizer")
    return kind_of(OptimizerOptions(**{name: options[name] for name in names if name in options}))


def _changed_options(saved: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    before, now = saved.get("options", {}), current["options"]
    return [name for name in now if name in before and before[name] != now[name]]


def _changed_settings(saved: Mapping[str, Any], current: Mapping[str, Any]) -> set[str]:
    """Names of the optimizer's settings that are not given as they were."""
    if _SETTINGS not in _changed_options(saved, current):
        return set()
    before, now = (text_pairs(made_of["options"][_SETTINGS]) for made_of in (saved, current))
    return {name for name in {*before, *now} if before.get(name) != now.get(name)}


def _differences(saved: "Mapping[str, Tensor]", trained: "nn.Module") -> str:
    """How the tensors of a state differ from those that are trained: numbers, and one of each kind."""
    own = trained.state_dict()
    shaped = [name for name in own if name in saved and saved[name].shape != own[name].shape]
    kinds = (
        ("lacks", [name for name in own if name not in saved], ""),
        ("has", [name for name in saved if name not in own], " more"),
    )
    said = [f"it {verb} {len(names)} tensors{more} (for example {names[0]})" for verb, names, more in kinds if names]
    if shaped:
        name = shaped[0]
        said.append(f"{name} is {tuple(saved[name].shape)} there and {tuple(own[name].shape)} here")
    return ", ".join(said)
