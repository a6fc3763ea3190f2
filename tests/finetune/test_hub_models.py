"""Captioning models from the hub, with a stand-in for it."""

import pytest

from finetune.blip import BERT, load_blip
from finetune.hub_models import model_files, model_folder, tokenizer_files
from library.errors import UserError
from tests.hub_stand_in import TOKEN, Repo, running, used_by_this_process

NAMES = ["README.md", "config.json", "flax_model.msgpack", "preprocessor_config.json", "pytorch_model.bin", "vocab.txt"]


@pytest.fixture
def hub(tmp_path, monkeypatch):
    # The stand-in serves nobody without a token.
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with running() as stand_in, used_by_this_process(stand_in, str(tmp_path / "cache")):
        yield stand_in


def put(hub, name, files):
    repo = Repo(private=False, files=dict(files))
    repo.commits.append(("a" * 40, dict(repo.files)))
    hub.repos["model", name] = repo


def test_only_what_the_model_needs_is_fetched():
    needed = ["config.json", "preprocessor_config.json", "vocab.txt"]
    assert model_files(NAMES) == sorted([*needed, "pytorch_model.bin"])
    assert model_files([*NAMES, "model.safetensors"]) == sorted([*needed, "model.safetensors"])
    parts = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"]
    assert model_files([*NAMES, *parts]) == sorted([*needed, *parts])
    assert model_files(["README.md", "model.onnx"]) == []
    assert tokenizer_files(NAMES) == ["config.json", "vocab.txt"]


def test_a_folder_is_taken_as_it_is(tmp_path):
    assert model_folder(str(tmp_path), flag="--model_id") == tmp_path


def test_a_model_is_fetched_and_found_again_without_a_connection(hub, blip_folder):
    import torch
    from huggingface_hub import constants

    put(hub, "someone/blip", {path.name: path.read_bytes() for path in blip_folder.iterdir()} | {"README.md": b"words"})
    assert load_blip("someone/blip", torch.device("cpu")).image_size == 32
    assert not any("README" in path for _, path in hub.requests)
    asked = len(hub.requests)
    hub.address = "http://127.0.0.1:9"
    constants.ENDPOINT = hub.address
    assert load_blip("someone/blip", torch.device("cpu")).image_size == 32
    assert len(hub.requests) == asked


def test_what_cannot_be_fetched(hub):
    put(hub, "someone/onnx", {"model.onnx": b"network"})
    with pytest.raises(UserError, match="has not the files"):
        model_folder("someone/onnx", flag="--model_id")
    with pytest.raises(UserError, match="no such model on the hub"):
        model_folder("someone/missing", flag="--model_id")
    with pytest.raises(UserError, match="no such model on the hub"):
        model_folder("no/such/folder", flag="--model_id")


def test_the_vocabulary_of_a_checkpoint_comes_from_the_hub_where_none_is_beside_it(hub, tmp_path):
    import torch

    from tests.finetune.test_blip import original_name
    from tests.finetune.tiny_models import blip_model, write_vocabulary

    weights = {original_name(name): tensor for name, tensor in blip_model().state_dict().items()}
    torch.save({"model": weights}, tmp_path / "tiny.pth")
    put(hub, BERT, {"vocab.txt": write_vocabulary(tmp_path / "words" / "vocab.txt").read_bytes(), "other.bin": b"x"})
    assert load_blip(str(tmp_path / "tiny.pth"), torch.device("cpu")).image_size == 32
    assert not any("other.bin" in path for _, path in hub.requests)
