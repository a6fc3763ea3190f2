"""A disk that is full before or in the middle of a save, at many places of it."""

import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from library.disk_space import CannotWriteError
from library.errors import UserError
from library.files import write_json, write_tensors, written_whole
from library.messages import kept_messages
from library.models.diffusers_folder import write_folder
from library.models.options import ModelOptions, PromptOptions
from library.models.stable_diffusion import load_stable_diffusion
from library.training.previews import write_png
from library.training.states import TrainingState, read_state, write_state
from tests.faults.disks import PAGE, SmallDisk
from tests.faults.runs import RESULT, after_steps, alone, arguments, names, train
from tests.scripts.runs import Run, read_losses, tensor_hash
from tests.tiny import tiny_sd

OFFSETS = 20
UNITS = {"B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9}
TENSORS = {f"layer{number}.weight": torch.randn(60, 100) for number in range(10)}
STATE = TrainingState(
    step=3,
    epoch=1,
    tensors=TENSORS,
    optimizer={"state": {0: {"exp_avg": torch.randn(20_000)}}, "param_groups": [{"lr": 0.1}]},
    scheduler={"last_epoch": 3},
    fingerprint={"options": {}, "data": ""},
)


def by_another_author(path: Path) -> None:
    """As a third-party network saves itself."""
    from safetensors.torch import save_file

    size = sum(tensor.nbytes for tensor in TENSORS.values())
    with written_whole(path, size=size) as temporary:
        save_file(TENSORS, temporary)


def noise(path: Path) -> None:
    write_png(path, Image.fromarray(np.random.default_rng(0).integers(0, 255, (200, 200, 3), np.uint8)), {})


Writer = Callable[[Path], None]
WRITERS: dict[str, Writer] = {
    "model.safetensors": partial(write_tensors, tensors=TENSORS, metadata={"ss_note": "x" * 9000}),
    "model.ckpt": partial(write_tensors, tensors=TENSORS, extra={"epoch": 1}),
    "other.safetensors": by_another_author,
    "thing-state": partial(write_state, state=STATE),
    "report.json": partial(write_json, content=["text"] * 20_000),
    "preview.png": noise,
}


def content(path: Path) -> dict[str, bytes]:
    files = [path] if path.is_file() else sorted(one for one in path.rglob("*") if one.is_file())
    return {str(one.relative_to(path)): one.read_bytes() for one in files}


def missing(error: CannotWriteError) -> float:
    """The bytes that are missing, as the message says."""
    number, unit = re.findall(r": ([\d.,]+) (\w+) are missing", str(error))[0]
    return float(number.replace(",", "")) * UNITS[unit]


def try_to_write(disk: SmallDisk, path: Path, write: Writer, *, within: float = 3 * PAGE) -> None:
    """Write at every offset where the disk may be full, then where it is not."""
    write(path)
    before, listed = content(path), names(disk.path)
    size = sum(map(len, before.values()))
    for offset in range(OFFSETS):
        # What is there stays until the new one is complete.
        disk.leave(size * offset // OFFSETS)
        free = disk.free
        with pytest.raises(CannotWriteError) as caught:
            write(path)
        assert names(disk.path) - {"ballast"} == listed
        assert content(path) == before
        # A preview says how large it is only when it is complete.
        if path.suffix != ".png":
            assert missing(caught.value) == pytest.approx(size - free, rel=0.01, abs=within)
    disk.empty()
    write(path)
    assert content(path).keys() == before.keys()


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("when", ["before", "during"])
def test_whatever_is_written_is_whole_or_as_it_was(
    name: str, when: str, disk: SmallDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    if when == "during":
        monkeypatch.setattr("library.disk_space.check_room", lambda path, size: None)
    try_to_write(disk, disk.path / name, WRITERS[name])


@pytest.mark.parametrize("safetensors", [True, False])
def test_a_model_folder_is_whole_or_as_it_was(safetensors: bool, disk: SmallDisk, tmp_path: Path) -> None:
    # Half of a tiny model is its table of words, of which few do here.
    source = tiny_sd(tmp_path / "base", layers_per_block=1, channels=(16, 16, 32, 32))
    model = load_stable_diffusion(ModelOptions(pretrained_model_name_or_path=str(source)), PromptOptions())
    model.text_encoder.resize_token_embeddings(64)
    saved = replace(model, text_encoder=model.text_encoder, origin=None)
    write = partial(write_folder, model=saved, safetensors=safetensors, dtype=torch.float16, metadata={})
    # The tokenizer and the configurations are only estimated.
    try_to_write(disk, disk.path / "thing", write, within=3e5)


def test_a_run_outlives_saves_that_fail(
    model: Path, plain: Callable[[int], Run], disk: SmallDisk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What could not be saved after the second step is missing; the third is saved again, and nothing else differs."""
    given = arguments(model, tmp_path, "--save_every_n_steps=1", "--save_state")
    whole = plain(4)
    after_steps(monkeypatch, {2: lambda: disk.leave(8 * PAGE), 3: disk.empty})
    run = train(disk.path / "out", *given, f"--logging_dir={tmp_path / 'log'}")
    assert run.code == 0
    assert read_losses(tmp_path / "log") == whole.losses
    lost = {name for name in whole.files if "step00000002" in name}
    assert lost
    assert run.files == {name for name in whole.files if not name.startswith("log/")} - lost
    assert run.tensor_hash(RESULT) == whole.tensor_hash(RESULT)
    said = [message.text for message in kept_messages()]
    assert len([text for text in said if "are missing" in text and "training goes on" in text]) == 2
    assert len([text for text in said if text.startswith("missing among the results: cannot write thing-step")]) == 2


def test_a_run_on_a_full_disk_ends_in_another_place_and_can_be_continued(
    model: Path, disk: SmallDisk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A state after the first step; then 20 saves with ever more room, none of which is enough."""
    steps = OFFSETS + 1
    given = arguments(model, tmp_path, steps=steps)
    places = alone(tmp_path / "places", monkeypatch)
    saving = ["--save_every_n_steps=1", "--save_state", f"--logging_dir={tmp_path / 'log'}", "--no_report"]
    sizes: list[int] = []

    def fill(number: int) -> None:
        size = (disk.path / "out" / "thing-step00000001.safetensors").stat().st_size
        sizes.append(size)
        disk.leave(size * number // OFFSETS)

    after_steps(monkeypatch, {2 + number: partial(fill, number) for number in range(OFFSETS)})
    with pytest.raises(UserError, match="are missing; it is in .* instead") as caught:
        train(disk.path / "out", *given, *saving)
    # The model and the state.
    assert len(caught.value.problems) == 2
    assert sum(1 for _ in sizes) == OFFSETS
    assert names(disk.path / "out") == {"thing-step00000001.safetensors", "thing-step00000001-state"}
    assert read_state(disk.path / "out" / "thing-step00000001-state").step == 1
    (rescued,) = places.glob("*/rescued-*")
    assert rescued.parent.name == "current"
    assert read_state(rescued / "thing-state").step == steps
    monkeypatch.undo()
    disk.empty()
    state = disk.path / "out" / "thing-step00000001-state"
    run = train(disk.path / "again", *given, f"--resume={state}", f"--logging_dir={tmp_path / 'log'}")
    # What was rescued is the result of the run, which nothing but its saves has disturbed.
    assert run.tensor_hash(RESULT) == tensor_hash(rescued / RESULT)


def test_nothing_takes_the_result(
    model: Path, disk: SmallDisk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("library.hooks.Rescue", partial(lambda made, **given: made(places=list), _rescue()))
    after_steps(monkeypatch, {2: lambda: disk.leave(PAGE)})
    given = arguments(model, tmp_path, "--save_every_n_steps=1", "--save_state", steps=2)
    with pytest.raises(UserError, match="are missing, nor to another place") as caught:
        train(disk.path / "out", *given, f"--logging_dir={tmp_path / 'log'}", "--no_report")
    assert "--resume" in str(caught.value)
    assert names(disk.path / "out") == {"thing-step00000001.safetensors", "thing-step00000001-state"}


def _rescue() -> Any:
    from library.training.rescue import Rescue

    return Rescue


def test_previews_the_log_and_the_report_do_without(
    model: Path, plain: Callable[[int], Run], disk: SmallDisk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They lie on the full disk, and the model does not: the run is as without them."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a thing --w 64 --h 64 --s 1 --d 1", encoding="utf-8")
    out = tmp_path / "out"
    out.mkdir()
    for name in ("sample", "log"):
        (disk.path / name).mkdir()
        (out / name).symlink_to(disk.path / name)
    given = arguments(model, tmp_path, "--sample_every_n_steps=1", f"--sample_prompts={prompts}")
    whole = plain(4)
    after_steps(monkeypatch, {2: lambda: disk.leave(0)})
    run = train(out, *given)
    assert run.code == 0
    assert run.tensor_hash(RESULT) == whole.tensor_hash(RESULT)
    said = [message.text for message in kept_messages()]
    assert len([text for text in said if "the preview of prompt 1 failed: cannot write" in text]) == 3
    assert len([name for name in disk.files if name.endswith(".png")]) == 1


def test_a_latent_cache_that_does_not_fit_is_not_begun(model: Path, disk: SmallDisk, tmp_path: Path) -> None:
    """The images lie on the full disk; what is there is used when there is room."""
    given = [*arguments(model, disk.path, steps=2), "--cache_latents_to_disk", "--cache_latents"]
    disk.leave(2 * PAGE)
    with pytest.raises(UserError, match=r"cached latents of 8 images: .* are missing") as caught:
        train(tmp_path / "out", *given)
    assert "--cache_latents" in str(caught.value)
    assert not [name for name in disk.files if name.endswith(".npz")]
    assert not names(tmp_path / "out") - {"log"} if (tmp_path / "out").exists() else True
    disk.empty()
    assert train(tmp_path / "out", *given).code == 0
