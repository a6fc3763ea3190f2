"""Inputs and runs of the tools for network files."""

import importlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from library.files import read_metadata, read_tensors

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "network_tools.json").read_text())
CASES = {case["label"]: case for case in GOLDEN["cases"]}
TOOLS = (
    "merge_lora",
    "svd_merge_lora",
    "resize_lora",
    "extract_lora_from_models",
    "extract_lora_from_dylora",
    "check_lora_weights",
    "lora_interrogator",
)
TEXT = "lora_te_text_model_encoder_layers_0_mlp_fc1"
PROJ = "lora_unet_down_blocks_0_attentions_0_proj_in"
QUERY = "lora_unet_up_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"
CONV = "lora_unet_down_blocks_0_resnets_0_conv1"
LAYERS = {TEXT: (6, 5, 0), PROJ: (8, 6, 1), QUERY: (7, 7, 0), CONV: (6, 4, 3)}
"""Outputs, inputs and kernel of each layer, in the order in which the golden inputs were drawn."""
MADE = {"a": (4, 4.0, 1), "b": (4, 1.0, 2), "c": (2, 2.0, 3)}
"""Rank, alpha and seed of the golden inputs."""


def lora(
    rank: int, alpha: float | None, seed: int, layers: Mapping[str, tuple[int, int, int]] = LAYERS
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for name, (outputs, inputs, kernel) in layers.items():
        small, one = ((kernel, kernel), (1, 1)) if kernel else ((), ())
        made[f"{name}.lora_down.weight"] = torch.randn((rank, inputs, *small), generator=generator)
        made[f"{name}.lora_up.weight"] = torch.randn((outputs, rank, *one), generator=generator)
        if alpha is not None:
            made[f"{name}.alpha"] = torch.tensor(alpha)
    return made


def write_inputs(folder: Path) -> None:
    """The inputs of the golden cases."""
    for name, facts in MADE.items():
        save_file(lora(*facts), folder / f"{name}.safetensors", metadata=GOLDEN["inputs"][name]["metadata"])


def run(tool: str, *words: object) -> int:
    return importlib.import_module(f"networks.{tool}").main([str(word) for word in words])


def run_case(label: str, monkeypatch, folder: Path) -> Path:
    """Run a golden case in ``folder``; returns what it wrote."""
    write_inputs(folder)
    monkeypatch.chdir(folder)
    script, *words = CASES[label]["args"]
    assert run(script.removeprefix("networks/").removesuffix(".py"), *words) == 0
    return folder / words[words.index("--save_to") + 1]


def deltas(path: Path) -> dict[str, Tensor]:
    """``alpha / rank * up @ down`` of every module, by the plain formula."""
    tensors = read_tensors(path).tensors
    names = [name.removesuffix(".lora_down.weight") for name in tensors if name.endswith(".lora_down.weight")]
    found = {}
    for name in names:
        down, up = tensors[f"{name}.lora_down.weight"].double(), tensors[f"{name}.lora_up.weight"].double()
        scale = float(tensors[f"{name}.alpha"]) / down.shape[0] if f"{name}.alpha" in tensors else 1.0
        found[name] = torch.einsum("or,rn->on", up.flatten(1), down.flatten(1)) * scale
    return found


def sums(folder: Path, **ratios: float) -> dict[str, Tensor]:
    """The sum of the files' changes, each times its ratio."""
    parts = [(deltas(folder / f"{name}.safetensors"), ratio) for name, ratio in ratios.items()]
    names = {name for changes, _ in parts for name in changes}
    return {name: sum(ratio * changes[name] for changes, ratio in parts if name in changes) for name in names}


def best(matrix: Tensor, rank: int) -> Tensor:
    """The truncated singular value decomposition, by numpy's way round."""
    import numpy as np

    left, values, right = np.linalg.svd(matrix.numpy(), full_matrices=False)
    return torch.from_numpy(left[:, :rank] @ np.diag(values[:rank]) @ right[:rank])


def assert_close(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], *, places: float = 1e-5) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(
            tensor, expected[name], atol=places, rtol=places, msg=lambda text, at=name: f"{at}: {text}"
        )


def assert_as_recorded(path: Path, label: str, *, places: float = 2e-4) -> None:
    """The file has the shapes, alphas and changes that were recorded for the case."""
    recorded = CASES[label].get("output") or CASES[label]["example"]
    tensors = read_tensors(path).tensors
    assert {name: list(tensor.shape) for name, tensor in tensors.items()} == {
        name: facts["shape"] for name, facts in recorded["tensors"].items()
    }
    for name, change in deltas(path).items():
        facts = recorded["effective_delta"][name]
        assert abs(float(change.norm()) - facts["norm"]) < places * facts["norm"], name
        assert torch.allclose(change.flatten()[:3].float(), torch.tensor(facts["first"]), atol=20 * places), name
        alpha = float(tensors[f"{name}.alpha"])
        assert alpha == recorded["tensors"][f"{name}.alpha"]["values"][0], name


def metadata_as_recorded(path: Path, label: str) -> dict[str, tuple[str | None, str]]:
    """The entries of the metadata that are not as recorded, but for hashes: ours and theirs."""
    recorded = (CASES[label].get("output") or CASES[label]["example"])["metadata"]
    found = read_metadata(path)
    return {
        name: (found.get(name), value)
        for name, value in recorded.items()
        if found.get(name) != value and name != "sshs_model_hash"
    }
