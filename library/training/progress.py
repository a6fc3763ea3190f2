"""How long a run is, and where in it a finished step stands. Imports nothing heavy."""

from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True, slots=True)
class RunLength:
    """The length of a run in optimizer steps, to which epochs and ratios are converted once.

    Attributes:
        total_steps: Optimizer steps of the whole run.
        steps_per_epoch: Optimizer steps of a full epoch; the last epoch of a run may be shorter.
    """

    total_steps: int
    steps_per_epoch: int

    @classmethod
    def of(cls, *, max_train_steps: int, max_train_epochs: int | None, steps_per_epoch: int) -> "RunLength":
        """The length that the options ask for; epochs win over steps."""
        total = max_train_steps if max_train_epochs is None else max_train_epochs * steps_per_epoch
        return cls(total_steps=total, steps_per_epoch=steps_per_epoch)

    @property
    def epochs(self) -> int:
        """Number of epochs begun."""
        return -(-self.total_steps // self.steps_per_epoch)

    def epoch_of(self, step: int) -> int:
        """The epoch, from 1, that the optimizer step with the index ``step``, from 0, belongs to."""
        return step // self.steps_per_epoch + 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Moment:
    """A finished optimizer step, as hooks see it.

    Attributes:
        step: Number of finished steps, at least 1.
        epoch: The epoch, from 1, the step belonged to.
        epoch_ended: The step was the last of its epoch.
        finished: The step was the last of the run.
        loss: Mean loss over the examples of the step, all processes included.
        average_loss: Mean over the latest loss of each step of an epoch.
        learning_rates: The rate the step used, by the name of the parameter group.
        metrics: Further figures to log, by tag.
        interrupted: The run was asked to stop and ends with this step.
        save_requested: The run was asked to save now.
        skipped: Loss or gradient was not finite, and the weights stayed as they were.
    """

    step: int
    epoch: int
    epoch_ended: bool
    finished: bool
    loss: float
    average_loss: float
    learning_rates: dict[str, float]
    metrics: dict[str, float] = field(default_factory=dict)
    interrupted: bool = False
    save_requested: bool = False
    skipped: bool = False
