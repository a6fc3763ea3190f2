"""How fast a run is and how much memory it takes, as figures to log."""

import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from library.training.progress import Moment

_GIGA: Final = 1e9


class Speed:
    """Measures the time of steps alone: what hooks do in between does not count.

    Args:
        images_of: Number of images, over all processes, of the step with a given index from 0.
        clock: Seconds; for tests.
    """

    def __init__(self, images_of: Callable[[int], int], *, clock: Callable[[], float] = time.monotonic) -> None:
        self._images_of = images_of
        self._clock = clock
        self._since = clock()
        self.images = 0
        self.seconds = 0.0

    def stop(self, moment: "Moment") -> dict[str, float]:
        """The step of ``moment`` is done: its figures by tag."""
        seconds = self._clock() - self._since
        images = self._images_of(moment.step - 1)
        self.images += images
        self.seconds += seconds
        # A clock that is too coarse for the step must not divide by zero.
        return {"speed/images_per_second": images / max(seconds, 1e-6), "speed/seconds_per_step": seconds}

    def start(self, _: "Moment | None" = None) -> None:
        """The next step begins now; the last of the hooks."""
        self._since = self._clock()

    @property
    def images_per_second(self) -> float:
        """Mean over all steps; 0 before the first."""
        return self.images / self.seconds if self.seconds else 0.0


def memory_figures() -> dict[str, float]:
    """The most memory this process has had so far, in GB (10^9 bytes), by tag."""
    figures = {"memory/peak_ram_gb": _peak_resident() / _GIGA}
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        figures["memory/peak_gpu_gb"] = torch.cuda.max_memory_allocated() / _GIGA
    return figures


def _peak_resident() -> float:
    """Bytes."""
    if sys.platform == "win32":
        import psutil

        return float(psutil.Process().memory_info().peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # In bytes on macOS, in KiB elsewhere.
    return float(peak if sys.platform == "darwin" else peak * 1024)
