import json

import pytest

from library.training.charts import HEIGHT, WIDTH, Line, chart, charts
from library.training.history import MOST_POINTS, Curve, RunHistory


def test_short_curves_are_kept_as_they_are():
    curve = Curve()
    for step in range(1, 5):
        curve.add(step, step / 2)
    assert curve.points == [(1, 0.5), (2, 1.0), (3, 1.5), (4, 2.0)]


def test_a_long_curve_keeps_its_course_and_its_size():
    curve = Curve()
    for step in range(1, 100_001):
        curve.add(step, 3.0 * step + 1)
    assert len(curve.points) <= MOST_POINTS
    for step, value in curve.points:
        assert value == pytest.approx(3.0 * step + 1)
    assert curve.points[-1][0] > 99_700


def test_what_is_not_finite_leaves_a_gap():
    curve = Curve()
    for step, value in enumerate((1.0, float("nan"), float("inf"), 2.0), 1):
        curve.add(step, value)
    assert curve.points == [(1, 1.0), (4, 2.0)]


def test_figures_over_epochs_are_left_out():
    history = RunHistory(())
    history.add({"loss/current": 0.5, "loss/epoch_average": 0.5, "loss/epoch": 0.5}, at=1, step=8)
    assert set(history.curves) == {"loss/current"}
    assert history.step == 8


def test_a_history_goes_on_as_if_it_had_not_been_broken_off():
    whole, first = RunHistory(()), RunHistory(())
    for step in range(1, 4001):
        (whole if step > 2001 else first).add({"loss/current": 1 / step}, at=step, step=step)
        if step == 2001:
            # Through a file.
            whole.load_state_dict(json.loads(json.dumps(first.state_dict())))
    straight = RunHistory(())
    for step in range(1, 4001):
        straight.add({"loss/current": 1 / step}, at=step, step=step)
    assert whole.curves["loss/current"].points == straight.curves["loss/current"].points


def curves(**values):
    found = {}
    for tag, points in values.items():
        curve = found.setdefault(tag.replace("__", "/"), Curve())
        for step, value in enumerate(points, 1):
            curve.add(step, value)
    return found


def test_charts_of_a_run():
    found = charts(
        curves(
            loss__current=[3, 2, 1],
            loss__average=[3, 2.5, 2],
            loss=[3, 2, 1],
            lr__unet=[1e-4, 1e-4, 5e-5],
            lr__textencoder=[1e-4, 1e-4, 5e-5],
            lr__other=[1e-5, 1e-5, 1e-5],
            gradient_norm=[1, 2, 3],
            max_norm__keys_scaled=[0, 0, 4],
            memory__peak_ram_gb=[1, 1, 1],
        )
    )
    assert {one.title: [line.name for line in one.lines] for one in found} == {
        "Loss": ["loss", "average"],
        "Learning rate": ["unet, textencoder", "other"],
        "Gradient norm": ["Gradient norm"],
        "max_norm/keys_scaled": ["max_norm/keys_scaled"],
    }


def test_points_of_a_chart_are_where_its_axes_say():
    one = chart("x", [Line(name="a", points=[(0, 0.0), (100, 50.0), (200, 100.0)])])
    assert [label for _, label in one.y_ticks] == ["0", "25", "50", "75", "100"]
    assert [label for _, label in one.x_ticks] == ["0", "50", "100", "150", "200"]
    places = [tuple(map(float, pair.split(","))) for pair in one.lines[0].path.split()]
    x_at, y_at = ({label: at for at, label in ticks} for ticks in (one.x_ticks, one.y_ticks))
    assert places == [(x_at["0"], y_at["0"]), (x_at["100"], y_at["50"]), (x_at["200"], y_at["100"])]
    assert all(0 <= x <= WIDTH and 0 <= y <= HEIGHT for x, y in places)


def test_an_outlier_does_not_flatten_a_noisy_curve():
    points = [(step, 1.0 + step % 7 / 10) for step in range(200)]
    points[50] = (50, 1e9)
    one = chart("x", [Line(name="a", points=points, noisy=True)])
    assert all(float(label) < 10 for _, label in one.y_ticks)


@pytest.mark.parametrize("value", [0.0, -2.0, 1e-9, 4e12])
def test_one_point_is_a_chart(value):
    one = chart("x", [Line(name="a", points=[(7, value)])])
    assert one.lines[0].dot is not None
    assert one.y_ticks


def test_nothing_is_no_chart():
    assert chart("x", [Line(name="a", points=[])]) is None
    assert charts({}) == []


def test_more_curves_than_colours_are_told():
    lines = [Line(name=str(number), points=[(1, float(number))]) for number in range(11)]
    one = chart("x", lines)
    assert len(one.lines) == 8
    assert one.note == "The first 8 of 11 curves."
