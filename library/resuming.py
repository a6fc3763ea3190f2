"""Where a run is: what a state keeps of it, and how it is continued from one."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.errors import UserError
from library.runtime import Runtime
from library.training.method import TrainingMethod
from library.training.progress import RunLength
from library.training.states import TrainingState, fingerprint_differences, read_state, restore

if TYPE_CHECKING:
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
    """

    def __init__(
        self,
        method: TrainingMethod,
        optimizer: Any,
        schedule: "LRScheduler",
        runtime: Runtime,
        made_of: Mapping[str, object],
    ) -> None:
        self._method = method
        self._optimizer = optimizer
        self._schedule = schedule
        self._scaler = runtime.accelerator.scaler
        self._made_of = made_of

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
                f"the state does not fit what is trained: {str(error).splitlines()[-1].strip()}",
                where=f"--resume {folder}",
                remedy="Continue with the rank and the trained parts that the state was saved with.",
            ) from error
        restore(state, optimizer=self._optimizer, scheduler=self._schedule, scaler=self._scaler)
        log.info("resuming at step %d from %s", state.step, folder.name)
        return state.step

    def capture(self, step: int, epoch: int) -> TrainingState:
        """The state after ``step`` steps."""
        return TrainingState(
            step=step,
            epoch=epoch,
            tensors=self._method.trained.state_dict(),
            optimizer=self._optimizer.state_dict(),
            scheduler=self._schedule.state_dict(),
            scaler=self._scaler.state_dict() if self._scaler is not None else None,
            fingerprint=self._made_of,
        )
