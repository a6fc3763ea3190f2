"""Curves as charts for a page: axes with round numbers and polylines, in the coordinates of an SVG."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from library.training.history import Curve
from library.wording import named

WIDTH: Final = 720
HEIGHT: Final = 230
LEFT: Final = 64
RIGHT: Final = 12
TOP: Final = 12
BOTTOM: Final = 28
_TICKS: Final = 5
_MOST_LINES: Final = 8
_MOST_NAMES: Final = 3
_OUTLIERS: Final = 0.02
"""Part of the values of a noisy curve, at each end, that may lie outside of the chart."""

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """One curve.

    Attributes:
        name: Its name in the legend.
        points: Steps and values.
        noisy: It is drawn thin, and its outliers may lie outside of the chart.
    """

    name: str
    points: Points
    noisy: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Drawn:
    """A line in the coordinates of the chart.

    Attributes:
        name: Its name in the legend.
        noisy: It is drawn thin.
        path: ``x,y`` pairs as the ``points`` of an SVG polyline takes them.
        steps: The step of each point.
        values: The value of each point.
        dot: The only point, where there is just one.
    """

    name: str
    noisy: bool
    path: str
    steps: str
    values: str
    dot: tuple[float, float] | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Chart:
    """A chart.

    Attributes:
        title: What it shows.
        note: How to read it, or "".
        lines: Its curves.
        x_ticks: Positions and labels of the steps.
        y_ticks: Positions and labels of the values.
    """

    title: str
    note: str
    lines: tuple[Drawn, ...]
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]


def charts(curves: Mapping[str, Curve]) -> list[Chart]:
    """The charts of a run, from curves by the tags of the log; one for each thing that was logged."""
    points = {tag: curve.points for tag, curve in curves.items()}
    left = {tag: line for tag, line in points.items() if line and not tag.startswith(("memory/",))}

    def take(tags: Iterable[str]) -> dict[str, Points]:
        return {tag: left.pop(tag) for tag in list(tags) if tag in left}

    # The same again under other names.
    take(("loss", "lr", "speed/seconds_per_step"))
    loss = take(("loss/current", "loss/average", "loss/validation/step_average", "loss/validation_ema/step_average"))
    take([tag for tag in left if tag.endswith("/step_divergence")])
    by_timestep = take([tag for tag in left if tag.startswith("loss/validation/t")])
    take([tag for tag in left if tag.startswith("loss/validation_ema/t")])
    adapted = take([tag for tag in left if tag.startswith("lr/d*lr")])
    rates = take([tag for tag in left if tag.startswith("lr/")])
    found = [
        chart("Loss", _loss_lines(loss), note="Thin: each step. Bold: mean over an epoch."),
        chart("Validation loss by timestep", _lines(by_timestep, "loss/validation/")),
        chart("Learning rate", _merged(_lines(rates, "lr/"))),
        chart("Learning rate times the optimizer's own estimate", _merged(_lines(adapted, "lr/d*lr/"))),
    ]
    titles = {"gradient_norm": "Gradient norm", "speed/images_per_second": "Images a second"}
    for tag, title in titles.items():
        found.append(chart(title, [Line(name=title, points=line, noisy=True) for line in take([tag]).values()]))
    found += [chart(tag, [Line(name=tag, points=line)]) for tag, line in left.items()]
    return [one for one in found if one is not None]


def _loss_lines(loss: Mapping[str, Points]) -> list[Line]:
    names = {
        "loss/current": "loss",
        "loss/average": "average",
        "loss/validation/step_average": "validation",
        "loss/validation_ema/step_average": "validation of the average of the weights",
    }
    return [
        Line(name=names[tag], points=line, noisy=tag == "loss/current") for tag, line in loss.items() if tag in names
    ]


def _lines(curves: Mapping[str, Points], prefix: str) -> list[Line]:
    return [Line(name=tag.removeprefix(prefix), points=points) for tag, points in curves.items()]


def _merged(lines: Sequence[Line]) -> list[Line]:
    """Lines that lie upon each other as one, with all their names."""
    together: dict[tuple[tuple[float, float], ...], list[str]] = {}
    for line in lines:
        together.setdefault(tuple(line.points), []).append(line.name)
    return [Line(name=named(names, _MOST_NAMES), points=points) for points, names in together.items()]


def chart(title: str, lines: Sequence[Line], *, note: str = "") -> Chart | None:
    """A chart of ``lines``, of the first eight if there are more; None without any point."""
    shown = [line for line in lines if line.points][:_MOST_LINES]
    if not shown:
        return None
    if len(shown) < len(lines):
        note = f"{note} The first {len(shown)} of {len(lines)} curves.".strip()
    steps = [step for line in shown for step, _ in line.points]
    values = [value for line in shown for value in _decisive(line)]
    xs = _Axis(min(steps), max(steps), LEFT, WIDTH - RIGHT)
    ys = _Axis(*_with_margin(min(values), max(values)), HEIGHT - BOTTOM, TOP)
    x_ticks = [tick for tick in _ticks(xs.low, xs.high) if abs(tick - round(tick)) < 1e-9]
    return Chart(
        title=title,
        note=note,
        lines=tuple(_drawn(line, xs, ys) for line in shown),
        x_ticks=tuple((xs.at(tick), f"{tick:,.0f}") for tick in x_ticks),
        y_ticks=tuple((ys.at(tick), f"{tick:.4g}") for tick in _ticks(ys.low, ys.high)),
    )


def _decisive(line: Line) -> list[float]:
    """The values that decide how far the axis goes."""
    values = sorted(value for _, value in line.points)
    cut = int(len(values) * _OUTLIERS) if line.noisy else 0
    return values[cut : len(values) - cut]


def _with_margin(low: float, high: float) -> tuple[float, float]:
    """The range with some air; down to 0 where that is near."""
    if low >= 0 and low < 0.5 * high:
        return 0.0, high * 1.05
    margin = 0.08 * (high - low) or abs(high) * 0.1 or 1.0
    return low - margin, high + margin


@dataclass(frozen=True, slots=True)
class _Axis:
    """Values from ``low`` to ``high`` at positions from ``start`` to ``end``."""

    low: float
    high: float
    start: float
    end: float

    def at(self, value: float) -> float:
        if self.high == self.low:
            return round((self.start + self.end) / 2, 1)
        return round(self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start), 1)


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers within the range, about five."""
    if high <= low:
        return [low]
    rough = (high - low) / _TICKS
    power = 10.0 ** math.floor(math.log10(rough))
    distance = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    first = math.ceil(low / distance - 1e-9)
    last = math.floor(high / distance + 1e-9)
    return [number * distance for number in range(first, last + 1)]


def _drawn(line: Line, xs: _Axis, ys: _Axis) -> Drawn:
    places = [(xs.at(step), ys.at(value)) for step, value in line.points]
    return Drawn(
        name=line.name,
        noisy=line.noisy,
        path=" ".join(f"{x:g},{y:g}" for x, y in places),
        steps=" ".join(f"{step:.0f}" for step, _ in line.points),
        values=" ".join(f"{value:.4g}" for _, value in line.points),
        dot=places[0] if len(places) == 1 else None,
    )
