from pathlib import Path

import pytest

from library.training.privacy import Scrubber, is_absolute, last_part, model_name, shareable, shown_path


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("stabilityai/stable-diffusion-2", "stabilityai/stable-diffusion-2"),
        ("/models/sd.safetensors", "sd.safetensors"),
        ("C:\\Users\\someone\\sd.ckpt", "sd.ckpt"),
        ("../models/sd.safetensors", "sd.safetensors"),
        ("models/deep/sd", "sd"),
        ("~/sd.ckpt", "sd.ckpt"),
        ("sd.ckpt", "sd.ckpt"),
    ],
)
def test_model_name(source, name):
    assert model_name(source) == name


def test_a_folder_that_looks_like_an_id_is_a_folder(tmp_path, monkeypatch):
    (tmp_path / "someone" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert model_name("someone/model") == "model"


def test_absolute_paths_of_every_system():
    assert all(is_absolute(text) for text in ("/a", "~/a", "C:\\a", "\\\\server\\share\\a"))
    assert not any(is_absolute(text) for text in ("a", "a/b", "AdamW", "", "1e-4"))
    assert last_part("/a/b.txt") == last_part("C:\\a\\b.txt") == "b.txt"


def test_shareable_values():
    options = {
        "wandb_api_key": "secret",
        "output_dir": Path("/home/someone/out"),
        "base_weights": ("/home/someone/a.safetensors", "b.safetensors"),
        "reg_data_dir": "relative/folder",
        "optimizer_args": ("eps=1e-8",),
        "learning_rate": 1e-4,
        "training_comment": "a/b = c",
        "seed": None,
    }
    assert shareable(options) == {
        "output_dir": "out",
        "base_weights": ["a.safetensors", "b.safetensors"],
        "reg_data_dir": "folder",
        "optimizer_args": ["eps=1e-8"],
        "learning_rate": 1e-4,
        "training_comment": "a/b = c",
        "seed": None,
    }


def test_shown_path_is_relative(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert shown_path(tmp_path / "out" / "a.png") == str(Path("out", "a.png"))
    assert shown_path(Path("out/a.png")) == str(Path("out", "a.png"))
    assert shown_path(tmp_path.parent / "elsewhere" / "out" / "a.png") == str(Path("out", "a.png"))


def test_what_is_relative_to_homes_is_not_told(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home" / "max"))
    (tmp_path / "home" / "max").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "home")
    assert shown_path(tmp_path / "home" / "max" / "a.png") == str(Path("~", "a.png"))
    assert shown_path(tmp_path / "home" / "max" / "out" / "a.png") == str(Path("out", "a.png"))
    assert Scrubber()(f"see {tmp_path}/home/max/out/a.png") == "see a.png"
    monkeypatch.chdir(tmp_path / "home" / "max")
    assert shown_path(tmp_path / "home" / "max" / "a.png") == "a.png"
    assert Scrubber()(f"see {tmp_path}/home/max/out/a.png") == "see out/a.png"


def test_neither_home_nor_current_folder_are_needed(tmp_path, monkeypatch):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()

    def no_home():
        raise RuntimeError

    monkeypatch.setattr(Path, "home", no_home)
    assert Scrubber()("see /home/max/a.png") == "see a.png"


@pytest.mark.parametrize(
    ("text", "scrubbed"),
    [
        ("cannot read /home/Max Muster/my images/01.png", "cannot read my images/01.png"),
        ("where: /etc/ssl/cert.pem:3", "where: cert.pem:3"),
        ("C:\\Users\\Max\\x.png is damaged", "x.png is damaged"),
        ("'~/secret/dog.png'", "'dog.png'"),
        ("the key k3y was refused", "the key *** was refused"),
        ("see https://example.org/a/b, 3/4 and lr/d*lr/unet", "see https://example.org/a/b, 3/4 and lr/d*lr/unet"),
    ],
)
def test_scrubbed_text(text, scrubbed):
    assert Scrubber([Path("/home/Max Muster/my images")], ["k3y", ""])(text) == scrubbed


def test_scrubbed_text_is_relative_to_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Scrubber()(f'File "{tmp_path}/library/run.py", line 3') == 'File "library/run.py", line 3'
