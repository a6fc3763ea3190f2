"""Several processes of one tool (``torchrun``, ``accelerate launch``): who takes which images, and what they tell."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from library.runtime import Runtime, start_runtime
from library.runtime_options import RuntimeOptions

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class Processes:
    """This process among those of a run.

    Attributes:
        rank: Its number, from 0.
        world: How many there are.
        runtime: What connects them; None where there is only this one.
    """

    rank: int = 0
    world: int = 1
    runtime: Runtime | None = None

    @classmethod
    def of(cls, runtime: Runtime) -> "Processes":
        """The processes of ``runtime``."""
        return cls(rank=runtime.rank, world=runtime.world, runtime=runtime)

    @property
    def is_main(self) -> bool:
        """Whether this process speaks for all."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> list[T]:
        """Every ``world``-th of ``items``, each in exactly one process."""
        return list(items[self.rank :: self.world])

    def wait(self) -> None:
        """Wait until every process is here."""
        if self.world > 1:
            assert self.runtime is not None, "several processes are connected"
            self.runtime.accelerator.wait_for_everyone()

    def gather(self, items: list[T]) -> list[T]:
        """The ``items`` of all processes, in the order of their numbers."""
        if self.world == 1:
            return items
        from accelerate.utils import gather_object

        gathered: list[T] = gather_object(items)
        return gathered


def start_torch() -> Runtime:
    """A device and the other processes, for a tool whose model runs in torch."""
    # Nothing is drawn from the run's seed, so none need be agreed on.
    return start_runtime(RuntimeOptions(seed=0), find_unused_parameters=False)


def start_processes() -> Processes:
    """The processes of a tool that needs torch only where there are several."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Processes()
    return Processes.of(start_torch())
