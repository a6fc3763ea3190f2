"""The hub without a network: its two calls are replaced, or a stand-in answers them."""

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
from library.models import contents
from library.models.hub import fetch_model, fetch_vae, model_files, vae_files
from library.models.options import ModelOptions, PromptOptions
from tests.hub_stand_in import TOKEN, Repo, running, used_by_this_process

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
    for name in ("config.json", "diffusion_pytorch_model.safetensors"):
        (tmp_path / name).touch()
    assert fetch_vae("owner/vae") == tmp_path
    assert hub.asked == [("owner/vae", [], True)]
    # Half a model, as a download leaves it that was broken off.
    (tmp_path / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(UserError, match="the hub cannot be reached"):
        fetch_vae("owner/vae")


def test_the_real_library_finds_a_model_again_without_a_connection(tiny_folder, tmp_path, monkeypatch):
    """A repository holds more than a model needs, which the library then misses in its cache."""
    folder = tiny_folder("sd1")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with running() as stand_in, used_by_this_process(stand_in, str(tmp_path / "cache")):
        files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.*")}
        repo = Repo(private=False, files=files | {"sd15.ckpt": b"more", "README.md": b"words"})
        repo.commits.append(("a" * 40, dict(repo.files)))
        stand_in.repos["model", "owner/model"] = repo
        fetched = fetch_model("owner/model")
        asked = len(stand_in.requests)
        huggingface_hub.constants.ENDPOINT = "http://127.0.0.1:9"
        assert fetch_model("owner/model") == fetched
        assert len(stand_in.requests) == asked
        assert not (fetched / "sd15.ckpt").exists()
        assert set(contents.model_files("owner/model")) == set(model_files(files)) - {"model_index.json"}


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
