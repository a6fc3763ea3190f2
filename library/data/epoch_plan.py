"""The order of training as a pure function: which examples form each optimizer step of each epoch, for every process.

Every epoch lists each example exactly once. The order depends on the seed, the epoch and the buckets alone, so loader
workers, previews and resuming cannot change it; and N processes, or N accumulated micro-batches, of batch size B train
on the same sets as one of batch size N*B wherever the buckets fill whole groups.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from library.randomness import KeyPart, python_random

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class PlanBucket:
    """Examples that may share a batch.

    Attributes:
        examples: Numbers of the examples (image x repeat), at least one.
        batch_size: Examples in a batch of one process.
    """

    examples: tuple[int, ...]
    batch_size: int

    @property
    def batches(self) -> int:
        """Batches in an epoch; the last may be short."""
        return -(-len(self.examples) // self.batch_size)


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """What one process computes at once; all that a loader worker is told.

    Attributes:
        epoch: From 1.
        step: The optimizer step it belongs to, counted from 0 over the whole run.
        examples: Numbers of the examples.
        is_padding: It only keeps this process in step with the others and must weigh nothing.
    """

    epoch: int
    step: int
    examples: tuple[int, ...]
    is_padding: bool = False


@dataclass(frozen=True, slots=True)
class Step:
    """One optimizer step over all processes.

    Attributes:
        micro_batches: At least one; number j runs on process ``j % world`` as its micro-batch ``j // world``.
        size: Number of examples in it.
    """

    micro_batches: tuple[MicroBatch, ...]
    size: int


class EpochPlan:
    """The steps of every epoch.

    Per bucket the examples are shuffled and cut into batches, and the batches into groups that fill one step. What is
    left of all buckets is pooled into further groups, the last of which may be short; then the groups are shuffled.
    """

    def __init__(self, buckets: Sequence[PlanBucket], seed: int, accumulation: int, world: int) -> None:
        """Plan for ``buckets``.

        Args:
            buckets: Buckets that share no example, in an order that does not change between runs.
            seed: Seed of the run.
            accumulation: Micro-batches of each process in a step, at least 1.
            world: Number of processes, at least 1.
        """
        assert accumulation >= 1, "a step needs a micro-batch"
        assert world >= 1, "a run needs a process"
        assert buckets, "a plan needs examples"
        assert all(bucket.examples and bucket.batch_size >= 1 for bucket in buckets), "no empty buckets or batches"
        self._buckets = tuple(buckets)
        self._seed = seed
        self._world = world
        self._group_size = accumulation * world
        self._latest: dict[int, tuple[Step, ...]] = {}

    @property
    def batches_per_epoch(self) -> int:
        """Micro-batches in an epoch over all processes, padding not counted."""
        return sum(bucket.batches for bucket in self._buckets)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in an epoch."""
        return -(-self.batches_per_epoch // self._group_size)

    def epoch_of(self, step: int) -> int:
        """The epoch, from 1, of the optimizer step ``step``, from 0."""
        return step // self.steps_per_epoch + 1

    def epoch(self, epoch: int) -> tuple[Step, ...]:
        """The steps of ``epoch`` (from 1), in order."""
        if epoch not in self._latest:
            # Whoever asks for one step of an epoch asks for the next one too; a loader that works ahead is in the
            # next epoch while the loop is still in this one.
            while len(self._latest) > 1:
                del self._latest[min(self._latest)]
            self._latest[epoch] = self._planned(epoch)
        return self._latest[epoch]

    def step_size(self, step: int) -> int:
        """Number of examples in the optimizer step ``step`` (from 0) over all processes."""
        return self._step(step).size

    def slots(self, step: int) -> int:
        """Number of micro-batches, padding included, that each process runs in the optimizer step ``step`` (from 0)."""
        return -(-len(self._step(step).micro_batches) // self._world)

    def micro_batches(self, start_step: int, end_step: int, rank: int) -> Iterator[MicroBatch]:
        """What process ``rank`` runs from ``start_step`` up to, without, ``end_step``, in order.

        Where the last micro-batch of a step exists for some processes only, the others get the step's first one
        as padding, so that all processes run equally many.
        """
        assert 0 <= rank < self._world, "no such process"
        for step in range(start_step, end_step):
            batches = self._step(step).micro_batches
            for position in range(rank, rank + self.slots(step) * self._world, self._world):
                if position < len(batches):
                    yield batches[position]
                else:
                    yield replace(batches[0], is_padding=True)

    def _step(self, step: int) -> Step:
        return self.epoch(self.epoch_of(step))[step % self.steps_per_epoch]

    def _planned(self, epoch: int) -> tuple[Step, ...]:
        size = self._group_size
        groups: list[Sequence[tuple[int, ...]]] = []
        rest: list[tuple[int, ...]] = []
        for number, bucket in enumerate(self._buckets):
            examples = self._shuffled(bucket.examples, epoch, number)
            batches = [tuple(batch) for batch in _cut(examples, bucket.batch_size)]
            full = len(batches) // size * size
            groups += _cut(batches[:full], size)
            rest += batches[full:]
        groups += _cut(self._shuffled(rest, epoch, "rest"), size)
        first_step = (epoch - 1) * self.steps_per_epoch
        return tuple(
            Step(
                tuple(MicroBatch(epoch, first_step + position, batch) for batch in group),
                sum(len(batch) for batch in group),
            )
            for position, group in enumerate(self._shuffled(groups, epoch))
        )

    def _shuffled(self, items: Sequence[T], epoch: int, *purpose: KeyPart) -> list[T]:
        order = list(items)
        python_random(self._seed, "order", epoch, *purpose).shuffle(order)
        return order


def _cut(items: Sequence[T], length: int) -> list[Sequence[T]]:
    return [items[start : start + length] for start in range(0, len(items), length)]
