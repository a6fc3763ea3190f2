import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch

from library.errors import UserError
from library.files import read_metadata, read_tensors
from library.models.options import ModelOptions, PromptOptions
from library.models.stable_diffusion import StableDiffusion, load_stable_diffusion
from tests.tiny import Kind, tiny_ldm, tiny_sd
from tools.convert_diffusers20_original_sd import main

ROOT = Path(__file__).parents[2]


def loaded(path: Path, kind: Kind = "sd1") -> StableDiffusion:
    model = ModelOptions(pretrained_model_name_or_path=str(path), v2=kind != "sd1", v_parameterization=kind == "sd2_v")
    return load_stable_diffusion(model, PromptOptions())


def assert_same(first: StableDiffusion, second: StableDiffusion, *, places: float = 0) -> None:
    for part in ("unet", "vae", "text_encoder"):
        one, other = getattr(first, part).state_dict(), getattr(second, part).state_dict()
        assert set(one) == set(other)
        for name, tensor in one.items():
            torch.testing.assert_close(tensor, other[name], atol=places, rtol=places)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for kind in ("sd1", "sd2_v"):
        tiny_sd(folder / kind, kind, layers_per_block=1)  # type: ignore[arg-type]
    tiny_ldm(folder / "files", "sd1", layers_per_block=1)
    tiny_ldm(folder / "files", "sd1", ".ckpt", layers_per_block=1)
    return folder


@pytest.mark.parametrize("kind", ["sd1", "sd2_v"])
@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_there_and_back_is_the_same_model(kind: Kind, suffix: str, models: Path, tmp_path: Path) -> None:
    file, folder = tmp_path / f"model{suffix}", tmp_path / "back"
    assert main([str(models / kind), str(file)]) == 0
    flags = ["--v_parameterization"] if kind == "sd2_v" else []
    assert main([str(file), str(folder), "--use_safetensors", *flags]) == 0
    assert_same(loaded(models / kind, kind), loaded(folder, kind))
    scheduler = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    assert scheduler["prediction_type"] == ("epsilon" if kind == "sd1" else "v_prediction")
    assert (folder / "unet" / "diffusion_pytorch_model.safetensors").is_file()


@pytest.mark.parametrize("flag", ["--fp16", "--bf16", "--save_precision_as=fp16", "--variant=fp16"])
def test_the_precision_is_chosen(flag: str, models: Path, tmp_path: Path) -> None:
    main([str(models / "sd1"), str(tmp_path / "half.safetensors"), flag])
    dtypes = {tensor.dtype for tensor in read_tensors(tmp_path / "half.safetensors").tensors.values()}
    expected = torch.bfloat16 if flag == "--bf16" else torch.float16
    assert {dtype for dtype in dtypes if dtype.is_floating_point} == {expected}
    # Without a choice it stays.
    main([str(tmp_path / "half.safetensors"), str(tmp_path / "folder"), "--use_safetensors"])
    unet = read_tensors(tmp_path / "folder/unet/diffusion_pytorch_model.safetensors").tensors
    assert {tensor.dtype for tensor in unet.values()} == {expected}
    main([str(tmp_path / "half.safetensors"), str(tmp_path / "whole.safetensors"), "--float"])
    assert_same(loaded(models / "sd1"), loaded(tmp_path / "whole.safetensors"), places=1e-2)


def test_a_ckpt_has_its_counts_and_a_safetensors_its_metadata(models: Path, tmp_path: Path) -> None:
    source = str(models / "sd1")
    main([source, str(tmp_path / "a.ckpt"), "--epoch=3", "--global_step=70"])
    assert read_tensors(tmp_path / "a.ckpt").extra | {"diffusers_config": ""} == {
        "epoch": 3,
        "global_step": 70,
        "diffusers_config": "",
    }
    for text in ('{"title": "cats", "n": 1}', "{'title': 'cats', 'n': 1}"):
        main([source, str(tmp_path / "a.safetensors"), f"--metadata={text}"])
        found = read_metadata(tmp_path / "a.safetensors")
        assert (found["title"], found["n"]) == ("cats", "1")


def test_the_metadata_is_never_run(models: Path, tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    with pytest.raises(UserError, match="expects a table"):
        main([str(models / "sd1"), str(tmp_path / "a.safetensors"), f"--metadata=open({str(trap)!r}, 'w')"])
    assert not trap.exists()


def test_the_reference_model_gives_scheduler_and_tokenizer(models: Path, tmp_path: Path) -> None:
    reference = tiny_sd(tmp_path / "reference", "sd1", layers_per_block=1, seed=3)
    path = reference / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"beta_end": 0.5}))
    config = reference / "unet" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"sample_size": 96}))
    source = models / "files" / "sd1.safetensors"
    main([str(source), str(tmp_path / "out"), f"--reference_model={reference}"])
    assert json.loads((tmp_path / "out/scheduler/scheduler_config.json").read_text())["beta_end"] == 0.5
    assert json.loads((tmp_path / "out/unet/config.json").read_text())["sample_size"] == 96
    assert_same(loaded(source), loaded(tmp_path / "out"))


def test_the_reference_model_may_be_on_the_hub(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    reference = tiny_sd(tmp_path / "reference", "sd1", layers_per_block=1, seed=3)
    for weights in reference.rglob("*.safetensors"):
        weights.unlink()
    path = reference / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"beta_end": 0.5}))
    files = [SimpleNamespace(rfilename=one.relative_to(reference).as_posix()) for one in reference.rglob("*.*")]
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_: SimpleNamespace(siblings=files))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(reference))
    source = models / "files" / "sd1.safetensors"
    main([str(source), str(tmp_path / "out"), "--reference_model=someone/model"])
    assert json.loads((tmp_path / "out/scheduler/scheduler_config.json").read_text())["beta_end"] == 0.5

    def nobody(*_: object, **__: object) -> None:
        raise OSError("no connection")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", nobody)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", nobody)
    main([str(source), str(tmp_path / "offline"), "--reference_model=someone/model"])
    assert "that come with this program are used" in capfd.readouterr().err
    assert_same(loaded(source), loaded(tmp_path / "offline"))


def test_a_result_replaces_only_what_was_converted(
    models: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    source, target = str(models / "sd1"), tmp_path / "out"
    main([source, str(target)])
    main([source, str(target)])
    assert "exists and is replaced" in capfd.readouterr().err
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "a.txt").write_text("mine")
    with pytest.raises(UserError, match="did not write"):
        main([source, str(tmp_path / "mine")])
    with pytest.raises(UserError, match="would replace itself"):
        main([source, str(models / "sd2_v" / ".." / "sd1")])
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(UserError, match="did not write"):
        main([source, str(tmp_path / "folder.safetensors")])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["MODELS/sd1"], "model_to_save is missing"),
        (["MODELS/sd1", "a.ckpt", "--v1", "--v2"], "both given"),
        (["MODELS/sd1", "a.ckpt", "--v2"], "Stable Diffusion 1.x model"),
        (["MODELS/sd2_v", "a.ckpt", "--v1"], "Stable Diffusion 2.x model"),
        (["MODELS/sd1", "a.ckpt", "--fp16", "--bf16"], "several precisions"),
        (["MODELS/sd1", "a.bin"], "a checkpoint ends in"),
        (["MODELS/missing.ckpt", "a.ckpt"], "no such file"),
        (["MODELS/sd1", "a.ckpt", "--reference_model=MODELS/files/sd1.safetensors"], "is no Diffusers folder"),
    ],
)
def test_mistakes_are_refused(
    given: list[str], message: str, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        main([word.replace("MODELS", str(models)) for word in given])
    assert not list(tmp_path.iterdir())


def test_it_runs_from_any_folder(models: Path, tmp_path: Path) -> None:
    script = ROOT / "tools" / "convert_diffusers20_original_sd.py"
    command = [sys.executable, str(script), str(models / "files" / "sd1.ckpt"), "out"]
    subprocess.run(command, check=True, cwd=tmp_path, timeout=120)
    assert (tmp_path / "out" / "model_index.json").is_file()
