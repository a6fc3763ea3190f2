"""The adapters beside LoRA through ``train_network.py``: training, resuming, recomputing, reading the file again."""

from pathlib import Path

import pytest
import torch

from library.errors import UserError
from library.files import read_metadata, read_tensors
from tests.scripts.runs import Run, run_script, write_dataset
from tests.tiny import tiny_sd

ADAPTERS = {
    "networks.dylora": ("--network_dim=4", "--network_args", "unit=2", "rank_dropout=0.2"),
    "networks.lora_fa": ("--network_dim=4", "--network_args", "conv_dim=2"),
    "networks.oft": ("--network_dim=4", "--network_alpha=1e-3", "--network_args", "enable_conv=true"),
}
STEPS = 6


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("adapters")
    model = tiny_sd(folder / "model", layers_per_block=1)
    return [
        f"--pretrained_model_name_or_path={model}",
        f"--dataset_config={write_dataset(folder, images=4, batch_size=1)}",
        "--learning_rate=1e-2",
        "--cache_latents",
        "--max_data_loader_n_workers=0",
    ]


@pytest.fixture(scope="module", params=ADAPTERS)
def adapter(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def train(output: Path, given: list[str], adapter: str, *more: str, steps: int = STEPS) -> Run:
    return run_script(
        "train_network", output, *given, *more, f"--max_train_steps={steps}", f"--network_module={adapter}",
        *ADAPTERS[adapter],
    )  # fmt: skip


@pytest.fixture(scope="module")
def whole(given: list[str], adapter: str, tmp_path_factory: pytest.TempPathFactory) -> Run:
    output = tmp_path_factory.mktemp("whole")
    return train(output, given, adapter, "--save_state", "--save_every_n_steps=3")


def test_it_trains_and_the_file_tells(whole: Run, adapter: str) -> None:
    assert whole.code == 0
    assert len(whole.losses) == STEPS
    metadata = read_metadata(whole.folder / "last.safetensors")
    assert metadata["ss_network_module"] == adapter
    early = read_tensors(whole.folder / "at-step00000003.safetensors").tensors
    tensors = read_tensors(whole.folder / "last.safetensors").tensors
    # Self-attention over a single place, as in the middle of so small a picture, has nothing to weigh.
    idle = (
        "mid_block_attentions_0_transformer_blocks_0_attn1_to_q",
        "mid_block_attentions_0_transformer_blocks_0_attn1_to_k",
    )
    trained = [
        name
        for name in tensors
        if name.endswith((".lora_up.weight", ".oft_blocks")) and not name.split(".")[0].endswith(idle)
    ]
    assert trained
    assert all(tensors[name].any() for name in trained)
    assert all(not torch.equal(tensors[name], early[name]) for name in trained)
    downs = [name for name in tensors if name.endswith(".lora_down.weight")]
    assert all(torch.equal(tensors[name], early[name]) == (adapter == "networks.lora_fa") for name in downs)
    assert any(name.startswith("lora_te_") for name in tensors) == (adapter != "networks.oft")


def test_a_resumed_run_equals_the_uninterrupted_one(whole: Run, given: list[str], adapter: str, tmp_path: Path) -> None:
    resumed = train(tmp_path, given, adapter, f"--resume={whole.folder / 'at-step00000003-state'}")
    assert resumed.losses == whole.losses[3:]
    assert resumed.tensor_hash() == whole.tensor_hash()


def test_checkpointing_changes_nothing(whole: Run, given: list[str], adapter: str, tmp_path: Path) -> None:
    """The same seed once more, with recomputed blocks: the same tensors."""
    run = train(tmp_path, given, adapter, "--gradient_checkpointing", steps=3)
    assert run.losses == pytest.approx(whole.losses[:3], rel=1e-6)
    early = read_tensors(whole.folder / "at-step00000003.safetensors").tensors
    for name, tensor in read_tensors(run.folder / "last.safetensors").tensors.items():
        assert torch.allclose(tensor, early[name], atol=1e-5), name


def test_training_goes_on_from_the_file(whole: Run, given: list[str], adapter: str, tmp_path: Path) -> None:
    file = whole.folder / "last.safetensors"
    run = train(tmp_path, given, adapter, f"--network_weights={file}", "--dim_from_weights", steps=1)
    before, after = read_tensors(file).tensors, read_tensors(run.folder / "last.safetensors").tensors
    assert {name: tensor.shape for name, tensor in after.items()} == {
        name: tensor.shape for name, tensor in before.items()
    }
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items() if name.endswith(".alpha"))
    # One step of AdamW moves a value by about the learning rate, 0.01: the new weights are near the file's.
    assert all(float((after[name] - tensor).abs().max()) < 0.03 for name, tensor in before.items())


def test_the_forecast_and_base_weights(whole: Run, given: list[str], adapter: str, tmp_path: Path) -> None:
    file = whole.folder / "last.safetensors"
    run = train(tmp_path, given, adapter, f"--base_weights={file}", steps=1)
    assert run.losses[0] != whole.losses[0]
    assert train(tmp_path / "dry", given, adapter, "--dry_run").code == 0


def test_mistakes_of_oft(given: list[str], tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        train(tmp_path, given, "networks.oft", "--network_train_text_encoder_only", "--scale_weight_norms=1")
    text = str(caught.value)
    assert "networks.oft has no part for the text encoder" in text
    assert "cannot be scaled down" in text
