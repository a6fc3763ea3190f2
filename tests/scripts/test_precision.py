"""Number formats, memory layouts and compilers through every script: in memory, in the file, and in the loss."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from library.errors import UserError
from library.files import read_tensors
from library.models.fp8 import STORAGE
from tests.scripts.methods import RESULT, SCRIPTS, method_arguments
from tests.scripts.runs import Run, run_script
from tests.tiny import tiny_sd

TRAINS_MODEL = ("train_db", "fine_tune")
FROZEN = tuple(name for name in SCRIPTS if name not in TRAINS_MODEL)
BF16 = ("--mixed_precision=bf16",)
FP8 = "--fp8_base"
PARTS = ("unet", "text_encoder", "vae")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_sd(tmp_path_factory.mktemp("models") / "sd1", "sd1")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def plain(model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Run]:
    """The run of a script, in fp32, that others are compared with."""
    done: dict[str, Run] = {}

    def run(script: str) -> Run:
        if script not in done:
            given = method_arguments(script, model, data / script)
            done[script] = run_script(script, tmp_path_factory.mktemp(script), *given)
        return done[script]

    return run


def dtypes(module: nn.Module) -> set[torch.dtype]:
    return {value.dtype for value in module.parameters() if value.is_floating_point()}


def at_the_start(monkeypatch: pytest.MonkeyPatch, look: Callable[[Any, Any], None]) -> None:
    """Let ``look`` see method and task of every run when it begins."""
    from library.run import _Run

    original = _Run.train

    def watched(run: Any, *given: Any) -> int:
        look(run._method, run._task)
        return original(run, *given)

    monkeypatch.setattr(_Run, "train", watched)


def in_memory(monkeypatch: pytest.MonkeyPatch) -> dict[str, set[torch.dtype]]:
    """The dtypes of the run's weights by part, filled in when the run begins."""
    found: dict[str, set[torch.dtype]] = {}

    def look(method: Any, task: Any) -> None:
        if not found:
            found.update({name: dtypes(getattr(task.model, name)) for name in PARTS})
            found["trained"] = dtypes(method.trained)

    at_the_start(monkeypatch, look)
    return found


def in_file(run: Run) -> set[torch.dtype]:
    tensors = read_tensors(run.folder / RESULT).tensors
    # An alpha is a single exact number.
    return {tensor.dtype for name, tensor in tensors.items() if tensor.is_floating_point() and "alpha" not in name}


@pytest.mark.parametrize("script", SCRIPTS)
def test_full_bf16(
    script: str, model: Path, data: Path, plain: Callable[[str], Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights of a word stay in fp32, as the script says; all others are bf16, in memory and in the file."""
    found = in_memory(monkeypatch)
    given = method_arguments(script, model, data / script)
    run = run_script(script, tmp_path, *given, *BF16, "--full_bf16", "--no_half_vae")
    assert run.losses == pytest.approx(plain(script).losses, rel=0.05)
    narrow = torch.bfloat16 if "textual" not in script else torch.float32
    assert found["trained"] == {narrow}
    assert found["vae"] == {torch.float32}
    assert found["unet"] == {torch.bfloat16}
    assert in_file(run) == ({torch.bfloat16, torch.float32} if script in TRAINS_MODEL else {narrow})
    if script in TRAINS_MODEL:
        tensors = read_tensors(run.folder / RESULT).tensors
        vae = {tensor.dtype for name, tensor in tensors.items() if name.startswith("first_stage_model.")}
        assert vae == {torch.float32}


@pytest.mark.parametrize("script", SCRIPTS)
def test_mixed_precision_leaves_trained_weights_in_fp32(
    script: str, model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = in_memory(monkeypatch)
    run = run_script(script, tmp_path, *method_arguments(script, model, data / script, steps=1), *BF16)
    assert found["trained"] == {torch.float32}
    assert found["vae"] == {torch.bfloat16}
    if script not in TRAINS_MODEL:
        assert found["unet"] == {torch.bfloat16}
        assert in_file(run) == {torch.float32}


@pytest.mark.parametrize("script", FROZEN)
@pytest.mark.parametrize("flag", ["--fp8_base", "--fp8_base_unet"])
def test_a_frozen_base_in_8_bits(
    flag: str,
    script: str,
    model: Path,
    data: Path,
    plain: Callable[[str], Run],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = in_memory(monkeypatch)
    given = method_arguments(script, model, data / script)
    run = run_script(script, tmp_path, *given, *BF16, flag, "--gradient_checkpointing")
    assert STORAGE in found["unet"]
    assert (STORAGE in found["text_encoder"]) == (flag == "--fp8_base")
    assert found["vae"] == {torch.bfloat16}
    assert found["trained"] == {torch.float32} == in_file(run)
    assert run.losses == pytest.approx(plain(script).losses, rel=0.1)
    assert run.losses != plain(script).losses


def test_previews_and_resuming_with_8_bits(model: Path, data: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a thing --w 64 --h 64 --s 2 --d 1", encoding="utf-8")
    given = [*method_arguments("train_network", model, data / "train_network", steps=3), *BF16, FP8]
    whole = run_script("train_network", tmp_path / "whole", *given, "--save_state", "--save_every_n_steps=2")
    more = ["--sample_every_n_steps=1", f"--sample_prompts={prompts}", "--sample_at_first"]
    shown = run_script("train_network", tmp_path / "shown", *given, *more)
    assert len([name for name in shown.files if name.endswith(".png") and "thing" in name]) >= 4
    assert shown.tensor_hash(RESULT) == whole.tensor_hash(RESULT)
    state = next(whole.folder.glob("*2-state"))
    resumed = run_script("train_network", tmp_path / "resumed", *given, f"--resume={state}")
    assert resumed.tensor_hash(RESULT) == whole.tensor_hash(RESULT)


@pytest.mark.parametrize("module", ["networks.oft", "networks.dylora", "networks.lora_fa"])
def test_other_networks_in_8_bits(module: str, model: Path, data: Path, tmp_path: Path) -> None:
    given = method_arguments("train_network", model, data / "train_network")
    given[given.index("--network_module=networks.lora")] = f"--network_module={module}"
    runs = [run_script("train_network", tmp_path / str(bool(more)), *given, *BF16, *more) for more in ([], [FP8])]
    assert runs[1].losses == pytest.approx(runs[0].losses, rel=0.1)


def test_networks_of_other_authors_and_8_bits_are_refused(model: Path, data: Path, tmp_path: Path) -> None:
    given = method_arguments("train_network", model, data / "train_network")
    with pytest.raises(UserError, match="computes with the frozen weights itself"):
        run_script("train_network", tmp_path / "out", *given, "--network_module=lycoris.kohya", *BF16, FP8)


@pytest.mark.parametrize("script", SCRIPTS)
def test_channels_last_changes_rounding_only(
    script: str, model: Path, data: Path, plain: Callable[[str], Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layouts: list[bool] = []

    def look(_: Any, task: Any) -> None:
        weights = (task.model.unet.conv_in.weight, task.model.vae.encoder.conv_in.weight)
        layouts.extend(weight.is_contiguous(memory_format=torch.channels_last) for weight in weights)

    at_the_start(monkeypatch, look)
    given = method_arguments(script, model, data / script)
    run = run_script(script, tmp_path, *given, "--channels_last", "--save_state")
    assert run.losses == pytest.approx(plain(script).losses, rel=1e-4)
    assert layouts[:2] == [True, True]
    ours, theirs = (read_tensors(one.folder / RESULT).tensors for one in (run, plain(script)))
    for name, tensor in theirs.items():
        assert ours[name].is_contiguous()
        torch.testing.assert_close(ours[name].float(), tensor.float(), atol=5e-3, rtol=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("script", ["train_network", "train_db", "train_textual_inversion_XTI"])
def test_compiled_models_train_the_same(
    script: str, model: Path, data: Path, plain: Callable[[str], Run], tmp_path: Path
) -> None:
    """With checkpointing, and a preview at the end."""
    torch._dynamo.reset()
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a thing --w 64 --h 64 --s 1 --d 1", encoding="utf-8")
    given = [*method_arguments(script, model, data / script), "--gradient_checkpointing"]
    more = ["--sample_every_n_steps=2", f"--sample_prompts={prompts}"]
    run = run_script(script, tmp_path / "out", *given, *more, "--torch_compile", "--dynamo_backend=eager")
    assert run.losses == pytest.approx(plain(script).losses, rel=1e-4)
    names = read_tensors(run.folder / RESULT).tensors.keys()
    assert names == read_tensors(plain(script).folder / RESULT).tensors.keys()
    assert any(name.endswith(".png") for name in run.files)
    # Something was compiled at all.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0


def test_a_backend_that_is_not_there_is_refused(model: Path, data: Path, tmp_path: Path) -> None:
    given = method_arguments("train_network", model, data / "train_network")
    with pytest.raises(UserError, match="fx2trt"):
        run_script("train_network", tmp_path / "out", *given, "--torch_compile", "--dynamo_backend=fx2trt")


@pytest.mark.parametrize("script", SCRIPTS)
def test_checkpoints_in_main_memory_change_nothing(
    script: str, model: Path, data: Path, plain: Callable[[str], Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[bool] = []
    original = torch.autograd.graph.save_on_cpu

    def watched(**given: Any) -> Any:
        used.append(True)
        return original(**given)

    monkeypatch.setattr(torch.autograd.graph, "save_on_cpu", watched)
    given = method_arguments(script, model, data / script)
    run = run_script(script, tmp_path, *given, "--gradient_checkpointing", "--cpu_offload_checkpointing")
    assert used
    assert run.losses == pytest.approx(plain(script).losses, rel=1e-4)
