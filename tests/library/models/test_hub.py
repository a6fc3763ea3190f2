"""The hub without a network: its two calls are replaced."""

from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub.errors import (
    GatedRepoError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from library.errors import UserError
from library.models.hub import fetch_model, fetch_vae, model_files, vae_files
from library.models.options import ModelOptions, PromptOptions

NAMES = [
    "README.md",
    "model_index.json",
    "safety_checker/model.safetensors",
    "scheduler/scheduler_config.json",
    "sd15.ckpt",
    "text_encoder/config.json",
    "text_encoder/model.safetensors",
    "text_encoder/pytorch_model.bin",
    "tokenizer/merges.txt",
    "tokenizer/vocab.json",
    "unet/config.json",
    "unet/diffusion_pytorch_model.bin",
    "unet/diffusion_pytorch_model.fp16.safetensors",
    "unet/diffusion_pytorch_model.safetensors",
    "vae/config.json",
    "vae/diffusion_pytorch_model.bin",
]


@pytest.fixture
def hub(monkeypatch):
    """What the hub holds or how it fails, what is in the cache, and what was asked of it."""
    state = SimpleNamespace(names=NAMES, failure=None, folder=None, asked=[])

    def model_info(self, repository):
        if state.failure:
            raise state.failure
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in state.names])

    def snapshot_download(repository, *, allow_patterns=None, local_files_only=False):
        state.asked.append((repository, allow_patterns, local_files_only))
        if local_files_only and state.folder is None:
            raise LocalEntryNotFoundError("nothing in the cache")
        return str(state.folder)

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return state


def test_only_the_files_of_one_model_are_fetched():
    assert model_files(NAMES) == [
        "model_index.json",
        "scheduler/scheduler_config.json",
        "tokenizer/merges.txt",
        "tokenizer/vocab.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/config.json",
        "vae/diffusion_pytorch_model.bin",
        "text_encoder/config.json",
        "text_encoder/model.safetensors",
    ]
    assert model_files(["sd15.ckpt", "unet/config.json"]) == []


def test_a_vae_is_found_at_the_root_or_below():
    root = ["config.json", "diffusion_pytorch_model.bin", "diffusion_pytorch_model.safetensors"]
    assert vae_files(root) == ["config.json", "diffusion_pytorch_model.safetensors"]
    assert vae_files(NAMES) == ["vae/config.json", "vae/diffusion_pytorch_model.bin"]


def test_a_model_is_fetched_and_loaded(hub, tiny_folder):
    from library.models.stable_diffusion import load_stable_diffusion

    hub.folder = tiny_folder("sd2_v")
    options = ModelOptions(pretrained_model_name_or_path="owner/model", v2=True, v_parameterization=True)

    model = load_stable_diffusion(options, PromptOptions())

    assert model.source == "owner/model"
    assert model.variant.base_model_version == "sd_v2_v"
    assert hub.asked == [("owner/model", model_files(NAMES), False)]


def test_a_fetched_model_must_agree_with_the_flags(hub, tiny_folder):
    from library.models.stable_diffusion import load_stable_diffusion

    hub.folder = tiny_folder("sd2_v")
    with pytest.raises(UserError, match=r"owner/model is a Stable Diffusion 2\.x model"):
        load_stable_diffusion(ModelOptions(pretrained_model_name_or_path="owner/model"), PromptOptions())


@pytest.mark.parametrize("failure", [OfflineModeIsEnabled("offline"), HTTPError("Name or service not known")])
def test_without_a_connection_the_cache_is_used(hub, tmp_path, failure):
    hub.failure, hub.folder = failure, tmp_path
    assert fetch_vae("owner/vae") == tmp_path
    assert hub.asked == [("owner/vae", None, True)]


def test_without_a_connection_and_cache_the_error_says_both(hub):
    hub.failure = HTTPError("Name or service not known")
    with pytest.raises(UserError, match="no file or folder owner/model, and the hub cannot be reached") as caught:
        fetch_model("owner/model")
    assert "Name or service not known" in str(caught.value)


def test_a_repository_of_single_files_names_them(hub):
    hub.names = ["sd15.safetensors", "README.md"]
    with pytest.raises(UserError, match="no parts in Diffusers' layout") as caught:
        fetch_model("owner/model")
    assert "sd15.safetensors" in str(caught.value)


def test_a_repository_without_weights_is_reported(hub):
    hub.names = ["README.md"]
    with pytest.raises(UserError, match="no weights"):
        fetch_model("owner/model")


@pytest.mark.parametrize(
    ("kind", "said"), [(RepositoryNotFoundError, "no such model on the hub"), (GatedRepoError, "has to be granted")]
)
def test_what_the_hub_refuses_is_explained(hub, kind, said):
    # Made without the response that the constructor wants.
    hub.failure = kind.__new__(kind)
    with pytest.raises(UserError, match=said) as caught:
        fetch_model("owner/model")
    assert "hf auth login" in str(caught.value)
