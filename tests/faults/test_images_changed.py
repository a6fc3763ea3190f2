"""Images, masks, captions and cached latents that are deleted or replaced while a run trains on them."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from library.errors import UserError
from tests.faults.runs import RESULT, after_steps, arguments, names, train
from tests.scripts.runs import Run


def every_file(folder: Path, pattern: str, change: Callable[[Path], object]) -> Callable[[], None]:
    def happen() -> None:
        for path in sorted(folder.glob(pattern)):
            change(path)

    return happen


def broken_off(
    output: Path, given: list[str], monkeypatch: pytest.MonkeyPatch, event: Callable[[], object], match: str
) -> UserError:
    """A run that meets ``event`` after its second step and ends in the middle of its first epoch."""
    with monkeypatch.context() as patch:
        after_steps(patch, {2: event})
        with pytest.raises(UserError, match=match) as caught:
            train(output, *given)
    assert names(output) == {"thing-step00000002.safetensors", "thing-step00000002-state", "log", "thing-report.html"}
    return caught.value


def continued(output: Path, given: list[str]) -> Run:
    return train(output, *given, f"--resume={output / 'thing-step00000002-state'}")


def test_a_deleted_image_ends_the_run_which_continues_when_it_is_back(
    model: Path, plain: Callable[[int], Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker has made some batches ahead."""
    given = [*arguments(model, tmp_path, steps=8), "--max_data_loader_n_workers=1"]
    images = tmp_path / "images"
    shutil.copytree(images, tmp_path / "copy")
    with monkeypatch.context() as patch:
        after_steps(patch, {2: every_file(images, "*.png", Path.unlink)})
        with pytest.raises(UserError, match="image not found") as caught:
            train(tmp_path / "out", *given)
    assert str(images) in str(caught.value.problems[0].where)
    (state,) = (tmp_path / "out").glob("*-state")
    for copy in (tmp_path / "copy").glob("*.png"):
        shutil.copy2(copy, images)
    run = train(tmp_path / "out", *given, f"--resume={state}")
    assert run.tensor_hash(RESULT) == plain(8).tensor_hash(RESULT)


def test_an_image_that_has_another_size_or_is_damaged(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = arguments(model, tmp_path)
    images = tmp_path / "images"

    def shrink(path: Path) -> None:
        Image.new("RGB", (32, 32)).save(path)

    broken_off(tmp_path / "a", given, monkeypatch, every_file(images, "*.png", shrink), "32x32 pixels, but was 64x64")
    given = arguments(model, tmp_path)

    def truncate(path: Path) -> None:
        path.write_bytes(path.read_bytes()[:100])

    broken_off(tmp_path / "b", given, monkeypatch, every_file(images, "*.png", truncate), "cannot read the image")


@pytest.mark.parametrize("cache", [["--cache_latents"], ["--cache_latents", "--cache_latents_to_disk"]])
def test_cached_images_and_captions_are_not_missed(
    cache: list[str], model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = [*arguments(model, tmp_path), *cache]
    plain = train(tmp_path / "plain", *given)
    images = tmp_path / "images"
    gone = [every_file(images, "*.png", Path.unlink), every_file(images, "*.txt", Path.unlink)]
    after_steps(monkeypatch, {2: lambda: [happen() for happen in gone]})
    run = train(tmp_path / "out", *given)
    assert names(images) == ({path.name for path in images.glob("*.npz")} if "disk" in cache[-1] else set())
    assert run.tensor_hash(RESULT) == plain.tensor_hash(RESULT)


def test_captions_are_read_once(
    model: Path, plain: Callable[[int], Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = arguments(model, tmp_path)
    after_steps(monkeypatch, {2: every_file(tmp_path / "images", "*.txt", Path.unlink)})
    assert train(tmp_path / "out", *given).tensor_hash(RESULT) == plain(4).tensor_hash(RESULT)


@pytest.mark.parametrize("change", ["deleted", "damaged"])
def test_a_cache_on_disk_that_is_lost_is_made_again_at_the_next_start(
    change: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = [*arguments(model, tmp_path), "--cache_latents", "--cache_latents_to_disk"]
    plain = train(tmp_path / "plain", *given)
    happen = Path.unlink if change == "deleted" else lambda path: path.write_bytes(path.read_bytes()[:-9])
    event = every_file(tmp_path / "images", "*.npz", happen)
    broken_off(tmp_path / "out", given, monkeypatch, event, "gone or were changed during the run")
    assert continued(tmp_path / "out", given).tensor_hash(RESULT) == plain.tensor_hash(RESULT)


def test_a_deleted_mask(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = arguments(model, tmp_path)
    masks = shutil.copytree(tmp_path / "images", tmp_path / "masks", ignore=shutil.ignore_patterns("*.txt"))
    toml = tmp_path / "dataset-2.toml"
    toml.write_text(f"{toml.read_text()}conditioning_data_dir = '{masks.as_posix()}'\n")
    given += ["--masked_loss"]
    event = every_file(masks, "*.png", Path.unlink)
    error = broken_off(tmp_path / "out", given, monkeypatch, event, "image not found")
    assert str(masks) in str(error.problems[0].where)
