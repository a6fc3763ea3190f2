"""Uploads to, and states from, a stand-in for the hub that answers slowly, with errors, or not at all."""

import hashlib
import logging
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from library.errors import UserError
from library.training.hub import HubState, Repository, check_access, check_hub, fetch_state, uploads_to_hub
from library.training.options import HubOptions, ResumeOptions, SaveOptions
from library.training.states import TrainingState, read_state, write_state
from library.training.uploads import Patience
from tests.hub_stand_in import TOKEN, Faults, Repo, StandIn, running, used_by_this_process

ROOT = Path(__file__).parents[3]
QUICK = Patience(first=0.01, longest=0.02, one=5, save=5, end=5)
OPTIONS = HubOptions(huggingface_repo_id="owner/thing", huggingface_token=TOKEN)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    with running() as stand_in, used_by_this_process(stand_in, str(tmp_path / "hub-cache")):
        yield stand_in


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def save(folder: Path, name: str, content: bytes) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_bytes(content)
    return path


def upload(options: HubOptions, *paths: Path, patience: Patience = QUICK) -> dict[str, str]:
    """Upload the paths; what is missing at the end, by name."""
    uploads = uploads_to_hub(options, is_main=True, patience=patience)
    assert uploads is not None
    with uploads:
        for path in paths:
            uploads.add(path)
    return {path.name: reason for path, reason in uploads.missing.items()}


def state(step: int = 3) -> TrainingState:
    return TrainingState(
        step=step,
        epoch=1,
        tensors={"weight": torch.arange(6.0).reshape(2, 3)},
        optimizer={"state": {}, "param_groups": []},
        scheduler={"last_epoch": step},
        fingerprint={"options": {}, "data": "d"},
    )


@pytest.mark.parametrize("background", [False, True])
def test_twenty_uploads_with_faults_arrive_once(background: bool, hub: StandIn, tmp_path: Path) -> None:
    hub.faults = Faults(rate=0.2, slow=0.2, seconds=0.02)
    contents = {f"m{number:02d}.safetensors": bytes([number]) * (1000 + number) for number in range(18)}
    contents |= {f"note{number}.json": f"[{number}]".encode() for number in range(2)}
    paths = [save(tmp_path / "out", name, content) for name, content in contents.items()]
    missing = upload(replace(OPTIONS, huggingface_path_in_repo="runs/a", async_upload=background), *paths)
    assert hub.faulty >= 10
    assert not missing
    assert hub.files == {f"runs/a/{name}": digest(content) for name, content in contents.items()}
    assert not hub.sent_again
    assert not hub.stored_again
    assert len(hub.committed) == len(contents), "each was committed once, whatever became of the answers"


def test_what_does_not_arrive_is_named(hub: StandIn, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    hub.faults = Faults(fails=lambda method, path: "/objects/" in path)
    model = save(tmp_path / "out", "a.safetensors", b"weights")
    note = save(tmp_path / "out", "b.json", b"{}")
    missing = upload(OPTIONS, model, note, patience=Patience(first=0.01, longest=0.02, one=0.1, save=1, end=1))
    assert missing == {"a.safetensors": "the hub answers with status 503"}
    assert list(hub.files) == ["b.json"]
    assert "not uploaded: " in caplog.text.splitlines()[-1]
    assert "a.safetensors" in caplog.text.splitlines()[-1]


def test_a_folder_is_one_commit_and_a_second_upload_of_the_same_is_none(hub: StandIn, tmp_path: Path) -> None:
    folder = tmp_path / "out" / "thing-state"
    write_state(folder, state())
    assert not upload(replace(OPTIONS, huggingface_path_in_repo="runs"), folder)
    repo = hub.repos["model", "owner/thing"]
    assert len(repo.commits) == 1
    assert hub.files == {f"runs/thing-state/{file.name}": digest(file.read_bytes()) for file in folder.iterdir()}
    assert not upload(replace(OPTIONS, huggingface_path_in_repo="runs"), folder)
    assert len(repo.commits) == 1
    save(folder, "fingerprint.json", b"{}")
    assert not upload(replace(OPTIONS, huggingface_path_in_repo="runs"), folder)
    assert len(repo.commits) == 2
    assert not hub.sent_again


@pytest.mark.parametrize(("visibility", "private"), [(None, True), ("private", True), ("public", False)])
def test_visibility_and_type_of_a_new_repository(
    visibility: str | None, private: bool, hub: StandIn, tmp_path: Path
) -> None:
    options = replace(OPTIONS, huggingface_repo_visibility=visibility, huggingface_repo_type="dataset")
    assert not upload(options, save(tmp_path / "out", "a.safetensors", b"x"))
    assert {name: repo.private for name, repo in hub.repos.items()} == {("dataset", "owner/thing"): private}
    assert list(hub.files) == ["a.safetensors"]


def test_what_the_repository_leaves_out_is_named(hub: StandIn, tmp_path: Path) -> None:
    missing = upload(OPTIONS, save(tmp_path / "out", "a.ignored", b"x"), save(tmp_path / "out", "b.json", b"x"))
    assert list(missing) == ["a.ignored"]
    assert ".gitignore" in missing["a.ignored"]


def test_no_repository_no_uploads_and_only_the_main_process_uploads() -> None:
    assert uploads_to_hub(HubOptions(), is_main=True) is None
    assert uploads_to_hub(OPTIONS, is_main=False) is None


def test_the_library_is_not_imported_without_need() -> None:
    code = (
        "import sys, library.inputs, library.training.hub as h; from library.training.options import *;"
        "h.check_access(HubOptions()); h.uploads_to_hub(HubOptions(), is_main=True);"
        "h.check_hub(HubOptions(), ResumeOptions(), SaveOptions());"
        "print([m for m in ('huggingface_hub', 'torch', 'httpx2') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# --- the check before training


def refusal(options: HubOptions = OPTIONS) -> str:
    with pytest.raises(UserError) as caught:
        check_access(options)
    assert TOKEN not in str(caught.value)
    assert caught.value.__cause__ is None
    return str(caught.value)


def test_a_good_token_and_a_new_or_own_repository_pass(hub: StandIn, caplog: pytest.LogCaptureFixture) -> None:
    check_access(OPTIONS)
    check_access(replace(OPTIONS, huggingface_repo_id="group/thing"))
    assert not hub.repos, "the check creates nothing"
    hub.repos["model", "owner/thing"] = Repo()
    check_access(OPTIONS)
    assert not caplog.records


def test_a_public_repository_is_told_where_a_private_one_is_meant(
    hub: StandIn, caplog: pytest.LogCaptureFixture
) -> None:
    hub.repos["model", "owner/thing"] = Repo(private=False)
    check_access(replace(OPTIONS, huggingface_repo_visibility="public"))
    assert not caplog.records
    check_access(OPTIONS)
    assert "everybody can see" in caplog.text


def test_tokens_that_are_refused_end_the_run(hub: StandIn) -> None:
    assert "the access token is refused" in refusal(replace(OPTIONS, huggingface_token="hf_wrong"))
    assert "there is no access token" in refusal(replace(OPTIONS, huggingface_token=None))
    assert "hf auth login" in refusal(replace(OPTIONS, huggingface_token=None))
    assert "cannot create it for stranger" in refusal(replace(OPTIONS, huggingface_repo_id="stranger/thing"))
    assert "create it on the hub's page" in refusal(replace(OPTIONS, huggingface_repo_type="space"))
    hub.role = "read"
    assert "may only read" in refusal()


def test_the_environments_token_is_used(hub: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    check_access(replace(OPTIONS, huggingface_token=None))


@pytest.mark.parametrize("status", [500, 429])
def test_a_hub_in_trouble_is_a_warning(status: int, hub: StandIn, caplog: pytest.LogCaptureFixture) -> None:
    hub.faults.status = status
    check_access(OPTIONS)
    assert f"status {status}" in caplog.text


def test_no_hub_at_all_is_a_warning(
    hub: StandIn, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    check_access(OPTIONS)
    assert "does not answer" in caplog.text


# --- the options


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"huggingface_repo_id": "thing"}, "no repository"),
        ({"huggingface_repo_id": "a/b/c"}, "no repository"),
        ({"huggingface_repo_id": "owner/a..b"}, "no repository"),
        ({"huggingface_repo_id": "owner/-a"}, "no repository"),
        ({"huggingface_repo_id": "owner/café"}, "no repository"),
        ({"huggingface_repo_id": "owner/" + 97 * "a"}, "no repository"),
        ({"huggingface_repo_id": "o/n", "huggingface_repo_type": "models"}, "no type"),
        ({"huggingface_repo_id": "o/n", "huggingface_path_in_repo": "a/../b"}, "no folder"),
        ({"huggingface_repo_id": "o/n", "huggingface_path_in_repo": "a\\b"}, "no folder"),
        ({"huggingface_repo_id": "o/n", "huggingface_token": "hf_1 hf_2"}, "no access token"),
    ],
)
def test_options_that_cannot_be(given: dict[str, str], says: str) -> None:
    problems = HubOptions(**given).problems()
    assert len(problems) == 1
    assert says in problems[0].what
    assert given.get("huggingface_token", "?") not in str(problems[0])


def test_options_that_can_be_agree_with_the_library() -> None:
    from huggingface_hub.utils import validate_repo_id

    for name in ("owner/thing", "O.w-n_1/v1.5", "a/b", "o/" + 96 * "n"):
        validate_repo_id(name)
        assert not HubOptions(huggingface_repo_id=name).problems()
    assert not HubOptions(
        huggingface_repo_id="o/n", huggingface_path_in_repo="/a/b/", huggingface_token=" x "
    ).problems()


def test_options_without_effect_are_told() -> None:
    assert HubOptions().notices() == []
    assert HubOptions(async_upload=True, huggingface_token="t").notices() == [
        "without effect without --huggingface_repo_id: --huggingface_token, --async_upload"
    ]
    assert HubOptions(resume_from_huggingface=True, huggingface_token="t").notices() == []
    odd = HubOptions(huggingface_repo_id="o/n", huggingface_repo_visibility="Public")
    assert odd.notices() == ["--huggingface_repo_visibility Public means private"]
    assert Repository.of(odd) == Repository(name="o/n")
    states = replace(OPTIONS, save_state_to_huggingface=True)
    assert "no effect" in check_hub(states, ResumeOptions(), SaveOptions())[1][0]
    assert check_hub(states, ResumeOptions(), SaveOptions(save_state=True)) == ([], [])


def test_settled_options() -> None:
    given = HubOptions(huggingface_repo_id="", huggingface_token=" t\n", huggingface_path_in_repo="/a/b/").settled()
    assert given == HubOptions(huggingface_token="t", huggingface_path_in_repo="a/b")
    assert "hf_" not in repr(Repository.of(OPTIONS))


# --- states on the hub


def on_hub(text: str) -> HubState:
    options = replace(OPTIONS, resume_from_huggingface=True)
    found = HubState.of(options, ResumeOptions(resume=Path(text)))
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("text", "facts"),
    [
        ("owner/thing/runs/a-state", ("owner/thing", "runs/a-state", "main", "model")),
        ("owner/thing/a-state:v1", ("owner/thing", "a-state", "v1", "model")),
        ("owner/thing/a-state:refs/pr/1:dataset", ("owner/thing", "a-state", "refs/pr/1", "dataset")),
        ("owner/thing/a-state::dataset", ("owner/thing", "a-state", "main", "dataset")),
    ],
)
def test_how_a_state_on_the_hub_is_written(text: str, facts: tuple[str, ...]) -> None:
    found = on_hub(text)
    assert (found.repository.name, found.path, found.revision, found.repository.type) == facts


@pytest.mark.parametrize("text", ["thing", "owner/thing", "o/n/a:main:models", "o/n/a/../b", "o/n/a:b:model:c"])
def test_what_is_no_state_on_the_hub(text: str) -> None:
    problems, _ = check_hub(
        replace(OPTIONS, resume_from_huggingface=True), ResumeOptions(resume=Path(text)), SaveOptions()
    )
    assert "no state on the hub" in problems[0].what
    assert check_hub(replace(OPTIONS, resume_from_huggingface=True), ResumeOptions(), SaveOptions())[0]


def test_a_state_comes_back_as_it_was_despite_faults(hub: StandIn, tmp_path: Path) -> None:
    folder = tmp_path / "out" / "thing-state"
    write_state(folder, state())
    other = save(tmp_path / "out", "large.safetensors", b"not wanted")
    assert not upload(replace(OPTIONS, huggingface_path_in_repo="runs"), folder, other)
    hub.faults = Faults(rate=0.2, slow=0.2)
    hub.requests.clear()
    fetched = fetch_state(on_hub("owner/thing/runs/thing-state"), patience=QUICK)
    assert fetched != folder
    assert {file.name for file in fetched.iterdir()} == {file.name for file in folder.iterdir()}
    back = read_state(fetched)
    assert back.step == 3
    assert torch.equal(back.tensors["weight"], state().tensors["weight"])
    assert not any("large" in path for _, path in hub.requests)


def test_a_revision_brings_the_state_of_that_time(hub: StandIn, tmp_path: Path) -> None:
    for step in (3, 4):
        write_state(tmp_path / "out" / "thing-state", state(step))
        assert not upload(OPTIONS, tmp_path / "out" / "thing-state")
    first = hub.repos["model", "owner/thing"].commits[0][0]
    assert read_state(fetch_state(on_hub(f"owner/thing/thing-state:{first}"))).step == 3
    assert read_state(fetch_state(on_hub("owner/thing/thing-state"))).step == 4


def test_states_that_cannot_be_fetched(hub: StandIn, tmp_path: Path) -> None:
    write_state(tmp_path / "out" / "thing-state", state())
    assert not upload(OPTIONS, tmp_path / "out" / "thing-state")

    def says(text: str, **changes: object) -> str:
        wanted = on_hub(text)
        wanted = replace(wanted, repository=replace(wanted.repository, **changes))
        with pytest.raises(UserError) as caught:
            fetch_state(wanted, patience=Patience(first=0.01, longest=0.02, one=0.05))
        assert f"--resume {text}" in str(caught.value)
        assert TOKEN not in str(caught.value)
        return str(caught.value)

    assert "it is not there" in says("owner/thing/other-state")
    assert "it is not there" in says("owner/nothing/thing-state")
    assert "it is not there" in says("owner/thing/thing-state:v9")
    assert "the access token is refused" in says("owner/thing/thing-state", token="hf_wrong")
    hub.faults.status = 503
    assert "does not answer" in says("owner/thing/thing-state")
    hub.faults.status = None
    repo = hub.repos["model", "owner/thing"]
    repo.files = {**repo.files, "thing-state/model.safetensors": b"cut off"}
    repo.commits.append(("a" * 40, repo.files))
    assert "wrong size: model.safetensors" in says("owner/thing/thing-state")


# --- secrets


def test_the_token_is_in_no_message(
    hub: StandIn, tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG)
    hub.faults = Faults(rate=0.5)
    upload(OPTIONS, save(tmp_path / "out", "a.safetensors", b"x"))
    # A line break makes the header illegal, and the library's exception quotes it.
    broken = replace(OPTIONS, huggingface_token=f"{TOKEN}\n")
    refused = upload(broken, save(tmp_path / "out", "b.json", b"x"), patience=Patience(first=0.01, one=0.02))
    assert list(refused) == ["b.json"]
    check_access(broken)
    told = capfd.readouterr()
    for text in (caplog.text, told.out, told.err, str(refused)):
        assert TOKEN not in text
        assert "sealed" not in text, "nor the signature of an address to upload to"
