"""Where the files of a tagger come from, with a stand-in for the hub."""

import pytest

from finetune.tagger_files import folder_of, tagger_folder
from library.errors import UserError
from tests.hub_stand_in import TOKEN, Repo, running, used_by_this_process

ID = "SmilingWolf/wd-tiny"
FILES = {"model.onnx": b"network", "selected_tags.csv": b"tags"}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    # The stand-in serves nobody without a token.
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with running() as stand_in, used_by_this_process(stand_in, str(tmp_path / "cache")):
        repo = Repo(private=False, files=dict(FILES))
        repo.files |= {"v1/model_optimized.onnx": b"optimised", "v1/tag_mapping.json": b"{}", "README.md": b"words"}
        repo.commits.append(("a" * 40, dict(repo.files)))
        stand_in.repos["model", ID] = repo
        yield stand_in


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_files_are_downloaded_once(hub, tmp_path):
    folder = tagger_folder(ID, tmp_path / "models", force=False)
    assert folder == tmp_path / "models" / "SmilingWolf_wd-tiny"
    assert content(folder) == FILES
    asked = len(hub.requests)
    assert tagger_folder(ID, tmp_path / "models", force=False) == folder
    assert len(hub.requests) == asked


def test_only_what_is_missing_is_downloaded_unless_forced(hub, tmp_path):
    folder = tmp_path / "SmilingWolf_wd-tiny"
    folder.mkdir()
    (folder / "selected_tags.csv").write_bytes(b"mine")
    tagger_folder(ID, tmp_path, force=False)
    assert content(folder) == FILES | {"selected_tags.csv": b"mine"}
    tagger_folder(ID, tmp_path, force=True)
    assert content(folder) == FILES


def test_a_folder_inside_a_repository_has_the_other_kind(hub, tmp_path):
    folder = tagger_folder(f"{ID}/v1", tmp_path, force=False)
    assert folder.name == "SmilingWolf_wd-tiny_v1"
    assert content(folder) == {"model_optimized.onnx": b"optimised", "tag_mapping.json": b"{}"}


def test_a_folder_that_holds_a_tagger_itself_will_do(tmp_path):
    for name, data in FILES.items():
        (tmp_path / name).write_bytes(data)
    assert tagger_folder(ID, tmp_path, force=False) == tmp_path
    usual = tmp_path / "SmilingWolf_wd-tiny"
    usual.mkdir()
    for name, data in FILES.items():
        (usual / name).write_bytes(data)
    assert folder_of(ID, tmp_path) == usual


def test_a_download_that_arrives_damaged_is_not_kept(hub, tmp_path, monkeypatch):
    import huggingface_hub

    def damaged(repository, name, *, local_dir, **_):
        local_dir.mkdir(parents=True, exist_ok=True)
        (local_dir / name).write_bytes(b"noise")
        return str(local_dir / name)

    folder = tmp_path / "SmilingWolf_wd-tiny"
    folder.mkdir()
    for name, data in FILES.items():
        (folder / name).write_bytes(data)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", damaged)
    with pytest.raises(UserError, match="damaged on its way"):
        tagger_folder(ID, tmp_path, force=True)
    assert content(folder) == FILES


def test_what_the_hub_has_not(hub, tmp_path):
    with pytest.raises(UserError, match=r"the hub has no selected_tags\.csv in SmilingWolf/other"):
        tagger_folder("SmilingWolf/other", tmp_path, force=False)
    with pytest.raises(UserError, match=r"the hub has no tag_mapping\.json in SmilingWolf/wd-tiny/v2"):
        tagger_folder(f"{ID}/v2", tmp_path, force=False)
    with pytest.raises(UserError, match="is no hub id"):
        tagger_folder("wd-tiny", tmp_path, force=False)


def test_no_connection(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"cannot download selected_tags\.csv") as caught:
        tagger_folder(ID, tmp_path, force=False)
    assert "--model_dir" in str(caught.value)
