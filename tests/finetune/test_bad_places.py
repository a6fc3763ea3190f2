"""Every tool, given what people do give by mistake: it says so, ends with the right code, and loses nothing."""

import importlib
import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from library.errors import UserError
from tests.finetune.tiny_models import write_images
from tests.fresh import forget_accelerate
from tests.tiny import tiny_sd

SMALL = ("--max_resolution=64,64", "--min_bucket_reso=64", "--mixed_precision=no")


@dataclass(frozen=True, kw_only=True)
class Tool:
    """How a tool is called, and what it reads.

    Attributes:
        module: Its module.
        given: Its arguments; braces hold the names of places.
        source: What it reads: ``images`` (a folder) or a file.
        target: The folder that its results go to.
        metadata: The metadata file that it reads, where it reads one.
        decodes: Whether it looks at the pixels, so that a corrupt image matters.
    """

    module: str
    given: tuple[str, ...]
    source: str = "images"
    target: str = "images"
    metadata: str | None = None
    decodes: bool = False


CACHE = (
    "--pretrained_model_name_or_path={sd}",
    *("--train_data_dir={images}", "--resolution=64", "--min_bucket_reso=64", "--enable_bucket"),
)
TOOLS = {
    "captions": Tool(
        module="finetune.make_captions",
        given=("{images}", "--caption_weights={blip}", "--max_length=12", "--caption_extension=.made"),
        decodes=True,
    ),
    "captions by GIT": Tool(
        module="finetune.make_captions_by_git",
        given=("{images}", "--model_id={git}", "--max_length=8", "--caption_extension=.made"),
        decodes=True,
    ),
    "tags": Tool(
        module="finetune.tag_images_by_wd14_tagger",
        given=("{images}", "--model_dir={tagger}", "--caption_extension=.made"),
        decodes=True,
    ),
    "tags in one file": Tool(
        module="finetune.tag_images_by_wd14_tagger",
        given=("{images}", "--model_dir={tagger}", "--output_path={out}/meta.json", "--append_tags"),
        target="out",
        metadata="out/meta.json",
        decodes=True,
    ),
    "merged captions": Tool(
        module="finetune.merge_captions_to_metadata",
        given=("{images}", "{out}/meta.json"),
        target="out",
        metadata="out/meta.json",
    ),
    "merged tags": Tool(
        module="finetune.merge_dd_tags_to_metadata",
        given=("{images}", "{out}/new.json", "--in_json={meta}"),
        target="out",
        metadata="meta.json",
    ),
    "cleaning": Tool(
        module="finetune.clean_captions_and_tags",
        given=("{meta}", "{out}/new.json"),
        source="meta.json",
        target="out",
        metadata="meta.json",
    ),
    "latents": Tool(
        module="finetune.prepare_buckets_latents",
        given=("{images}", "{meta}", "{out}/new.json", "{sd}", *SMALL),
        target="out",
        metadata="meta.json",
        decodes=True,
    ),
    "latents, their files": Tool(
        module="finetune.prepare_buckets_latents", given=("{images}", "{meta}", "{out}/new.json", "{sd}", *SMALL)
    ),
    "smaller copies": Tool(
        module="tools.resize_images_to_resolution",
        given=("{images}", "{out}", "--max_resolution=16x16"),
        target="out",
        decodes=True,
    ),
    "conversion": Tool(
        module="tools.convert_diffusers20_original_sd",
        given=("{root}/model", "{out}/new.safetensors"),
        source="model",
        target="out",
    ),
    "the cache of training": Tool(
        module="tools.cache_latents", given=(*CACHE, "--in_json={meta}"), metadata="meta.json"
    ),
    "what a model says": Tool(
        module="tools.show_metadata", given=("--model={root}/model.safetensors",), source="model.safetensors", target=""
    ),
}
FOLDERS = [name for name, tool in TOOLS.items() if tool.source == "images" and name != "latents, their files"]


@pytest.fixture(scope="module")
def models(blip_folder: Path, git_folder: Path, tagger_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    sd = tiny_sd(tmp_path_factory.mktemp("models") / "sd", "sd1", layers_per_block=1)
    return {"blip": blip_folder, "git": git_folder, "tagger": tagger_dir, "sd": sd}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Three images with texts, metadata, and a folder for results that holds metadata too."""
    for image in write_images(tmp_path / "images", 3, size=(64, 64)):
        image.with_suffix(".caption").write_text("a caption")
        image.with_suffix(".txt").write_text("long_hair, tree")
    metadata = json.dumps({f"{number:03d}": {"caption": "old", "tags": "a_b"} for number in range(3)})
    (tmp_path / "meta.json").write_text(metadata)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "meta.json").write_text(metadata)
    return tmp_path


@dataclass(frozen=True)
class Ended:
    code: int
    said: str


@pytest.fixture
def run(models: dict, root: Path, capfd: pytest.CaptureFixture[str]) -> Callable[[Tool], Ended]:
    places = {**models, "root": root, "images": root / "images", "out": root / "out", "meta": root / "meta.json"}

    def start(tool: Tool) -> Ended:
        forget_accelerate()
        capfd.readouterr()
        try:
            code = importlib.import_module(tool.module).main([word.format(**places) for word in tool.given])
        except UserError as error:
            # As ``run_script`` has it, which every tool ends with.
            return Ended(2, str(error))
        return Ended(code, "".join(capfd.readouterr()))

    return start


def contents(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", [name for name in TOOLS if name != "latents, their files"])
def test_without_what_it_reads(name: str, run: Callable[[Tool], Ended], root: Path) -> None:
    tool, missing = TOOLS[name], root / TOOLS[name].source
    if missing.is_dir():
        shutil.rmtree(missing)
    else:
        missing.unlink(missing_ok=True)
    before = contents(root)
    ended = run(tool)
    assert ended.code == 2
    assert str(missing) in ended.said
    assert "not found" in ended.said or "no such" in ended.said.lower()
    assert contents(root) == before


@pytest.mark.parametrize("name", FOLDERS)
def test_an_empty_folder(name: str, run: Callable[[Tool], Ended], root: Path) -> None:
    shutil.rmtree(root / "images")
    (root / "images").mkdir()
    before = contents(root)
    ended = run(TOOLS[name])
    assert ended.code == 2
    assert "no image" in ended.said
    assert str(root / "images") in ended.said
    assert contents(root) == before


@pytest.mark.parametrize("name", [name for name in FOLDERS if name != "the cache of training"])
def test_corrupt_images_among_good_ones(name: str, run: Callable[[Tool], Ended], root: Path) -> None:
    tool, whole = TOOLS[name], (root / "images" / "000.png").read_bytes()
    (root / "images" / "001b.png").write_bytes(b"no image")
    (root / "images" / "001c.png").write_bytes(whole[: len(whole) // 2])
    before = contents(root)
    ended = run(tool)
    assert ended.code == (1 if tool.decodes else 0)
    made = contents(root)
    assert all(made[path] == content for path, content in before.items() if path != "out/meta.json")
    if tool.decodes:
        assert all(bad in ended.said for bad in ("001b.png", "001c.png"))
        good = {"000", "001", "002"}
        if tool.metadata is None or name == "latents":
            new = [Path(path).name for path in made.keys() - before.keys()]
            assert all(any(path.startswith(stem) for path in new) for stem in good)
        else:
            kept = json.loads(made["out/meta.json"])
            assert {Path(key).stem for key in kept} == good


@pytest.mark.parametrize("content", ["{", "", "[1, 2]", '"text"', '{"a": "b"}', '{"a": {"caption": 3}}', "\x00\x01"])
@pytest.mark.parametrize("name", [name for name, tool in TOOLS.items() if tool.metadata])
def test_json_that_is_broken_or_of_another_shape(
    name: str, content: str, run: Callable[[Tool], Ended], root: Path
) -> None:
    tool = TOOLS[name]
    assert tool.metadata is not None
    (root / tool.metadata).write_text(content)
    before = contents(root)
    ended = run(tool)
    assert ended.code == 2
    assert str(root / tool.metadata) in ended.said
    assert contents(root) == before


@pytest.fixture
def protected(root: Path) -> Iterator[Callable[[Path], None]]:
    """Makes a folder read-only for everyone: permission bits do not stop the superuser, a mount does."""
    mounted = []

    def protect(folder: Path) -> None:
        bound = subprocess.run(["mount", "--bind", folder, folder], check=False, capture_output=True)
        if bound.returncode != 0:
            pytest.skip("mounting is not permitted here")
        mounted.append(folder)
        subprocess.run(["mount", "-o", "remount,ro,bind", folder], check=True)

    yield protect
    for folder in mounted:
        subprocess.run(["umount", folder], check=True)


@pytest.mark.skipif(shutil.which("mount") is None, reason="there is no mount")
@pytest.mark.parametrize("name", [name for name, tool in TOOLS.items() if tool.target])
def test_a_read_only_folder(
    name: str, run: Callable[[Tool], Ended], root: Path, protected: Callable[[Path], None], models: dict
) -> None:
    tool = TOOLS[name]
    if tool.source == "model":
        shutil.copytree(models["sd"], root / "model")
    before = contents(root)
    protected(root / tool.target)
    ended = run(tool)
    assert ended.code == 2, ended.said
    assert str(root / tool.target) in ended.said
    assert "write" in ended.said
    assert contents(root) == before
