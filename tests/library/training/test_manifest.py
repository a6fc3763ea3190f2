"""Hashes of models, and how a manifest is found again."""

import hashlib

import pytest
import torch

from library.errors import UserError
from library.files import write_json, write_tensors
from library.training.manifest import (
    manifest_path,
    part_before,
    parts_so_far,
    read_manifest,
    result_differences,
    state_hash,
    tensor_hash,
)


def tensors():
    return {"b": torch.arange(6.0).reshape(2, 3), "a": torch.tensor([1.5], dtype=torch.bfloat16)}


def expected(content):
    """By the description of the hash alone."""
    digest = hashlib.sha256()
    for name in sorted(content):
        value = content[name]
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode() + bytes(value.untyped_storage()))
    return digest.hexdigest()


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt", ".pt"])
def test_the_hash_is_that_of_the_tensors_alone(suffix, tmp_path):
    first, second = (tmp_path / f"{name}{suffix}" for name in "xy")
    write_tensors(first, tensors(), metadata={"a": "1"})
    write_tensors(second, dict(reversed(tensors().items())))
    assert tensor_hash(first) == tensor_hash(second) == expected(tensors())


@pytest.mark.parametrize(
    "change",
    [
        {"b": torch.arange(6.0).reshape(3, 2)},
        {"b": torch.arange(6.0, dtype=torch.float64).reshape(2, 3)},
        {"c": torch.zeros(1)},
        {"a": torch.tensor([1.25], dtype=torch.bfloat16)},
    ],
)
def test_another_tensor_is_another_hash(change, tmp_path):
    write_tensors(tmp_path / "x.safetensors", tensors() | change)
    assert tensor_hash(tmp_path / "x.safetensors") != expected(tensors())


def test_of_a_folder_all_weights_count(tmp_path):
    for folder in ("x", "y"):
        for part in ("unet", "vae"):
            (tmp_path / folder / part).mkdir(parents=True)
            write_tensors(tmp_path / folder / part / "model.safetensors", tensors())
    (tmp_path / "y" / "training_metadata.json").write_text("{}")
    same = tensor_hash(tmp_path / "x")
    assert tensor_hash(tmp_path / "y") == same
    write_tensors(tmp_path / "y" / "vae" / "model.safetensors", {"a": torch.ones(1)})
    assert tensor_hash(tmp_path / "y") != same
    lines = "".join(f"{part}/model.safetensors {expected(tensors())}\n" for part in ("unet", "vae"))
    assert same == hashlib.sha256(lines.encode()).hexdigest()


def manifest(**changes):
    content = {
        **{"format": 1, "script": "train_network.py", "seed": 1, "processes": 1, "outcome": "stopped", "begun": "now"},
        **{"options": {"learning_rate": 1.0}, "inputs": {}, "data": {"digest": "d", "subsets": []}},
        **{"environment": {"threads": 1, "packages": {}}, "results": {}, "states": {}, "parts": []},
        "steps": {"done": 3, "total": 9},
    }
    return content | changes


def test_the_name_follows_the_result(tmp_path):
    assert manifest_path(tmp_path, "rex") == tmp_path / "rex.run.json"
    assert manifest_path(tmp_path, None) == tmp_path / "run.json"


def test_a_manifest_is_found_by_the_state_it_lists(tmp_path):
    state = tmp_path / "thing-step00000003-state"
    write_json(state / "manifest.json", {"files": {}})
    assert part_before(state) is None
    listed = {state.name: {"sha256": state_hash(state), "step": 3}}
    write_json(tmp_path / "other.run.json", manifest(states={state.name: {"sha256": "0", "step": 3}}))
    (tmp_path / "damaged.run.json").write_text("{")
    assert part_before(state) is None
    write_json(tmp_path / "thing.run.json", manifest(states=listed))
    assert part_before(state) == manifest(states=listed)
    # Another state that only has the name.
    write_json(state / "manifest.json", {"files": {"x": 1}})
    assert part_before(state) is None


def test_parts_follow_one_another():
    first = manifest()
    parts = parts_so_far(first, manifest(options={"learning_rate": 2.0, "log_config": True}), 3)
    assert [part["steps"] for part in parts] == [[0, 3]]
    assert parts[0]["changed_afterwards"] == ["--learning_rate: 1.0 -> 2.0"]
    again = parts_so_far(manifest(parts=parts), manifest(data={"digest": "e", "subsets": []}), 5)
    assert [part["steps"] for part in again] == [[0, 3], [3, 5]]
    assert again[1]["changed_afterwards"] == ["data: digest: 'd' -> 'e'"]


def test_results_are_compared_by_name():
    before = {"a": {"tensors": "1"}, "b": {"tensors": "2"}, "c": {"tensors": "3"}}
    now = {"a": {"tensors": "1"}, "b": {"tensors": "9"}, "d": {"tensors": "4"}}
    assert result_differences(before, now) == (["a"], ["b"], ["c"])


def test_manifests_nearby_are_named(tmp_path):
    write_json(tmp_path / "rex.run.json", manifest())
    with pytest.raises(UserError, match=r"rex\.run\.json"):
        read_manifest(tmp_path / "re.run.json")
    assert read_manifest(tmp_path / "rex.run.json") == manifest()
