"""Which format results have, told without anything heavy."""

import subprocess
import sys

import pytest

from library.models.formats import check_target, format_notices, model_format, suffix_of


@pytest.mark.parametrize(
    ("save_as", "use_safetensors", "source", "expected"),
    [
        (None, False, "model.safetensors", "safetensors"),
        (None, False, "model.SafeTensors", "safetensors"),
        (None, False, "model.ckpt", "ckpt"),
        (None, True, "model.ckpt", "safetensors"),
        (None, False, "folder", "diffusers"),
        (None, True, "folder", "diffusers_safetensors"),
        (None, False, "owner/model", "diffusers"),
        (None, True, "owner/model", "diffusers_safetensors"),
        ("ckpt", False, "model.safetensors", "ckpt"),
        ("ckpt", True, "model.safetensors", "ckpt"),
        ("safetensors", False, "folder", "safetensors"),
        ("diffusers", False, "model.safetensors", "diffusers"),
        ("diffusers", True, "model.ckpt", "diffusers_safetensors"),
        ("diffusers_safetensors", False, "model.ckpt", "diffusers_safetensors"),
    ],
)
def test_the_format_follows_the_options_then_the_input(tmp_path, save_as, use_safetensors, source, expected):
    if "." in source:
        (tmp_path / source).touch()
        source = tmp_path / source
    elif source == "folder":
        source = tmp_path
    assert model_format(save_as, use_safetensors, source) == expected
    assert model_format(save_as, use_safetensors, str(source)) == expected


def test_names_end_with_the_format():
    endings = {name: suffix_of(name) for name in ("ckpt", "safetensors", "diffusers", "diffusers_safetensors")}
    assert endings == {"ckpt": ".ckpt", "safetensors": ".safetensors", "diffusers": "", "diffusers_safetensors": ""}


def test_a_flag_without_effect_is_told():
    assert "--use_safetensors" in format_notices("ckpt", True)[0]
    assert not [*format_notices("ckpt", False), *format_notices("diffusers", True), *format_notices(None, True)]


def test_a_place_taken_by_something_else_is_refused(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "model").touch()
    assert check_target(tmp_path / "photos", "diffusers")
    assert check_target(tmp_path / "photos", "ckpt")
    assert check_target(tmp_path / "model", "diffusers_safetensors")
    assert not check_target(tmp_path / "model", "safetensors")
    assert not check_target(tmp_path / "new", "diffusers")


def test_nothing_heavy_is_imported():
    program = "import sys, library.models.formats; print({'torch', 'diffusers', 'transformers'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"
