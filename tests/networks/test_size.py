"""The size of a LoRA told from headers, against the network that is built."""

from pathlib import Path
from typing import Any

import pytest

from library.models.options import ModelOptions, PromptOptions
from library.models.stable_diffusion import load_stable_diffusion
from networks.loading import build_network
from networks.options import NetworkOptions
from networks.size import trained_values
from tests.tiny import Kind, tiny_ldm, tiny_sd


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


def built(model: ModelOptions, options: NetworkOptions) -> int:
    """Values of the network that training builds, without the one alpha a layer."""
    loaded = load_stable_diffusion(model, PromptOptions())
    network = build_network(options, model=loaded, seed=0)
    return sum(tensor.numel() for tensor in network.state_dict().values() if tensor.ndim)


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"network_train_unet_only": True},
        {"network_train_text_encoder_only": True},
        {"network_module": "networks.dylora"},
        {"network_module": "networks.lora_fa"},
        {"network_module": "networks.oft", "network_dim": 4},
    ],
)
def test_a_folder(more: dict[str, Any], folder: Path) -> None:
    path = folder / "sd1"
    if not path.exists():
        tiny_sd(path, "sd1", layers_per_block=1)
    model = ModelOptions(pretrained_model_name_or_path=str(path))
    options = NetworkOptions(**{"network_module": "networks.lora", "network_dim": 3} | more)
    assert trained_values(options, model) == built(model, options)


def test_rotations_of_a_checkpoint(folder: Path) -> None:
    path = tiny_ldm(folder / "oft", "sd1", layers_per_block=1)
    model = ModelOptions(pretrained_model_name_or_path=str(path))
    options = NetworkOptions(network_module="networks.oft")
    assert trained_values(options, model) == built(model, options)


@pytest.mark.parametrize("kind", ["sd1", "sd2"])
def test_a_checkpoint(kind: Kind, folder: Path) -> None:
    path = tiny_ldm(folder, kind, layers_per_block=1)
    model = ModelOptions(pretrained_model_name_or_path=str(path), v2=kind == "sd2")
    options = NetworkOptions(network_module="networks.lora", network_dim=3)
    found, right = trained_values(options, model), built(model, options)
    assert found is not None
    assert right <= found <= 1.15 * right
    if kind == "sd1":
        assert found == right


@pytest.mark.parametrize(
    "options",
    [
        NetworkOptions(network_module="lycoris.kohya"),
        NetworkOptions(network_module="networks.lora", network_args=("conv_dim=4",)),
        NetworkOptions(network_module="networks.oft", network_args=("enable_conv=1",)),
        NetworkOptions(network_module="networks.lora", network_weights=Path("other.safetensors")),
    ],
)
def test_what_only_loading_tells_is_unknown(options: NetworkOptions, folder: Path) -> None:
    assert trained_values(options, ModelOptions(pretrained_model_name_or_path=str(folder / "sd1"))) is None


def test_a_model_that_is_not_there_is_unknown(folder: Path) -> None:
    options = NetworkOptions(network_module="networks.lora")
    assert trained_values(options, ModelOptions(pretrained_model_name_or_path=str(folder / "none"))) is None
