"""What every script writes, with everything switched on: no user name, machine, place or key; a manifest that is true.

Folders, environment and options hold words that must turn up in no written file, nor in its name.
"""

import gzip
import io
import json
import os
import socket
import sys
import zipfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
from PIL import Image

from tests.scripts.methods import SCRIPTS, method_arguments
from tests.scripts.runs import Run, run_script, tensor_hash, write_images
from tests.scripts.runs import script as script_module
from tests.tiny import tiny_sd

ROOT = Path(__file__).parents[2]
USER, HOST, KEY = "CANARYUSER", "CANARYHOST", "CANARYKEY"
ENVIRONMENT = {
    **dict.fromkeys(("USER", "LOGNAME", "USERNAME", "SUDO_USER"), USER),
    **dict.fromkeys(("HOSTNAME", "COMPUTERNAME"), HOST),
    **dict.fromkeys(("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY"), KEY),
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A home folder that tells whose it is; everything a run reads and writes is below it."""
    folder = tmp_path_factory.mktemp("some") / f"home-of-{USER}"
    folder.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        patch.setenv("HOME", str(folder))
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        patch.setattr(socket, "gethostname", lambda: HOST)
        patch.setattr("platform.node", lambda: HOST)
        yield folder


@pytest.fixture(scope="module")
def run_of(home: Path) -> Callable[[str], Run]:
    model = tiny_sd(home / "models" / "a base", layers_per_block=1, channels=(16, 16, 32, 32))
    xti_model = tiny_sd(home / "models" / "a base for XTI", channels=(16, 16, 32, 32))
    prompts = home / "prompts.txt"
    prompts.write_text("a thing --w 64 --h 64 --s 1\n", encoding="utf-8")

    @cache
    def run(script: str) -> Run:
        folder = home / script
        base = xti_model if script.endswith("XTI") else model
        return run_script(
            script,
            folder / "out",
            *method_arguments(script, base, folder, steps=2),
            "--save_every_n_steps=2",
            "--save_state",
            "--ema",
            "--validation_split=0.25",
            "--sample_at_first",
            "--sample_every_n_steps=2",
            f"--sample_prompts={prompts}",
            "--cache_latents",
            "--cache_latents_to_disk",
            "--log_config",
            f"--console_log_file={folder / 'out' / 'console.txt'}",
            "--console_log_level=DEBUG",
            f"--huggingface_token={KEY}",
            f"--wandb_api_key={KEY}",
        )

    return run


def contents(path: Path) -> Iterator[tuple[str, bytes]]:
    """The bytes of a file, and what is packed inside it."""
    content = path.read_bytes()
    yield path.name, content
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                yield f"{path.name}/{name}", name.encode() + archive.read(name)
    elif content.startswith(b"\x1f\x8b"):
        yield f"{path.name} unpacked", gzip.decompress(content)
    elif path.suffix == ".png":
        with Image.open(io.BytesIO(content)) as image:
            image.load()
            yield f"{path.name} texts", repr(image.info).encode()


def leaks(folder: Path, secrets: list[str]) -> list[str]:
    """Where one of ``secrets`` is below ``folder``: in a name, or in what a file holds, whatever the case."""
    sought = [(secret, form) for secret in secrets for form in forms(secret)]
    found = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        found += [f"name: {name}" for secret in secrets if secret.lower() in name.lower()]
        if path.is_file():
            for where, content in contents(path):
                low = content.lower()
                found += [f"{where}: {secret}" for secret, form in sought if form in low]
    return found


def forms(secret: str) -> list[bytes]:
    """How a text may stand in a file: plain, in UTF-16, and as JSON within JSON has it."""
    low = secret.lower()
    return [low.encode(), low.encode("utf-16-le"), low.replace("/", "\\/").encode()]


def test_the_search_finds_what_is_hidden(tmp_path: Path) -> None:
    import torch
    from PIL.PngImagePlugin import PngInfo

    for name in ("a", "b", "c", "d", KEY, "f"):
        (tmp_path / name).mkdir()
    info = PngInfo()
    info.add_itxt("x", f"{KEY} " * 30, zip=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "a" / "x.png", pnginfo=info)
    torch.save({KEY: 1}, tmp_path / "b" / "x.bin")
    (tmp_path / "c" / "x.gz").write_bytes(gzip.compress(KEY.encode() * 30))
    with zipfile.ZipFile(tmp_path / "d" / "x.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x", KEY * 30)
    (tmp_path / "f" / "x").write_bytes(KEY.encode("utf-16"))
    assert all(leaks(tmp_path / name, [KEY]) for name in "abcdf")
    assert any(line.startswith("name: ") for line in leaks(tmp_path, [KEY]))
    assert not leaks(tmp_path / "a", [USER])


@pytest.mark.parametrize("script", SCRIPTS)
def test_nothing_private_is_written(script: str, home: Path, run_of: Callable[[str], Run]) -> None:
    run = run_of(script)
    assert run.code == 0
    kinds = {name.partition(".")[2] or name.rpartition("/")[2] for name in run.files}
    assert {"run.json", "safetensors", "json", "bin", "png", "txt"} <= kinds
    assert any(name.endswith("-report.html") for name in run.files)
    assert any("events" in name for name in run.files)
    assert list((home / script).rglob("*.npz")), "latents were to be written beside the images"
    places = [str(home), str(home.parent), str(ROOT), sys.prefix, os.path.realpath(sys.prefix)]
    # The data set file names its folder: it was written for the run, not by it.
    written = home / script
    private = [line for line in leaks(written, [USER, HOST, KEY, *places]) if not line.startswith("dataset")]
    assert private == []


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_writes_a_true_manifest(script: str, run_of: Callable[[str], Run]) -> None:
    import hashlib

    run = run_of(script)
    manifest = json.loads((run.folder / "thing.run.json").read_text(encoding="utf-8"))
    assert manifest["script"] == f"{script}.py"
    assert manifest["outcome"] == "finished"
    assert manifest["steps"]["done"] == manifest["steps"]["total"] == 2
    models = {name for name in run.files if name.endswith(".safetensors") and "/" not in name}
    assert manifest["results"].keys() == models
    assert len(models) == 4
    for name, one in manifest["results"].items():
        assert one["tensors"] == tensor_hash(run.folder / name)
        assert one["bytes"] == (run.folder / name).stat().st_size
    assert manifest["states"].keys() == {name.split("/")[0] for name in run.files if "-state/" in name}
    for name, one in manifest["states"].items():
        assert one["sha256"] == hashlib.sha256((run.folder / name / "manifest.json").read_bytes()).hexdigest()
    base = next(one for one in manifest["inputs"].values() if "--pretrained_model_name_or_path" in one["used_as"])
    assert len(base["files"]) >= 10
    listed = [files for subset in manifest["data"]["subsets"] for files in subset["files"]]
    assert len(listed) == manifest["data"]["images"] == 6
    assert "learning_rate" in manifest["options"]
    assert not {"huggingface_token", "wandb_api_key"} & manifest["options"].keys()
    assert manifest["prompts"][0]["prompt"] == "a thing"


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_manifest_leads_back_to_its_command(script: str, home: Path, run_of: Callable[[str], Run]) -> None:
    """Options, data set, captions and models are found to be those of the run; the tests of the tool train as well."""
    from tools.reproduce import main

    run = run_of(script)
    model = home / "models" / ("a base for XTI" if script.endswith("XTI") else "a base")
    places = {model.name: model, "images": home / script / "images"}
    (described,) = list((home / script).glob("*.json")) or [None]
    if described is not None:
        places[described.name] = described
    maps = [f"--map={name}={place}" for name, place in places.items()]
    assert main([str(run.folder / "thing.run.json"), "--dry_run", *maps]) == 0


def test_tools_write_nothing_private(home: Path) -> None:
    """The page of the data set, and the files that images are described in; --full_path asks for paths."""
    from finetune import clean_captions_and_tags, merge_captions_to_metadata, merge_dd_tags_to_metadata
    from finetune import prepare_buckets_latents as buckets

    folder = home / "tools"
    images = write_images(folder / "images", 3)
    for path in sorted(images.glob("*.png")):
        path.with_suffix(".caption").write_text("a thing", encoding="utf-8")
    assert merge_captions_to_metadata.main([str(images), str(folder / "captions.json")]) == 0
    given = [f"--in_json={folder / 'captions.json'}", str(images), str(folder / "tags.json")]
    assert merge_dd_tags_to_metadata.main(given) == 0
    assert clean_captions_and_tags.main([str(folder / "tags.json"), str(folder / "clean.json")]) == 0
    model = tiny_sd(home / "models" / "for latents", layers_per_block=1, channels=(16, 16, 32, 32))
    sizes = ["--max_resolution=64,64", "--min_bucket_reso=64", "--batch_size=1"]
    made = [str(images), str(folder / "clean.json"), str(folder / "latents.json"), str(model)]
    assert buckets.main([*made, *sizes]) == 0
    assert len(list(images.glob("*.npz"))) == 3

    (folder / "train").mkdir()
    images.rename(folder / "train" / "1_thing")
    show = [f"--train_data_dir={folder / 'train'}", "--resolution=64", "--debug_dataset", f"--output_dir={folder}"]
    assert script_module("train_network").main([*show, "--caption_extension=.txt"]) == 0
    assert (folder / "dataset_preview" / "index.html").is_file()
    assert leaks(folder, [USER, HOST, KEY, str(home), str(ROOT)]) == []
