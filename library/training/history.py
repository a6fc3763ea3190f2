"""What a run has logged so far, kept small: curves with a bounded number of points, and small previews."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from library.training.preview_grid import PreviewGrid
from library.training.prompt_files import PreviewPrompt

if TYPE_CHECKING:
    from PIL.Image import Image

MOST_POINTS: Final = 600

_BY_EPOCH: Final = ("/epoch", "/epoch_average", "/epoch_divergence")


class Curve:
    """Values over the steps; where there are many, each point is the mean of several neighbours.

    Memory does not grow with the run: whenever there are :data:`MOST_POINTS` points, neighbours become one.
    """

    def __init__(self) -> None:
        self._points: list[tuple[float, float]] = []
        self._width = 1
        self._open: list[tuple[float, float]] = []

    def add(self, step: int, value: float) -> None:
        """Take in the value after ``step`` steps; one that is not finite leaves a gap."""
        if not math.isfinite(value):
            return
        self._open.append((step, value))
        if len(self._open) < self._width:
            return
        self._points.append(_mean(self._open))
        self._open = []
        if len(self._points) >= MOST_POINTS:
            pairs = zip(self._points[::2], self._points[1::2], strict=True)
            self._points = [_mean(pair) for pair in pairs]
            self._width *= 2

    def state_dict(self) -> dict[str, Any]:
        """What :meth:`load_state_dict` goes on with."""
        return {"points": self._points, "width": self._width, "open": self._open}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state`` was taken."""
        self._points, self._open = ([(float(at), float(y)) for at, y in state[name]] for name in ("points", "open"))
        self._width = int(state["width"])

    @property
    def points(self) -> list[tuple[float, float]]:
        """Steps and values, in order."""
        return [*self._points, *([_mean(self._open)] if self._open else [])]


def _mean(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """The mean point: one straight line through the points stays that line."""
    return math.fsum(step for step, _ in points) / len(points), math.fsum(value for _, value in points) / len(points)


class RunHistory:
    """Curves by tag, and the previews; a place to log to, see :class:`library.training.log_targets.LogTarget`.

    Args:
        prompts: The prompts of the previews.
    """

    name = "the report"

    def __init__(self, prompts: Sequence[PreviewPrompt]) -> None:
        self.curves: dict[str, Curve] = {}
        self.previews = PreviewGrid(prompts)
        self.step = 0

    def state_dict(self) -> dict[str, Any]:
        """The curves, for :meth:`load_state_dict`."""
        return {tag: curve.state_dict() for tag, curve in self.curves.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with the curves that ``state`` holds."""
        for tag, points in state.items():
            self.curves.setdefault(tag, Curve()).load_state_dict(points)

    def add(self, figures: Mapping[str, float], *, at: int, step: int) -> None:
        """Take in figures; those over epochs repeat what is known over steps."""
        self.step = step
        for tag, value in figures.items():
            if not tag.endswith(_BY_EPOCH):
                self.curves.setdefault(tag, Curve()).add(at, value)

    def add_image(self, number: int, image: "Image", *, prompt: str, step: int) -> None:
        """Take in a preview."""
        self.previews.add(number, image, step)

    def flush(self) -> None:
        """Nothing is written before the end."""

    def close(self, *, failed: bool) -> None:
        """Nothing is left to write."""
