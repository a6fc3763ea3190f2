"""What every tool does with a folder or a file that is not as it should be: told, exit code, and nothing lost."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import Image

from finetune import (
    clean_captions_and_tags,
    make_captions,
    make_captions_by_git,
    merge_captions_to_metadata,
    merge_dd_tags_to_metadata,
    prepare_buckets_latents,
    tag_images_by_wd14_tagger,
)
from library.errors import UserError
from tests.permissions import bound_by_permissions, read_only
from tests.tiny import tiny_sd
from tools import cache_latents, resize_images_to_resolution

NAMES = ("00", "01", "ünïcode 图片 😀", "03")
BAD = "02-bad"


@dataclass(frozen=True)
class Place:
    """What tools work on: images with their text files, metadata, and where small models are."""

    root: Path
    models: dict[str, Path]

    @property
    def images(self) -> Path:
        return self.root / "images"

    @property
    def meta(self) -> Path:
        return self.root / "meta.json"

    @property
    def out(self) -> Path:
        return self.root / "written" / "out.json"

    def files(self) -> dict[str, bytes]:
        return {str(path.relative_to(self.root)): path.read_bytes() for path in self.root.rglob("*") if path.is_file()}


@dataclass(frozen=True)
class Tool:
    """A tool, and what it makes of four images: files that end in ``makes``, or entries of ``out``."""

    main: Callable[[list[str]], int]
    words: Callable[[Place], list[object]]
    makes: str | None = None
    reads: str | None = None
    """The text files that it reads in place of images."""
    json: str | None = None
    """The metadata file that it reads: ``meta`` or ``out``."""
    takes_folder: bool = True


TOOLS = {
    "captions": Tool(
        make_captions.main,
        lambda at: [at.images, f"--caption_weights={at.models['blip']}", "--max_length=8", "--caption_extension=.made"],
        makes=".made",
    ),
    "captions by GIT": Tool(
        make_captions_by_git.main,
        lambda at: [at.images, f"--model_id={at.models['git']}", "--max_length=8", "--caption_extension=.made"],
        makes=".made",
    ),
    "tags": Tool(
        tag_images_by_wd14_tagger.main,
        lambda at: [at.images, f"--model_dir={at.models['tagger']}", "--caption_extension=.made"],
        makes=".made",
    ),
    "tags in one file": Tool(
        tag_images_by_wd14_tagger.main,
        lambda at: [at.images, f"--model_dir={at.models['tagger']}", f"--output_path={at.out}"],
        json="out",
    ),
    "merging captions": Tool(
        merge_captions_to_metadata.main,
        lambda at: [at.images, at.out, "--full_path"],
        reads=".caption",
        json="out",
    ),
    "merging tags": Tool(
        merge_dd_tags_to_metadata.main,
        lambda at: ["--full_path", at.images, "--in_json", at.meta, at.out],
        reads=".txt",
        json="meta",
    ),
    "cleaning": Tool(clean_captions_and_tags.main, lambda at: [at.meta, at.out], json="meta", takes_folder=False),
    "latents": Tool(
        prepare_buckets_latents.main,
        lambda at: [
            *("--full_path", at.images, at.meta, at.out, at.models["sd"]),
            *("--max_resolution=64,64", "--min_bucket_reso=64"),
        ],
        makes=".npz",
        json="meta",
    ),
    "latent cache": Tool(
        cache_latents.main,
        lambda at: [
            *(f"--pretrained_model_name_or_path={at.models['sd']}", "--resolution=64", "--enable_bucket"),
            *("--min_bucket_reso=64", f"--train_data_dir={at.images}", f"--in_json={at.meta}"),
        ],
        makes=".npz",
        json="meta",
    ),
    "smaller copies": Tool(
        resize_images_to_resolution.main,
        lambda at: [at.images, at.root / "written", "--max_resolution=32x32"],
        makes="+32x32.jpg",
    ),
}
WITH_FOLDER = [name for name, tool in TOOLS.items() if tool.takes_folder]
WITH_JSON = [name for name, tool in TOOLS.items() if tool.json]


@pytest.fixture(scope="module")
def models(
    blip_folder: Path, git_folder: Path, tagger_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    sd = tiny_sd(tmp_path_factory.mktemp("models") / "sd", "sd1", layers_per_block=1)
    return {"blip": blip_folder, "git": git_folder, "tagger": tagger_dir, "sd": sd}


@pytest.fixture
def place(models: dict[str, Path], tmp_path: Path) -> Place:
    at = Place(tmp_path / "a folder", models)
    at.images.mkdir(parents=True)
    at.out.parent.mkdir()
    for number, name in enumerate(NAMES):
        Image.new("RGB", (64, 64), (50 * number, 0, 99)).save(at.images / f"{name}.png")
        (at.images / f"{name}.caption").write_text(f"caption {number}", encoding="utf-8")
        (at.images / f"{name}.txt").write_text(f"tag_{number}, tree", encoding="utf-8")
    entries = {str(at.images / f"{name}.png"): {"caption": f"old {name}"} for name in NAMES}
    at.meta.write_text(json.dumps(entries))
    return at


def run(name: str, at: Place, *, without_words: bool = False) -> int:
    words = [] if without_words else [str(word) for word in TOOLS[name].words(at)]
    return TOOLS[name].main(words)


def refusal(name: str, at: Place, **more: bool) -> str:
    """What the tool says that it refuses; everything stays as it is."""
    before = at.files()
    with pytest.raises(UserError) as caught:
        run(name, at, **more)
    assert at.files() == before
    for problem in caught.value.problems:
        assert problem.where, problem
        assert problem.remedy, problem
    return str(caught.value)


def results(name: str, at: Place) -> set[str]:
    """The images that have a result."""
    makes = TOOLS[name].makes
    if makes is None:
        return {Path(key).stem for key in json.loads(at.out.read_text())}
    made = [path for path in at.root.rglob(f"*{makes}") if path.is_file()]
    return {path.name.removesuffix(makes).partition("_0064x0064_sd")[0] for path in made}


@pytest.mark.parametrize("name", TOOLS)
def test_good_files(name: str, place: Place) -> None:
    assert run(name, place) == 0
    assert results(name, place) == set(NAMES)


@pytest.mark.parametrize("name", TOOLS)
def test_nothing_given(name: str, place: Place) -> None:
    told = refusal(name, place, without_words=True)
    assert "is missing" in told or "no base model is given" in told


@pytest.mark.parametrize("name", WITH_FOLDER)
def test_no_folder(name: str, place: Place) -> None:
    place.images.rename(place.root / "image")
    told = refusal(name, place)
    assert "not found" in told
    assert "did you mean" in told.lower()


@pytest.mark.parametrize("name", WITH_FOLDER)
def test_an_empty_folder(name: str, place: Place) -> None:
    shutil.rmtree(place.images)
    place.images.mkdir()
    told = refusal(name, place)
    assert "no images" in told or "4 of 4 entries match no image" in told


@pytest.mark.parametrize("content", ["", "broken"])
@pytest.mark.parametrize("name", [name for name in WITH_FOLDER if name != "latent cache"])
def test_a_file_that_cannot_be_read_among_good_ones(
    name: str, content: str, place: Place, capfd: pytest.CaptureFixture[str]
) -> None:
    whole = (place.images / "00.png").read_bytes()
    (place.images / f"{BAD}.png").write_bytes(whole[: len(whole) - 40] if content else b"")
    if suffix := TOOLS[name].reads:
        (place.images / f"{BAD}{suffix}").write_bytes(b"caf\xe9")
    before = place.files()
    assert run(name, place) == 1
    assert BAD in capfd.readouterr().err
    assert results(name, place) == set(NAMES)
    assert before.items() <= place.files().items()


def test_filling_the_cache_of_training_is_refused_as_training_is(place: Place) -> None:
    (place.images / f"{NAMES[1]}.png").write_bytes(b"")
    assert f"{NAMES[1]}.png" in refusal("latent cache", place)


BROKEN = {
    "empty": "",
    "broken": '{"00": {"caption": ',
    "a list": '[{"caption": "a cat"}]',
    "a number": "5",
    "texts": '{"00": "a cat"}',
    "another field": '{"00": {"caption": ["a cat"]}}',
    "no text": b"\xff\x00\x01",
    "nested": "[" * 100_000,
}


@pytest.mark.parametrize("content", BROKEN)
@pytest.mark.parametrize("name", WITH_JSON)
def test_metadata_that_cannot_be_used(name: str, content: str, place: Place) -> None:
    file = getattr(place, TOOLS[name].json or "")
    text = BROKEN[content]
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert file.name in refusal(name, place)


@pytest.mark.parametrize("name", [name for name in WITH_JSON if name != "latent cache"])
def test_a_folder_in_place_of_a_metadata_file(name: str, place: Place) -> None:
    place.out.mkdir()
    assert "is a folder" in refusal(name, place)


@pytest.mark.parametrize("name", TOOLS)
def test_a_place_that_may_not_be_written_to(name: str, place: Place) -> None:
    with read_only(place.root):
        told = bound_by_permissions(lambda: refusal(name, place))
    assert "cannot write" in told or "write protection" in told
    # With the protection lifted, the same command does its work.
    assert run(name, place) == 0
    assert results(name, place) == set(NAMES)


@pytest.mark.parametrize("name", ["tags in one file", "merging captions", "merging tags", "cleaning", "latents"])
def test_a_file_that_is_no_metadata_is_not_replaced(name: str, place: Place) -> None:
    # Before any work: latents of thousands of images take hours.
    place.out.write_text("notes of mine")
    assert place.out.name in refusal(name, place)
