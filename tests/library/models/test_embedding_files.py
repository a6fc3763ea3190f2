"""Files of embeddings, as several programs write them."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from library.errors import UserError
from library.files import read_tensors, write_tensors
from library.models.embedding_files import (
    LAYERS,
    check_embedding_file,
    embedding_tensors,
    layered_tensors,
    read_embedding,
)

ROWS = torch.arange(8.0).view(2, 4)


def write(path: Path, content: dict) -> Path:
    if path.suffix == ".safetensors":
        save_file(content, path)
    else:
        torch.save(content, path)
    return path


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.pt", {"emb_params": ROWS}),
        ("a.ckpt", {"emb_params": torch.nn.Parameter(ROWS)}),
        ("a.safetensors", {"emb_params": ROWS}),
        ("half.safetensors", {"emb_params": ROWS.half()}),
        ("concept.bin", {"<zwx>": ROWS}),
        ("web.pt", {"string_to_token": {"*": 265}, "string_to_param": {"*": ROWS}, "name": "zwx", "step": 9}),
        ("first.pt", {"string_to_token": {"*": 265}, "string_to_param": torch.nn.ParameterDict({"*": ROWS})}),
    ],
)
def test_what_is_read(name: str, content: dict, tmp_path: Path):
    found = read_embedding(write(tmp_path / name, content), vectors=2, width=4, layered=False)
    assert torch.equal(found, ROWS)
    assert found.dtype == torch.float32


def test_a_single_vector_may_be_a_row(tmp_path: Path):
    path = write(tmp_path / "concept.bin", {"<zwx>": ROWS[0]})
    assert torch.equal(read_embedding(path, vectors=1, width=4, layered=False), ROWS[:1])


def test_layers_are_read_in_their_order(tmp_path: Path):
    parts = {name: torch.full((2, 4), float(number)) for number, name in enumerate(LAYERS)}
    path = write(tmp_path / "a.safetensors", dict(reversed(parts.items())))
    found = read_embedding(path, vectors=2, width=4, layered=True)
    assert found[:, 0].tolist() == [float(number) for number in range(16) for _ in range(2)]


def test_every_layer_begins_with_an_ordinary_embedding(tmp_path: Path):
    path = write(tmp_path / "a.safetensors", {"emb_params": ROWS})
    assert torch.equal(read_embedding(path, vectors=2, width=4, layered=True), ROWS.repeat(16, 1))


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ({"emb_params": ROWS[:1]}, "1 vectors, the new word 2"),
        ({"emb_params": torch.zeros(2, 5)}, "5 wide"),
        ({"clip_g": torch.zeros(2, 5), "clip_l": torch.zeros(2, 4)}, "SDXL"),
        ({"a": ROWS, "b": ROWS}, "no embedding"),
        ({name: ROWS for name in LAYERS}, "16 layers"),
        ({"emb_params": torch.zeros(2, 4, 1)}, "which is no embedding"),
    ],
)
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_what_is_refused(content: dict, told: str, suffix: str, tmp_path: Path):
    path = write(tmp_path / f"a{suffix}", {name: tensor.clone() for name, tensor in content.items()})
    with pytest.raises(UserError, match=told) as refusal:
        read_embedding(path, vectors=2, width=4, layered=False)
    problems = check_embedding_file(path, vectors=2, layered=False)
    # The header of a safetensors file tells everything but the width of the model.
    assert bool(problems) == (suffix == ".safetensors" and "wide" not in told)
    assert all(problem.where and problem.remedy for problem in (*problems, *refusal.value.problems))


def test_no_pickle_is_executed(tmp_path: Path):
    path = tmp_path / "a.pt"
    torch.save({"emb_params": ROWS, "more": Path}, path)
    with pytest.raises(UserError, match="could run code"):
        read_embedding(path, vectors=2, width=4, layered=False)


@pytest.mark.parametrize("suffix", [".pt", ".ckpt", ".safetensors", ".bin"])
def test_what_is_written_is_read_again(suffix: str, tmp_path: Path):
    path = tmp_path / f"a{suffix}"
    write_tensors(path, embedding_tensors(ROWS, token="zwx", suffix=suffix))
    assert set(read_tensors(path).tensors) == {"zwx" if suffix == ".bin" else "emb_params"}
    assert torch.equal(read_embedding(path, vectors=2, width=4, layered=False), ROWS)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_layers_that_are_written_are_read_again(suffix: str, tmp_path: Path):
    rows = torch.randn(32, 4)
    path = tmp_path / f"a{suffix}"
    write_tensors(path, layered_tensors(rows))
    tensors = read_tensors(path).tensors
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {name: (2, 4) for name in LAYERS}
    assert torch.equal(read_embedding(path, vectors=2, width=4, layered=True), rows)
