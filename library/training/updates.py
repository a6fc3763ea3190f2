"""From gradients to new weights: after the backward pass, or within it."""

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Final, Protocol

import torch
from torch import Tensor

from library.errors import UserError
from library.randomness import key
from library.runtime import Runtime
from library.training.rounding import widened

log = logging.getLogger(__name__)

_PORTION: Final = 1 << 24
"""Values of weights in bf16 that are stepped at a time: the small ones of a network in one call or a few, and in less
memory than the largest weight of a whole model takes by itself (29.5 million values)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepFacts:
    """What a message about a step needs.

    Attributes:
        step: The step, from 0.
        loss: Its mean loss over all processes.
        images: Names the images of the step, made only for a message.
    """

    step: int
    loss: float
    images: object


class Update(Protocol):
    """How the gradients of a step change the weights.

    Attributes:
        has_begun: Weights have been changed by a step that is not finished; the loop takes it back.
        done: Steps after which the weights are as they are, as the loop says; 0 before the first of this part.
    """

    has_begun: bool
    done: int

    def watching(self, step: int) -> AbstractContextManager[None]:
        """Wraps the backward passes of ``step``."""

    def apply(self, facts: StepFacts) -> float:
        """Finish the step; returns the norm of the gradient, before it was scaled down.

        Raises:
            UserError: The loss or the gradient is not finite.
        """

    @property
    def was_skipped(self) -> bool:
        """Whether the last step was left out, and the weights are as they were."""


class WholeUpdate:
    """All weights at once, when the gradient of the step is complete.

    Args:
        optimizer: The optimizer, prepared by Accelerate.
        runtime: Processes and precision.
        max_grad_norm: Gradients are scaled down to this norm; 0 leaves them.
        coupled: The optimizer's step for a weight depends on the others, so that all are stepped together.
        skips: Leave out a step whose loss or gradient is not finite, instead of ending the run.
    """

    def __init__(
        self, optimizer: Any, runtime: Runtime, *, max_grad_norm: float, coupled: bool = False, skips: bool = False
    ) -> None:
        self._optimizer = optimizer
        self._coupled = coupled
        self._runtime = runtime
        self._skips = skips
        self.has_begun = False
        self.done = 0
        self.was_skipped = False
        self._limit = max_grad_norm if max_grad_norm > 0 else math.inf
        self._steps = ParameterSteps(raw_optimizer(optimizer), runtime.seed)

    def watching(self, step: int) -> AbstractContextManager[None]:
        """Nothing happens during the backward pass."""
        return nullcontext()

    def apply(self, facts: StepFacts) -> float:
        """Check, clip, step."""
        norm = float(self._runtime.accelerator.clip_grad_norm_(self._steps.parameters, self._limit))
        # An fp16 gradient may overflow: the scaler then skips the step and lowers its scale.
        checked = 0.0 if self._runtime.accelerator.scaler is not None else norm
        problem = _not_finite(facts, checked)
        if problem is not None and not self._skips:
            raise _stopped(facts, f"{problem}; the step was not made")
        self.was_skipped = problem is not None
        if problem is not None:
            self._leave_out(facts, problem)
        else:
            self._step(facts.step)
        self._optimizer.zero_grad(set_to_none=True)
        return norm

    def _step(self, step: int) -> None:
        self.has_begun = True
        if self._steps.has_narrow_weights and self._coupled:
            self._steps.make_together(step)
        elif self._steps.has_narrow_weights:
            self._steps.make_in_portions(step)
        else:
            self._optimizer.step()
            self.was_skipped = bool(self._optimizer.step_was_skipped)
            self.has_begun = not self.was_skipped

    def _leave_out(self, facts: StepFacts, problem: str) -> None:
        """Every process has the same loss and the same gradient, so all of them come here."""
        images = ", ".join(self._runtime.from_all(str(facts.images)))
        log.warning("%s; the step is left out; images: %s", problem, images)
        if self._runtime.accelerator.scaler is not None:
            # It has looked at the gradient, and waits to be told that the step is over.
            self._runtime.accelerator.scaler.update()


class FusedUpdate:
    """Each weight as soon as its gradient is complete, which is then freed: no more than one gradient is ever held.

    It fits optimizers that treat weights one by one, a single process, and a single micro-batch a step; and since a
    gradient is gone before the next is known, their common norm cannot be limited.

    Args:
        optimizer: The optimizer, prepared by Accelerate.
        seed: Seed of the run.
    """

    was_skipped = False

    def __init__(self, optimizer: Any, *, seed: int) -> None:
        self._optimizer = optimizer
        self._steps = ParameterSteps(raw_optimizer(optimizer), seed)
        self._squares: list[Tensor] = []
        self.has_begun = False
        self.done = 0

    @contextmanager
    def watching(self, step: int) -> Iterator[None]:
        """Update within the backward passes of the block."""
        self._squares = []
        handles = [
            parameter.register_post_accumulate_grad_hook(self._hook(number, step))  # type: ignore[no-untyped-call]
            for number, parameter in enumerate(self._steps.parameters)
            if parameter.requires_grad
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, number: int, step: int) -> Callable[[Tensor], None]:
        def update(parameter: Tensor) -> None:
            assert parameter.grad is not None, "the hook follows the gradient"
            square = parameter.grad.detach().float().pow(2).sum()
            self._squares.append(square)
            # A weight whose gradient is not finite keeps its value; the run ends after the pass.
            if math.isfinite(float(square)):
                self.has_begun = True
                self._steps.make(number, step)
            parameter.grad = None

        return update

    def apply(self, facts: StepFacts) -> float:
        """Check what has been done."""
        norm = float(torch.stack(self._squares).sum().sqrt()) if self._squares else 0.0
        problem = _not_finite(facts, norm)
        if problem is not None:
            raise _stopped(facts, f"{problem}; the step was made for the other weights only")
        self._optimizer.zero_grad(set_to_none=True)
        return norm


class ParameterSteps:
    """An optimizer's steps, for one or some parameters at a time.

    Args:
        optimizer: The optimizer; all but :meth:`make_together` ask that it treats parameters independently of each
            other.
        seed: Seed of the run.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, seed: int) -> None:
        self._optimizer = optimizer
        self._seed = seed
        self._group_of: list[dict[str, Any]] = [group for group in optimizer.param_groups for _ in group["params"]]
        self.parameters: Sequence[Tensor] = [
            parameter for group in optimizer.param_groups for parameter in group["params"]
        ]

    @property
    def has_narrow_weights(self) -> bool:
        """Whether trained weights are kept in bf16."""
        return any(parameter.dtype == torch.bfloat16 for parameter in self.parameters)

    def make(self, number: int, step: int) -> None:
        """Make ``step`` for the parameter at position ``number``, which has a gradient."""
        self._make([number], step)

    def make_in_portions(self, step: int) -> None:
        """Make ``step`` for all parameters: the result is that of one by one, with fewer calls."""
        for numbers in self._portions():
            self._make(numbers, step)

    def make_together(self, step: int) -> None:
        """Make ``step`` for all parameters at once, for an optimizer that looks at all of them."""
        with self._widened(range(len(self.parameters)), step):
            self._optimizer.step()

    def _portions(self) -> Iterator[list[int]]:
        """Positions of parameters with a gradient: neighbours in a group, up to a size."""
        portion: list[int] = []
        size = 0
        for number, parameter in enumerate(self.parameters):
            if parameter.grad is None:
                continue
            is_full = size + parameter.numel() > _PORTION
            if portion and (is_full or self._group_of[number] is not self._group_of[portion[0]]):
                yield portion
                portion, size = [], 0
            portion.append(number)
            size += parameter.numel()
        if portion:
            yield portion

    def _make(self, numbers: Sequence[int], step: int) -> None:
        """Make ``step`` for parameters of one group."""
        optimizer, group = self._optimizer, self._group_of[numbers[0]]
        groups, members = optimizer.param_groups, group["params"]
        with self._widened(numbers, step):
            try:
                group["params"], optimizer.param_groups = [self.parameters[number] for number in numbers], [group]
                optimizer.step()
            finally:
                group["params"], optimizer.param_groups = members, groups

    @contextmanager
    def _widened(self, numbers: Iterable[int], step: int) -> Iterator[None]:
        """Inside the block, those of the parameters that are in bf16 and have a gradient are in float32."""
        with ExitStack() as stack:
            for number in numbers:
                parameter = self.parameters[number]
                if parameter.grad is not None and parameter.dtype == torch.bfloat16:
                    generator = torch.Generator(parameter.device).manual_seed(key(self._seed, "rounding", step, number))
                    stack.enter_context(widened(parameter, self._optimizer.state[parameter], generator))
            yield


def raw_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """The optimizer inside the one that Accelerate has prepared."""
    inner: torch.optim.Optimizer = getattr(optimizer, "optimizer", optimizer)
    return inner


def _not_finite(facts: StepFacts, norm: float) -> str | None:
    """What is not finite, ``norm`` or the loss; None where both are."""
    if math.isfinite(facts.loss) and math.isfinite(norm):
        return None
    what = "gradient" if math.isfinite(facts.loss) else "loss"
    return f"the {what} is not finite at step {facts.step + 1} (loss {facts.loss}, gradient norm {norm})"


def _stopped(facts: StepFacts, what: str) -> UserError:
    return UserError(
        what,
        where=f"images: {facts.images}",
        remedy="Lower the learning rate, check these images, or use bf16 or fp32 instead of fp16; --on_nonfinite skip "
        "leaves such steps out. What was saved before is good.",
    )
