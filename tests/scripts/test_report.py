"""The report that a run leaves, also one that fails or is stopped."""

import html
import re
import signal
from pathlib import Path

import pytest
import torch

from library.errors import UserError
from tests.library.training.test_report import Page
from tests.scripts.runs import run_script, write_dataset
from tests.tiny import tiny_sd


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_sd(tmp_path_factory.mktemp("model") / "some base", layers_per_block=1, channels=(16, 16, 32, 32))


def given(model: Path, dataset: Path, *more: str, steps: int = 4) -> list[str]:
    return [
        f"--pretrained_model_name_or_path={model}",
        f"--dataset_config={dataset}",
        "--network_module=networks.lora",
        "--network_dim=4",
        f"--max_train_steps={steps}",
        "--max_data_loader_n_workers=0",
        "--output_name=thing",
        *more,
    ]


def read(folder: Path) -> tuple[Page, str]:
    text = (folder / "thing-report.html").read_text(encoding="utf-8")
    return Page(text), text


def test_the_report_of_a_finished_run(model: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a <b>bold</b> thing --w 64 --h 64 --s 2 --d 3\n", encoding="utf-8")
    dataset = write_dataset(tmp_path / "my data")
    hostile = "<script>alert('x')</script>"
    (tmp_path / "my data" / "images" / "00.txt").write_text(hostile, encoding="utf-8")
    run = run_script(
        "train_network",
        tmp_path / "some where",
        *given(model, dataset, "--sample_at_first", "--sample_every_n_steps=2", f"--sample_prompts={prompts}"),
        f"--training_comment={hostile} {tmp_path}/secret/place",
        "--wandb_api_key=k3y-of-mine",
        "--validation_split=0.25",
        "--save_last_n_steps=3",
    )
    assert run.code == 0
    page, text = read(run.folder)
    assert ("span", "class", "outcome finished") in page.attributes
    assert "All 4 of 4 steps were done" in page.text
    for title in ("Loss", "Learning rate", "Validation loss by timestep", "Gradient norm", "Images a second"):
        assert ("svg", "aria-label", title) in page.attributes
    # The last value of the curve is that of the log.
    values = next(value for tag, name, value in page.attributes if name == "data-values" and tag == "polyline")
    assert [float(value) for value in values.split()] == pytest.approx(run.losses, rel=1e-3)
    assert "a <b>bold</b> thing" in page.text
    assert page.tags.count("img") == 3
    assert "some base" in page.text
    assert "thing.safetensors" in page.text
    assert hostile in page.text
    assert page.tags.count("script") == 1
    # Notices that came before the run began, too.
    assert "without effect without --save_every_n_steps: --save_last_n_steps" in page.text
    assert "--max_train_steps" in page.text
    assert torch.__version__.split("+")[0] in page.text
    assert "k3y-of-mine" not in text
    assert str(tmp_path) not in html.unescape(text)
    assert str(tmp_path.parent) not in html.unescape(text)
    assert len(text) < 400_000


def test_no_report(model: Path, tmp_path: Path) -> None:
    run = run_script("train_network", tmp_path / "out", *given(model, write_dataset(tmp_path), "--no_report", steps=1))
    assert not list(run.folder.rglob("*.html"))


def test_the_report_of_a_run_that_fails(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from networks.training import NetworkTraining

    def fail(self: NetworkTraining, step: int) -> dict[str, float]:
        if step == 2:
            raise RuntimeError(f"a defect at {tmp_path}/deep/place")
        return {}

    monkeypatch.setattr(NetworkTraining, "after_step", fail)
    with pytest.raises(RuntimeError, match="a defect"):
        run_script("train_network", tmp_path / "out", *given(model, write_dataset(tmp_path)))
    page, text = read(tmp_path / "out")
    assert ("span", "class", "outcome failed") in page.attributes
    assert "After 1 of 4 steps" in page.text
    assert "RuntimeError: a defect at place" in page.text
    assert "library/training/loop.py" in page.text
    assert str(tmp_path) not in html.unescape(text)


def test_the_report_of_a_loss_that_is_not_finite(model: Path, tmp_path: Path) -> None:
    more = ["--learning_rate=1e18", "--max_grad_norm=0"]
    with pytest.raises(UserError, match="not finite"):
        run_script("train_network", tmp_path / "out", *given(model, write_dataset(tmp_path), *more, steps=20))
    page, _ = read(tmp_path / "out")
    assert "Why it failed" in page.text
    assert "remedy:" in page.text
    assert "Traceback" not in page.text


def test_the_report_of_a_run_that_is_stopped(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from networks.training import NetworkTraining

    def stop(self: NetworkTraining, step: int) -> dict[str, float]:
        if step == 1:
            signal.raise_signal(signal.SIGINT)
        return {}

    monkeypatch.setattr(NetworkTraining, "after_step", stop)
    run = run_script("train_network", tmp_path / "out", *given(model, write_dataset(tmp_path), steps=9))
    assert run.code == 130
    page, _ = read(run.folder)
    assert ("span", "class", "outcome stopped") in page.attributes
    assert re.search(r"Stopped after [1-3] of 9 steps", page.text)
    assert "Why it failed" not in page.text


def test_a_mistake_before_the_first_step_leaves_no_report(model: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError):
        run_script("train_network", tmp_path / "out", *given(model, write_dataset(tmp_path), "--optimizer_args=x=1"))
    assert not list((tmp_path / "out").rglob("*.html"))


def test_a_report_that_cannot_be_written_ends_no_run(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out" / "thing-report.html").mkdir(parents=True)
    run = run_script("train_network", tmp_path / "out", *given(model, write_dataset(tmp_path), steps=1))
    assert run.code == 0
    assert "the report could not be written" in capsys.readouterr().err
