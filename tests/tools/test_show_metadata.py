import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from library.errors import UserError
from library.files import write_tensors
from tools.show_metadata import main

ROOT = Path(__file__).parents[2]


def model(folder: Path) -> Path:
    path = folder / "model.safetensors"
    write_tensors(path, {"weight": torch.ones(2)}, metadata={"ss_z": "1", "modelspec.title": "été"})
    return path


def test_metadata_is_printed_as_sorted_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model", str(model(tmp_path))]) == 0
    shown = capsys.readouterr().out
    assert shown == '{\n    "modelspec.title": "\\u00e9t\\u00e9",\n    "ss_z": "1"\n}\n'


def test_a_file_without_metadata_has_an_empty_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "plain.safetensors"
    write_tensors(path, {"weight": torch.ones(2)})
    main([str(path)])
    assert json.loads(capsys.readouterr().out) in ({}, {"format": "pt"})


def test_a_trained_folder_shows_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "training_metadata.json").write_text('{"b": "2", "a": "1"}')
    main(["--model", str(tmp_path)])
    assert list(json.loads(capsys.readouterr().out)) == ["a", "b"]


@pytest.mark.parametrize(("name", "content"), [("a.ckpt", b"x"), ("a.safetensors", b"\xff" * 20), ("folder", None)])
def test_what_has_none_is_refused(name: str, content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / name
    path.mkdir() if content is None else path.write_bytes(content)
    with pytest.raises(UserError):
        main(["--model", str(path)])


@pytest.mark.parametrize("given", [[], ["--model", "missing.safetensors"]])
def test_no_file_is_told(given: list[str]) -> None:
    with pytest.raises(UserError):
        main(given)


TOOLS = sorted(
    path
    for folder in ("finetune", "tools")
    for path in (ROOT / folder).glob("*.py")
    if path.stem
    in {
        "merge_captions_to_metadata",
        "merge_dd_tags_to_metadata",
        "clean_captions_and_tags",
        "prepare_buckets_latents",
        "show_metadata",
        "resize_images_to_resolution",
        "convert_diffusers20_original_sd",
        "cache_text_encoder_outputs",
        "reproduce",
    }
)


@pytest.mark.parametrize("path", TOOLS, ids=lambda path: path.stem)
def test_help_imports_nothing_heavy(path: Path, tmp_path: Path) -> None:
    code = (
        f"import runpy, sys; sys.argv = [{str(path)!r}, '--help']\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as end: print(end.code, [name for name in "
        "('torch', 'diffusers', 'transformers', 'accelerate', 'cv2', 'numpy') if name in sys.modules])\n"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert run.stdout.startswith("usage: ")
    assert run.stdout.splitlines()[-1] == "0 []"
