"""Every method on every kind of Stable Diffusion: how a step is split and where a run is stopped changes nothing."""

from pathlib import Path

import pytest

from tests.scripts.methods import RESULT, SCRIPTS, method_arguments
from tests.scripts.runs import run_script
from tests.tiny import Kind, tiny_sd

FLAGS: dict[Kind, list[str]] = {"sd1": [], "sd2": ["--v2"], "sd2_v": ["--v2", "--v_parameterization"]}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {kind: tiny_sd(folder / kind, kind) for kind in FLAGS}


@pytest.mark.slow
@pytest.mark.parametrize("kind", FLAGS)
@pytest.mark.parametrize("script", SCRIPTS)
def test_split_and_resumed_runs_agree(script: str, kind: Kind, models: dict[str, Path], tmp_path: Path) -> None:
    flags = FLAGS[kind]
    given = [*method_arguments(script, models[kind], tmp_path), *flags]
    whole = run_script(script, tmp_path / "whole", *given, "--save_every_n_steps=1", "--save_state")
    state = tmp_path / "whole" / "thing-step00000001-state"
    resumed = run_script(script, tmp_path / "resumed", *given, f"--resume={state}")
    assert resumed.losses == whole.losses[1:]
    assert resumed.tensor_hash(RESULT) == whole.tensor_hash(RESULT)
    halves = [*method_arguments(script, models[kind], tmp_path, batch_size=1), *flags]
    split = run_script(script, tmp_path / "split", *halves, "--gradient_accumulation_steps=2")
    assert split.losses[0] == pytest.approx(whole.losses[0], rel=1e-4)


@pytest.mark.parametrize("script", SCRIPTS)
def test_steps_within_the_backward_pass_are_the_same(script: str, models: dict[str, Path], tmp_path: Path) -> None:
    given = [*method_arguments(script, models["sd1"], tmp_path), "--max_grad_norm=0"]
    whole = run_script(script, tmp_path / "whole", *given)
    fused = run_script(script, tmp_path / "fused", *given, "--fused_backward_pass")
    assert fused.losses == whole.losses
    assert fused.tensor_hash(RESULT) == whole.tensor_hash(RESULT)
