"""One conversion for text from the command line and values from TOML."""

import os
from pathlib import Path

import pytest

from library.option_fields import declarations
from library.option_sources import config_path
from library.option_values import convert
from library.options import near_remedy, pair_problems, parse_int_or_float, parse_range, parse_size, text_pairs
from train_network import Options


@pytest.mark.parametrize(
    ("raw", "value"),
    [
        ("512", (512, 512)),
        ("512,768", (512, 768)),
        (512, (512, 512)),
        ([512, 768], (512, 768)),
        ("512, 768", (512, 768)),
    ],
)
def test_parse_size(raw, value):
    assert parse_size(raw) == value


@pytest.mark.parametrize("raw", ["512,", "512,768,3", "512x512", "", [], True, 512.5, {"a": 1}])
def test_parse_size_refuses(raw):
    with pytest.raises(ValueError, match="expects"):
        parse_size(raw)


@pytest.mark.parametrize(
    ("raw", "value"),
    [("10%", 0.1), ("0.5", 0.5), ("100", 100), (100, 100), (0.1, 0.1), ("0", 0), (0, 0), (100.0, 100), ("50 %", 0.5)],
)
def test_parse_int_or_float(raw, value):
    assert parse_int_or_float(raw) == value
    assert isinstance(parse_int_or_float(raw), float) == (0 < value < 1 or raw == "0")


@pytest.mark.parametrize("raw", ["1.5", "100.0", "x", "", "200%", 1.5, True, None])
def test_parse_int_or_float_refuses(raw):
    with pytest.raises(ValueError, match="expects"):
        parse_int_or_float(raw)


def test_parse_range():
    assert parse_range("2.0,4.0") == (2.0, 4.0)
    for raw in ("4,2", "2", "a,b"):
        with pytest.raises(ValueError, match="expects"):
            parse_range(raw)


@pytest.mark.parametrize(
    ("name", "raw"),
    [
        ("learning_rate", "nan"),
        ("learning_rate", True),
        ("learning_rate", [1.0]),
        ("learning_rate", "-1"),
        ("train_batch_size", 0),
        ("train_batch_size", 1.5),
        ("train_batch_size", "1.0"),
        ("train_batch_size", True),
        ("max_train_steps", 0),
        ("caption_dropout_rate", 1.5),
        ("keep_tokens", -1),
        ("bucket_reso_steps", 12),
        ("huber_c", 0),
        ("shuffle_caption", 2),
        ("shuffle_caption", "perhaps"),
        ("save_precision", "fp64"),
        ("dataset_config", 3),
        ("text_encoder_lr", [1e-4, -1]),
        ("caption_separator", ""),
        ("output_name", os.fsdecode(b"caf\xe9")),
        ("output_name", "a/b"),
        ("output_name", "..\\x"),
        ("output_name", ".."),
        ("output_name", "a\nb"),
        ("network_args", ["dim=1", os.fsdecode(b"a\xff")]),
    ],
)
def test_conversion_refuses(name, raw):
    with pytest.raises(ValueError, match="expects|must|allows"):
        convert(declarations(Options)[name], raw)


@pytest.mark.parametrize(
    ("name", "raw", "value"),
    [
        ("learning_rate", 1, 1.0),
        ("learning_rate", "1e-3", 1e-3),
        ("max_train_steps", 1600.0, 1600),
        ("persistent_data_loader_workers", 1, True),
        ("persistent_data_loader_workers", 0, False),
        ("shuffle_caption", "true", True),
        ("output_name", 2024, "2024"),
        ("output_name", "v1.0 <b> \u00e9", "v1.0 <b> \u00e9"),
        ("vae", "", None),
        ("network_args", [], ()),
        ("text_encoder_lr", [], None),
        ("text_encoder_lr", 1e-4, (1e-4,)),
        ("resume", False, None),
        ("network_args", "", ()),
        ("save_precision", "fp32", "float"),
        ("max_token_length", 75, None),
        ("max_token_length", 255, 225),
        ("max_token_length", "225", 225),
        ("dynamo_backend", "no", "inductor"),
        ("save_every_n_steps", 0, None),
        ("dataset_config", "a/b.toml", Path("a/b.toml")),
        ("base_weights", ["a", "b"], (Path("a"), Path("b"))),
        ("dataset_config", os.fsdecode(b"caf\xe9.toml"), Path(os.fsdecode(b"caf\xe9.toml"))),
    ],
)
def test_conversion_is_the_same_for_text_and_toml(name, raw, value):
    assert convert(declarations(Options)[name], raw) == value


def test_a_path_in_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    declared = declarations(Options)
    assert convert(declared["output_dir"], "~/out") == tmp_path / "out"
    assert convert(declared["base_weights"], ["~/a", "b~"]) == (tmp_path / "a", Path("b~"))
    assert convert(declared["output_dir"], "~no such user/out") == Path("~no such user/out")
    assert config_path("~/settings") == tmp_path / "settings.toml"


def test_pairs():
    assert text_pairs(["a=1", "b = x=y", "a=2"]) == {"a": "2", "b": " x=y"}
    (problem,) = pair_problems(["a=1", "conv_dim", "b="], "--network_args")
    assert "'conv_dim'" in problem.what


def test_near_remedy(tmp_path):
    (tmp_path / "model.safetensors").touch()
    assert near_remedy(tmp_path / "modle.safetensors") == "Did you mean model.safetensors?"
    assert near_remedy(tmp_path / "x") == "Check the path."
    assert "no folder" in near_remedy(tmp_path / "none" / "x")
