"""Tensor files: safe to read, written whole."""

import hashlib
import json
import os
import pickle
import shutil
import struct
import sys
import types
from pathlib import Path

import pytest
import torch

from library.errors import UserError
from library.files import (
    discard,
    folder_written_whole,
    legacy_hash_of_file,
    read_header,
    read_metadata,
    read_tensors,
    sha256_of_file,
    sweep,
    tensor_hashes,
    write_json,
    write_tensors,
    written_whole,
)

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "hashes.json").read_text())
TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "n": torch.tensor(3)}


def make_tensors(label: str) -> dict[str, torch.Tensor]:
    if label == "2MiB":
        return {"w": torch.arange(600000).float() / torch.arange(1000).half().sum()}
    return {
        "a.lora_down.weight": torch.arange(8).float().reshape(2, 4),
        "a.lora_up.weight": torch.ones(3, 2),
        "a.alpha": torch.tensor(1.0),
    }


@pytest.mark.parametrize("case", [case for case in GOLDEN["cases"] if case["label"].startswith("small")])
def test_network_hashes_are_those_other_programs_compute(case: dict) -> None:
    model_hash, old_hash = tensor_hashes(make_tensors(case["label"]), case["metadata"])
    assert model_hash == case["sshs_model_hash"]
    assert old_hash == case["sshs_legacy_hash"]


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt", ".pt"])
def test_tensors_come_back(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"x{suffix}"
    write_tensors(path, TENSORS, metadata={"ss_v2": "False"}, dtype=torch.float16)
    back = read_tensors(path)
    assert back.tensors["a"].dtype == torch.float16
    assert back.tensors["n"].dtype == torch.int64
    assert torch.equal(back.tensors["a"].float(), TENSORS["a"])
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such permissions")
def test_others_may_read_what_the_mask_allows(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_tensors(path, TENSORS)
    (tmp_path / "usual").write_text("")
    assert path.stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_metadata_is_read_without_tensors(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_tensors(path, TENSORS, metadata={"modelspec.title": "é"})
    assert read_metadata(path) == {"modelspec.title": "é"}
    assert read_header(path)["a"]["shape"] == [2, 3]


def test_the_same_content_makes_the_same_file(tmp_path: Path) -> None:
    metadata = {f"key {number}": f'"é\n\\ {number}\u2028' for number in range(20)}
    for name in ("one", "two"):
        write_tensors(tmp_path / f"{name}.safetensors", TENSORS, metadata=metadata)
    assert (tmp_path / "one.safetensors").read_bytes() == (tmp_path / "two.safetensors").read_bytes()
    back = read_tensors(tmp_path / "one.safetensors")
    assert back.metadata == metadata
    assert torch.equal(back.tensors["a"], TENSORS["a"])


def test_a_view_does_not_drag_its_storage_along(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    write_tensors(path, {"row": torch.zeros(1000, 1000)[0]})
    assert path.stat().st_size < 20_000


def test_extra_values_stand_beside_the_tensors(tmp_path: Path) -> None:
    path = tmp_path / "x.ckpt"
    write_tensors(path, TENSORS, extra={"epoch": 3, "global_step": 40})
    back = read_tensors(path)
    assert back.extra == {"epoch": 3, "global_step": 40}
    assert set(back.tensors) == set(TENSORS)


class Bomb:
    def __reduce__(self):
        return (print, ("code from the file ran",))


def test_a_pickle_with_code_is_refused_and_does_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "bomb.ckpt"
    torch.save({"state_dict": {"w": torch.ones(1)}, "callbacks": Bomb()}, path)
    with pytest.raises(UserError, match="could run code") as refusal:
        read_tensors(path)
    assert "safetensors" in str(refusal.value)
    assert capsys.readouterr().out == ""


def test_the_first_checkpoints_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They carry an object of their trainer's class."""
    name = "pytorch_lightning.callbacks.model_checkpoint"
    module = types.ModuleType(name)
    module.ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": name})
    for part in ("pytorch_lightning", "pytorch_lightning.callbacks", name):
        monkeypatch.setitem(sys.modules, part, module)
    path = tmp_path / "sd.ckpt"
    torch.save({"state_dict": TENSORS, "callbacks": {module.ModelCheckpoint: {"best": 0.1}}}, path)
    assert set(read_tensors(path).tensors) == set(TENSORS)


@pytest.mark.parametrize(
    "content",
    [b"", b"\x00" * 7, struct.pack("<Q", 2**60) + b"{}", struct.pack("<Q", 2) + b"[]", struct.pack("<Q", 4) + b"nope"],
)
def test_a_damaged_safetensors_file_is_the_users_error(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    for read in (read_tensors, read_header):
        with pytest.raises(UserError, match="not a readable safetensors file"):
            read(path)


@pytest.mark.parametrize("content", [b"", b"text", pickle.dumps([1, 2])])
def test_a_damaged_torch_file_is_the_users_error(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.ckpt"
    path.write_bytes(content)
    with pytest.raises(UserError):
        read_tensors(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="file not found: gone.pt"):
        read_tensors(tmp_path / "gone.pt")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_never_written(value: float, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_tensors(path, TENSORS)
    before = path.read_bytes()
    with pytest.raises(UserError, match="refusing to save: bad"):
        write_tensors(path, {"bad": torch.tensor([1.0, value])})
    assert path.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


def test_a_failed_write_leaves_the_former_file(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_json(path, {"a": 1})

    def cut_off() -> None:
        with written_whole(path) as temporary:
            temporary.write_text("half")
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        cut_off()
    assert json.loads(path.read_text()) == {"a": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.json"]


def test_a_file_that_another_program_holds_is_kept_beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.json"
    replace = os.replace

    def held(source: Path, target: Path) -> None:
        if target == path:
            raise PermissionError
        replace(source, target)

    monkeypatch.setattr("library.files.os.replace", held)
    with pytest.raises(UserError, match="held by another program"):
        write_json(path, {"a": 1})
    (kept,) = tmp_path.iterdir()
    assert kept.name.startswith("x-")
    assert json.loads(kept.read_text()) == {"a": 1}


def test_a_folder_that_cannot_be_written_is_the_users_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write x.json"):
        write_json(tmp_path / "file" / "x.json", {})


def test_every_kind_of_number_is_written_for_every_reader(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    kinds = (
        *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
        *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
    )
    tensors = {str(kind): torch.tensor([[0, 1, 1], [1, 0, 1]]).to(kind).t() for kind in kinds}
    tensors |= {"scalar": torch.tensor(7, dtype=torch.int16), "empty": torch.zeros(0, 3), "Größe": torch.ones(1)}
    eight = {str(kind): torch.ones(3).to(kind) for kind in (torch.float8_e4m3fn, torch.float8_e5m2)}
    write_tensors(tmp_path / "x.safetensors", tensors, kept=eight, metadata={"a": "Größe"})
    tensors |= eight
    back = load_file(tmp_path / "x.safetensors")
    assert {name: tensor.dtype for name, tensor in back.items()} == {name: t.dtype for name, t in tensors.items()}
    assert all(torch.equal(back[name].double(), tensor.double()) for name, tensor in tensors.items())
    write_tensors(tmp_path / "none.safetensors", {})
    assert load_file(tmp_path / "none.safetensors") == {}


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_what_is_kept_stays_as_it_is(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"x{suffix}"
    kept = {"k": torch.tensor([1.0, float("inf")], dtype=torch.float64)}
    write_tensors(path, TENSORS, kept=kept, dtype=torch.bfloat16)
    back = read_tensors(path, mapped=True).tensors
    assert {name: tensor.dtype for name, tensor in back.items()} == {
        "a": torch.bfloat16, "n": torch.int64, "k": torch.float64
    }  # fmt: skip
    assert torch.equal(back["k"], kept["k"])


def test_a_torch_file_is_mapped_or_read(tmp_path: Path) -> None:
    write_tensors(tmp_path / "new.ckpt", TENSORS)
    torch.save(TENSORS, tmp_path / "old.ckpt", _use_new_zipfile_serialization=False)
    for name in ("new.ckpt", "old.ckpt"):
        assert torch.equal(read_tensors(tmp_path / name, mapped=True).tensors["a"], TENSORS["a"])


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_a_file_cut_off_by_the_disk_never_gets_the_name(
    suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from library import files

    check = files._check_whole

    def shortened(path: Path) -> None:
        os.truncate(path, path.stat().st_size - 1)
        check(path)

    monkeypatch.setattr("library.files._check_whole", shortened)
    with pytest.raises(UserError, match="not whole"):
        write_tensors(tmp_path / f"x{suffix}", TENSORS)
    assert not list(tmp_path.iterdir())


def test_a_file_does_not_replace_a_folder(tmp_path: Path) -> None:
    (tmp_path / "x.json").mkdir()
    with pytest.raises(UserError, match=r"x.json is a folder; the new content is in x-\w{6}.json"):
        write_json(tmp_path / "x.json", {"a": 1})
    assert len(list(tmp_path.glob("x-*.json"))) == 1


def write_folder(folder: Path, content: str, *, may_replace: bool = True) -> None:
    with folder_written_whole(folder, may_replace=lambda _: may_replace) as target:
        (target / "file").write_text(content)
        if content == "half":
            raise RuntimeError("power cut")


def contents(folder: Path) -> dict[str, str]:
    return {entry.parent.name: entry.read_text() for entry in folder.glob("*/file")}


def test_a_folder_is_replaced_when_the_new_one_is_complete(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "result"
    write_folder(folder, "one")
    write_folder(folder, "two")
    with pytest.raises(RuntimeError, match="power cut"):
        write_folder(folder, "half")
    assert contents(folder.parent) == {"result": "two"}
    assert [entry.name for entry in folder.parent.iterdir()] == ["result"]


def test_what_may_not_be_replaced_stays(tmp_path: Path) -> None:
    write_folder(tmp_path / "result", "one")
    with pytest.raises(UserError, match="is something else, and is not replaced; the new content is in result-"):
        write_folder(tmp_path / "result", "two", may_replace=False)
    assert sorted(contents(tmp_path).values()) == ["one", "two"]
    assert contents(tmp_path)["result"] == "one"


def test_a_folder_that_is_held_keeps_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace = os.replace
    write_folder(tmp_path / "result", "one")

    def held(source: Path, target: Path) -> None:
        if target == tmp_path / "result" and source.name.startswith(".writing"):
            raise PermissionError
        replace(source, target)

    monkeypatch.setattr("library.files.os.replace", held)
    with pytest.raises(UserError, match="held by another program; the new content is in result-"):
        write_folder(tmp_path / "result", "two")
    assert contents(tmp_path)["result"] == "one"
    assert sorted(contents(tmp_path).values()) == ["one", "two"]


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_replacement_that_was_killed_is_mended(moment: str, tmp_path: Path) -> None:
    """Killed between the two renames, or before the former folder was removed; with another folder half made."""
    write_folder(tmp_path / ".replaced-result", "one")
    (tmp_path / ".writing-0123abcd-result").mkdir()
    (tmp_path / ".writing-0123abcd-other-result").mkdir()
    if moment == "after":
        write_folder(tmp_path / "result", "two")
    with pytest.raises(RuntimeError, match="power cut"):
        write_folder(tmp_path / "result", "half")
    assert contents(tmp_path) == {"result": "one" if moment == "before" else "two"}
    assert {entry.name for entry in tmp_path.iterdir()} == {"result", ".writing-0123abcd-other-result"}


def test_file_hashes(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    path.write_bytes(bytes(0x100000) + b"q" * 0x20000)
    assert legacy_hash_of_file(path) == hashlib.sha256(b"q" * 0x10000).hexdigest()[:8]
    assert sha256_of_file(path) == hashlib.sha256(path.read_bytes()).hexdigest()


def test_what_killed_processes_left_is_mended(tmp_path: Path) -> None:
    """Files in the making, also within others in the making, go; a replacement cut off is undone; others stay."""
    (tmp_path / ".writing-0123abcd-run.safetensors").touch()
    (tmp_path / ".writing-0123abcd-.writing-89ab4567-run.safetensors").touch()
    (tmp_path / ".writing-0123abcd-run-state").mkdir()
    (tmp_path / ".replaced-run-state").mkdir()
    (tmp_path / ".replaced-run-state" / "x").write_text("former")
    (tmp_path / ".writing-0123abcd-other.safetensors").touch()
    (tmp_path / ".hidden-run").touch()
    sweep(tmp_path, lambda name: name.startswith("run"))
    left = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")}
    assert left == {"run-state", "run-state/x", ".writing-0123abcd-other.safetensors", ".hidden-run"}
    sweep(tmp_path / "nowhere", lambda name: True)


def test_a_folder_that_is_removed_is_never_there_in_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "run-state"
    folder.mkdir()
    (folder / "x").touch()
    monkeypatch.setattr(shutil, "rmtree", lambda path: pytest.fail("killed") if path == folder else None)
    discard(folder)
    assert not folder.exists()
    (tmp_path / "file").touch()
    discard(tmp_path / "file")
    assert not (tmp_path / "file").exists()
