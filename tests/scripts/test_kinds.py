"""Every method on every kind of Stable Diffusion: how a step is split and where a run is stopped changes nothing."""

from pathlib import Path

import pytest

from tests.scripts.methods import RESULT, SCRIPTS, method_arguments
from tests.scripts.runs import Run, run_script
from tests.tiny import Kind, tiny_sd

ASSETS = Path(__file__).parent / "losses"
FLAGS: dict[Kind, list[str]] = {"sd1": [], "sd2": ["--v2"], "sd2_v": ["--v2", "--v_parameterization"]}
BF16 = "--mixed_precision=bf16"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {kind: tiny_sd(folder / kind, kind) for kind in FLAGS}


def split_and_resumed(script: str, model: Path, folder: Path, *flags: str, close: float) -> Run:
    """Assert that a run agrees with the same in smaller pieces and with the same resumed after a step; return it."""
    given = [*method_arguments(script, model, folder), *flags]
    whole = run_script(script, folder / "whole", *given, "--save_every_n_steps=1", "--save_state")
    state = folder / "whole" / "thing-step00000001-state"
    resumed = run_script(script, folder / "resumed", *given, f"--resume={state}")
    assert resumed.losses == whole.losses[1:]
    assert resumed.tensor_hash(RESULT) == whole.tensor_hash(RESULT)
    halves = [*method_arguments(script, model, folder, batch_size=1), *flags]
    split = run_script(script, folder / "split", *halves, "--gradient_accumulation_steps=2")
    assert split.losses == pytest.approx(whole.losses, rel=close)
    return whole


@pytest.mark.slow
@pytest.mark.parametrize("kind", FLAGS)
@pytest.mark.parametrize("script", SCRIPTS)
def test_split_and_resumed_runs_agree(script: str, kind: Kind, models: dict[str, Path], tmp_path: Path) -> None:
    split_and_resumed(script, models[kind], tmp_path, *FLAGS[kind], close=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_in_bf16_they_agree_too_and_losses_are_the_stored_ones(
    script: str, models: dict[str, Path], tmp_path: Path
) -> None:
    """Losses within what another processor's rounding may do; a resumed run is the same to the bit here as well."""
    whole = split_and_resumed(script, models["sd2_v"], tmp_path, *FLAGS["sd2_v"], BF16, close=0.02)
    stored = [float(line) for line in (ASSETS / f"{script}-sd2_v-bf16.txt").read_text().split()]
    assert whole.losses == pytest.approx(stored, rel=0.02)


@pytest.mark.parametrize("script", SCRIPTS)
def test_steps_within_the_backward_pass_are_the_same(script: str, models: dict[str, Path], tmp_path: Path) -> None:
    given = [*method_arguments(script, models["sd1"], tmp_path), "--max_grad_norm=0"]
    whole = run_script(script, tmp_path / "whole", *given)
    fused = run_script(script, tmp_path / "fused", *given, "--fused_backward_pass")
    assert fused.losses == whole.losses
    assert fused.tensor_hash(RESULT) == whole.tensor_hash(RESULT)
