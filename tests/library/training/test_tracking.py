import importlib.util
import json
import math
import re
from pathlib import Path

import pytest

from library.training.options import LoggingOptions
from library.training.tracking import LossAverage, Tracker, check_logging
from tests.library.training.moments import moments

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "loss_recorder.json").read_text())["seq"]


def test_golden_loss_average():
    average = LossAverage()
    assert math.isnan(average.value)
    for entry in GOLDEN:
        average.add(step=entry["step"], loss=entry["loss"])
        assert average.value == pytest.approx(entry["avg"], rel=1e-12)


def test_loss_average_may_begin_within_an_epoch():
    average = LossAverage()
    for step, loss in ((2, 3.0), (3, 5.0), (0, 1.0)):
        average.add(step=step, loss=loss)
    assert average.value == pytest.approx(3.0)


def scalars(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder)).Reload()
    return {
        tag: [(event.step, pytest.approx(event.value, rel=1e-6)) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }, events


def test_tags_and_values(tmp_path):
    options = LoggingOptions(logging_dir=tmp_path, log_prefix="db_", log_config=True)
    config = {"learning_rate": 0.5, "output_dir": "/home/someone/out", "wandb_api_key": "secret"}
    with Tracker(options, tracker_name="network_train", config=config) as hook:
        for moment in moments(3, 2):
            moment.metrics["max_norm/keys_scaled"] = 4.0
            hook(moment)
    (folder,) = tmp_path.glob("*/*")
    assert hook.folder == folder
    assert folder.name == "network_train"
    assert re.fullmatch(r"db_20\d{12}", folder.parent.name)
    found, events = scalars(folder)
    assert found == {
        "loss/current": [(1, 1.0), (2, 1 / 2), (3, 1 / 3)],
        "loss/average": [(1, 2.0), (2, 1.0), (3, 2 / 3)],
        "lr/unet": [(1, 1e-3), (2, 1e-3), (3, 1e-3)],
        "lr/textencoder": [(1, 5e-4), (2, 5e-4), (3, 5e-4)],
        "max_norm/keys_scaled": [(1, 4.0), (2, 4.0), (3, 4.0)],
        "loss/epoch_average": [(1, 1.0), (2, 2 / 3)],
    }
    (tag,) = events.Tags()["tensors"]
    text = events.Tensors(tag)[0].tensor_proto.string_val[0].decode()
    assert '"learning_rate": 0.5' in text
    assert "someone" not in text
    assert "secret" not in text


def test_figures_survive_a_run_that_fails(tmp_path):
    def fail():
        with Tracker(LoggingOptions(logging_dir=tmp_path), tracker_name="x") as hook:
            hook(moments(1, 1)[0])
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    found, _ = scalars(next(tmp_path.glob("*/x")))
    assert "loss/current" in found


@pytest.mark.parametrize("is_main", [True, False])
def test_nothing_is_written_unless_asked(tmp_path, is_main):
    options = LoggingOptions() if is_main else LoggingOptions(logging_dir=tmp_path)
    with Tracker(options, tracker_name="x", is_main=is_main) as hook:
        hook(moments(1, 1)[0])
    assert hook.folder is None
    assert list(tmp_path.iterdir()) == []


def test_a_missing_package_names_the_install(tmp_path, monkeypatch):
    options = LoggingOptions(logging_dir=tmp_path)
    assert check_logging(options) == []
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    (problem,) = check_logging(options)
    assert str(problem.remedy).startswith("pip install tensorboard")
    assert check_logging(LoggingOptions()) == []
