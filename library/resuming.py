"""Where a run is: what a state keeps of it, and how it is continued from one."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.errors import UserError
from library.runtime import Runtime
from library.training.ema import WeightAverage
from library.training.method import TrainingMethod
from library.training.progress import RunLength
from library.training.states import TrainingState, fingerprint_differences, read_state, restore

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim.lr_scheduler import LRScheduler

log = logging.getLogger(__name__)


class Progress:
    """Where the run is: what a state keeps, and how it is continued from one.

    Args:
        method: What is trained.
        optimizer: The prepared optimizer.
        schedule: The learning rates.
        runtime: The processes.
        made_of: The fingerprint of options and data.
        average: The average of the weights, if one is kept.
    """

    def __init__(
        self,
        method: TrainingMethod,
        optimizer: Any,
        schedule: "LRScheduler",
        runtime: Runtime,
        made_of: Mapping[str, object],
        average: WeightAverage | None = None,
    ) -> None:
        self._method = method
        self._optimizer = optimizer
        self._schedule = schedule
        self._scaler = runtime.accelerator.scaler
        self._made_of = made_of
        self._average = average

    def resume(self, folder: Path | None, length: RunLength) -> int:
        """Continue from the state in ``folder``; the number of steps already done, 0 without one.

        Raises:
            UserError: The state is not whole, belongs to another network or optimizer, or leaves nothing to train.
        """
        if folder is None:
            return 0
        state = read_state(folder)
        for difference in fingerprint_differences(state.fingerprint, self._made_of):
            log.warning("changed since the state was saved: %s", difference)
        if state.step >= length.total_steps:
            raise UserError(
                f"the state is at step {state.step}, and the run has {length.total_steps}: nothing is left to train",
                where="--resume, --max_train_steps, --max_train_epochs",
                remedy="Raise the number of steps or epochs.",
            )
        try:
            self._method.trained.load_state_dict(dict(state.tensors))
        except RuntimeError as error:
            raise UserError(
                f"the state does not fit what is trained: {_differences(state.tensors, self._method.trained)}",
                where=f"--resume {folder}",
                remedy="Continue with the rank, the number of vectors and the trained parts that the state was saved "
                "with.",
            ) from error
        restore(state, optimizer=self._optimizer, scheduler=self._schedule, scaler=self._scaler)
        self._resume_average(state)
        log.info("resuming at step %d from %s", state.step, folder.name)
        return state.step

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
            fingerprint=self._made_of,
        )


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
