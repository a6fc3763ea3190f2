import importlib.util
import shutil
import subprocess
import sys
import time
import types

import pytest
from PIL import Image

from library.errors import UserError
from library.training.log_targets import check_logging, tracker_settings
from library.training.options import LoggingOptions
from library.training.prompt_files import PreviewPrompt
from library.training.tracking import Tracker
from tests.library.training.moments import moments
from tests.library.training.test_tracking import scalars

PROMPT = PreviewPrompt(prompt="a <b>cat</b>", index=1)


class StandIn(types.ModuleType):
    """Takes what the real package takes, and remembers it; ``fails`` names a call that fails."""

    def __init__(self, fails=None):
        super().__init__("wandb")
        self.fails = fails
        self.calls = []

    def login(self, *, key):
        self._call("login", key)

    def init(self, **arguments):
        self._call("init", arguments)
        return self

    def log(self, figures, *, step):
        self._call("log", (figures, step))

    def finish(self, *, exit_code):
        self._call("finish", exit_code)

    def Image(self, image, *, caption):  # noqa: N802
        return ("image", image.size, caption)

    def _call(self, name, what):
        self.calls.append((name, what))
        if name == self.fails:
            raise RuntimeError("the key k3y is not welcome")

    def of(self, name):
        return [what for called, what in self.calls if called == name]


@pytest.fixture
def wandb(monkeypatch):
    module = StandIn()
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def run(options, *, name="network_train", config=None):
    with Tracker(options, tracker_name=name, config=config) as tracker:
        for moment in moments(3, 2):
            tracker(moment)
        tracker.add({"loss/validation/epoch_average": 0.5}, at=1)
        tracker.add_image(PROMPT, Image.new("RGB", (8, 4)), 3)
    return tracker


def test_wandb_gets_figures_at_steps_alone(wandb, tmp_path):
    config = {"learning_rate": 0.5, "output_dir": "/home/someone/out", "wandb_api_key": "k3y"}
    options = LoggingOptions(
        log_with="wandb",
        logging_dir=tmp_path,
        wandb_run_name="first",
        wandb_api_key="k3y",
        log_tracker_name="dogs",
        log_config=True,
    )
    run(options, config=config)
    assert wandb.of("login") == ["k3y"]
    (arguments,) = wandb.of("init")
    assert arguments["project"] == "dogs"
    assert arguments["name"] == "first"
    assert arguments["config"] == {"learning_rate": 0.5, "output_dir": "out"}
    assert arguments["dir"].startswith(str(tmp_path))
    logged = wandb.of("log")
    # Its steps may never go back: what belongs to epochs is logged at the step they end with.
    assert [step for _, step in logged] == [1, 2, 2, 3, 3, 3, 3]
    assert logged[0][0]["loss/current"] == 1.0
    assert logged[2][0] == {"loss/epoch_average": 1.0}
    assert logged[-1][0] == {"sample_1": ("image", (8, 4), "a <b>cat</b>")}
    assert wandb.of("finish") == [0]
    assert not list(tmp_path.rglob("events*"))


def test_all_logs_to_both(wandb, tmp_path):
    run(LoggingOptions(log_with="all", logging_dir=tmp_path))
    assert wandb.of("log")
    assert len(list(tmp_path.rglob("events*"))) == 1


def test_a_run_that_fails_is_marked_as_failed(wandb):
    def fail():
        with Tracker(LoggingOptions(log_with="wandb"), tracker_name="x"):
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert wandb.of("finish") == [1]


def test_settings_of_both_loggers(wandb, tmp_path):
    path = tmp_path / "trackers.toml"
    path.write_text('[wandb]\nname = "in the file"\nentity = "team"\ntags = ["a"]\n[tensorboard]\nflush_secs = 3\n')
    run(LoggingOptions(log_with="wandb", log_tracker_config=path))
    assert wandb.of("init")[0] == {"project": "network_train", "name": "in the file", "entity": "team", "tags": ["a"]}
    settings = tracker_settings(LoggingOptions(log_tracker_config=path, wandb_run_name="given"))
    assert settings["wandb"]["name"] == "given"
    run(LoggingOptions(logging_dir=tmp_path / "log", log_tracker_config=path))
    assert list(tmp_path.rglob("events*"))


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ("[wandbb]\nname = 'x'\n", "no section [wandbb]"),
        ("name = 'x'\n", "no section [name]"),
        ("[tensorboard]\nflush_sec = 3\n", "no setting flush_sec"),
        ("[tensorboard]\nflush_secs = 'abc'\n", "flush_secs of [tensorboard] expects a number, not 'abc'"),
        ("[tensorboard]\nmax_queue = 'x'\n", "max_queue of [tensorboard] expects a whole number"),
        ("[tensorboard]\nmax_queue = true\n", "max_queue of [tensorboard] expects a whole number"),
        ("[tensorboard]\nfilename_suffix = 3\n", "filename_suffix of [tensorboard] expects text"),
        ("[wandb\n", "not valid TOML"),
    ],
)
def test_a_wrong_settings_file_is_refused(tmp_path, content, what):
    path = tmp_path / "trackers.toml"
    path.write_text(content)
    (problem,) = check_logging(LoggingOptions(log_with="tensorboard", logging_dir=tmp_path, log_tracker_config=path))
    assert what in problem.what


def test_a_missing_settings_file_is_refused(tmp_path):
    options = LoggingOptions(logging_dir=tmp_path, log_tracker_config=tmp_path / "none.toml")
    (problem,) = check_logging(options)
    assert "cannot be read" in problem.what


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    (problem,) = check_logging(LoggingOptions(log_with="wandb"))
    assert str(problem.remedy).startswith("pip install wandb")


def test_a_log_folder_that_is_a_file_is_refused(tmp_path):
    path = tmp_path / "log"
    path.write_text("")
    (problem,) = check_logging(LoggingOptions(logging_dir=path))
    assert "is a file" in problem.what


@pytest.mark.parametrize("fails", ["login", "init"])
def test_a_log_that_cannot_begin_says_why_without_the_key(monkeypatch, fails):
    monkeypatch.setitem(sys.modules, "wandb", StandIn(fails))
    with pytest.raises(UserError, match="cannot be logged to") as raised:
        Tracker(LoggingOptions(log_with="wandb", wandb_api_key="k3y"), tracker_name="x")
    assert "k3y" not in str(raised.value)
    assert "wandb login" in str(raised.value)


def test_a_log_that_fails_is_given_up_with_one_warning(monkeypatch, tmp_path, caplog):
    monkeypatch.setitem(sys.modules, "wandb", StandIn("log"))
    tracker = run(LoggingOptions(log_with="all", logging_dir=tmp_path))
    warnings = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert [text.partition(":")[0] for text in warnings] == [
        "nothing more is logged to Weights & Biases, and the run goes on",
        "the log in Weights & Biases ends after step 1",
    ]
    found, _ = scalars(tracker.folder)
    assert len(found["loss/current"]) == 3


def until_written(tracker, *, fails=False):
    """Wait for the thread that writes: until it has nothing left to do, or has failed."""
    for target in tracker._targets:
        if fails:
            target._thread.join(10)
        while target._thread.is_alive() and not target._waiting.empty():
            time.sleep(0.01)


def assert_given_up(caplog, reason, *, step):
    assert [record.message for record in caplog.records if record.levelname == "WARNING"] == [
        f"nothing more is logged to TensorBoard, and the run goes on: {reason}",
        f"the log in TensorBoard ends after step {step}: {reason}",
    ]


def test_a_log_folder_that_disappears_is_told_once(tmp_path, caplog):
    with Tracker(LoggingOptions(logging_dir=tmp_path / "log"), tracker_name="x") as tracker:
        first, second, third = moments(3, 3)
        tracker(first)
        until_written(tracker)
        shutil.rmtree(tmp_path / "log")
        tracker(second)
        until_written(tracker, fails=True)
        tracker(third)
    assert_given_up(caplog, "its folder is gone", step=3)
    assert not (tmp_path / "log").exists()


def test_a_full_disk_is_told_once(tmp_path, caplog, monkeypatch):
    with Tracker(LoggingOptions(logging_dir=tmp_path), tracker_name="x") as tracker:
        writer = tracker._targets[0]._target._writer

        def full(*_, **__):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(writer, "add_scalar", full)
        monkeypatch.setattr(writer, "close", full)
        for moment in moments(3, 3):
            tracker(moment)
            until_written(tracker, fails=True)
    assert_given_up(caplog, "No space left on device", step=2)


@pytest.mark.skipif(sys.platform == "win32", reason="files have no limit there")
def test_a_file_that_cannot_grow_ends_nothing(tmp_path):
    """In a process of its own, whose files may not grow: the writing thread of TensorBoard then fails."""
    code = f"""
import logging, resource, threading
from pathlib import Path
logging.basicConfig()
from library.training.options import LoggingOptions
from library.training.tracking import Tracker
from tests.library.training.moments import moments
hook = threading.excepthook
with Tracker(LoggingOptions(logging_dir=Path({str(tmp_path)!r})), tracker_name="x") as tracker:
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
    # Fewer than wait for a slow disk.
    for moment in moments(1500, 1500):
        tracker(moment)
assert threading.excepthook is hook
print("went on")
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout == "went on\n"
    assert "Traceback" not in ended.stderr
    assert ended.stderr.count("File too large") in (1, 2)
    assert "TensorBoard" in ended.stderr


def test_previews_are_pictures_in_tensorboard(tmp_path):
    tracker = run(LoggingOptions(logging_dir=tmp_path))
    _, events = scalars(tracker.folder)
    assert events.Tags()["images"] == ["sample/01"]
    (image,) = events.Images("sample/01")
    assert (image.step, image.width, image.height) == (3, 8, 4)


@pytest.mark.parametrize(
    ("script", "tags"),
    [
        ("dreambooth", {"loss", "loss/epoch"}),
        ("finetuning", {"loss", "loss/epoch"}),
        ("textual_inversion", {"loss", "loss/epoch", "lr"}),
        ("network_train", set()),
    ],
)
def test_tags_that_dashboards_know(tmp_path, script, tags):
    tracker = run(LoggingOptions(logging_dir=tmp_path, log_tracker_name="mine"), name=script)
    found, _ = scalars(tracker.folder)
    everywhere = {"loss/current", "loss/average", "lr/unet", "lr/textencoder", "loss/epoch_average"}
    assert set(found) == everywhere | tags | {"loss/validation/epoch_average"}
    if "loss" in tags:
        assert found["loss"] == found["loss/current"]
        assert found["loss/epoch"] == found["loss/epoch_average"]
    assert tracker.folder.name == "mine"


@pytest.mark.parametrize(
    ("options", "notice"),
    [
        ({"log_prefix": "x"}, "without effect without --logging_dir: --log_prefix"),
        ({"log_prefix": "x", "log_with": "wandb"}, "without effect without --logging_dir: --log_prefix"),
        ({"log_config": True}, "without effect without --logging_dir or --log_with: --log_config"),
        ({"wandb_run_name": "x"}, "without effect without --log_with wandb or all: --wandb_run_name"),
    ],
)
def test_settings_without_effect_are_told(options, notice):
    assert LoggingOptions(**options).notices() == [notice]


def test_settings_in_effect_are_not_told(tmp_path):
    assert LoggingOptions(log_with="all", logging_dir=tmp_path, log_prefix="x", wandb_run_name="y").notices() == []
