"""What every method learns, measured on the tiny model and its world, where a picture shows what was asked for or not.

Run ``python benchmarks/learning.py`` from the project's folder (about half an hour on two cores); ``--only NAME`` runs
one method. Each run is an ordinary command line of this project; the pictures judged are its own previews, before and
after training. Prints the figures of ``docs/learning.md``; ``--sheet FOLDER`` keeps the pictures.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "examples" / "tiny-sd"
QUICKSTART = ROOT / "examples" / "quickstart"
sys.path.insert(0, str(MODEL / "recipe"))

from shapes_world import (  # noqa: E402
    BACKGROUNDS,
    COLOURS,
    SHAPES,
    Pixels,
    Scene,
    classify,
    contact_sheet,
    interior,
    render,
    segment,
    with_article,
)

TOKEN = "shs"
SIZE = (128, 128)
COMMON = (f"--pretrained_model_name_or_path={MODEL}", "--seed=1", "--max_data_loader_n_workers=0", "--cache_latents")

ITALIAN = {
    **dict(zip(COLOURS, ("rosso", "verde", "blu", "giallo", "viola", "arancione", "rosa", "marrone"), strict=True)),
    **dict(
        zip(SHAPES, ("cerchio", "quadrato", "triangolo", "stella", "croce", "cuore", "rombo", "anello"), strict=True)
    ),
    **dict(zip(BACKGROUNDS, ("bianco", "grigio", "nero", "cielo", "tramonto"), strict=True)),
}


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A preview prompt and what its picture should show."""

    prompt: str
    scene: Scene


@dataclass(frozen=True, kw_only=True)
class Judged:
    """Pictures of one moment of a run, with what they should show."""

    asked: Sequence[Asked]
    pictures: Sequence[Pixels]

    def share(self, is_right: Callable[[Scene, Pixels], bool]) -> float:
        """The share of pictures that are right, 0..1."""
        pairs = zip(self.asked, self.pictures, strict=True)
        return float(np.mean([is_right(asked.scene, picture) for asked, picture in pairs]))

    def part(self, start: int, end: int) -> "Judged":
        """The pictures from ``start`` up to, not including, ``end``."""
        return Judged(asked=self.asked[start:end], pictures=self.pictures[start:end])


# --- what a picture shows --------------------------------------------------------------------------------------------


def shows_scene(scene: Scene, picture: Pixels) -> bool:
    """Shape, colour and background are those of ``scene``."""
    seen = classify(picture)
    return seen is not None and seen.scene == scene


def shows(part: str) -> Callable[[Scene, Pixels], bool]:
    """Whether ``part`` of a scene, its shape, colour or background, is the one asked for."""

    def is_right(scene: Scene, picture: Pixels) -> bool:
        seen = classify(picture)
        return seen is not None and getattr(seen.scene, part) == getattr(scene, part)

    return is_right


def shows_object(scene: Scene, picture: Pixels) -> bool:
    """Shape and colour are those of ``scene``."""
    seen = classify(picture)
    return seen is not None and (seen.scene.shape, seen.scene.colour) == (scene.shape, scene.colour)


def shows_striped(scene: Scene, picture: Pixels) -> bool:
    """The shape is that of ``scene`` and purple and yellow cover a quarter of it each, or more."""
    seen = classify(picture)
    return seen is not None and seen.scene.shape == scene.shape and min(stripe_colours(picture)) >= 0.25


def stripe_colours(picture: Pixels) -> tuple[float, float]:
    """The shares of the object that are purple and yellow, by the nearest of all colours."""
    found, _ = segment(picture)
    pixels = picture[interior(found) > 0].astype(np.float32)
    if not len(pixels):
        return 0.0, 0.0
    names = list(COLOURS)
    distances = [np.abs(pixels - np.float32(COLOURS[name])).sum(1) for name in names]
    nearest = np.argmin(distances, axis=0)
    purple, yellow = (float(np.mean(nearest == names.index(name))) for name in ("purple", "yellow"))
    return purple, yellow


# --- running a script ------------------------------------------------------------------------------------------------


def run(script: str, output: Path, asked: Sequence[Asked], steps: int, *options: str) -> tuple[Judged, Judged]:
    """Train with previews at the first and the last step; returns the judged pictures of both moments."""
    output.mkdir(parents=True, exist_ok=True)
    prompts = output / "prompts.txt"
    lines = (
        f"{one.prompt} --w {SIZE[0]} --h {SIZE[1]} --d {number + 1} --s 20 --l 4" for number, one in enumerate(asked)
    )
    prompts.write_text("\n".join(lines) + "\n", encoding="utf-8")
    command = [
        sys.executable,
        str(ROOT / script),
        *COMMON,
        f"--output_dir={output}",
        f"--max_train_steps={steps}",
        f"--sample_prompts={prompts}",
        "--sample_at_first",
        f"--sample_every_n_steps={steps}",
        *options,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stderr[-3000:]}")
    before, after = (Judged(asked=asked, pictures=previews(output, step, len(asked))) for step in (0, steps))
    return before, after


def previews(output: Path, step: int, count: int) -> list[Pixels]:
    """The previews of ``step``, in the order of their prompts."""
    found: dict[int, Pixels] = {}
    for path in sorted((output / "sample").glob("*.png")):
        with Image.open(path) as image:
            # The picture of all previews has no step of its own.
            if int(image.info.get("step", -1)) == step:
                found[int(image.info["seed"])] = np.asarray(image.convert("RGB"))
    assert sorted(found) == list(range(1, count + 1)), f"previews are missing in {output}"
    return [found[number] for number in sorted(found)]


def scenes(count: int, *, shape: str | None = None, colour: str | None = None) -> list[Scene]:
    """Scenes that go evenly through shapes, colours and backgrounds."""
    colours, grounds = list(COLOURS), list(BACKGROUNDS)
    return [
        Scene(
            shape=shape or SHAPES[number % len(SHAPES)],
            colour=colour or colours[(number + number // len(SHAPES)) % len(colours)],
            background=grounds[number % len(grounds)],
        )
        for number in range(count)
    ]


# --- the methods -----------------------------------------------------------------------------------------------------


def dreambooth(work: Path) -> list[str]:
    """Bind the token to stripes with the quickstart's pictures; with and without its regularisation pictures.

    How far the class drifts is told by prompts without the token: those of plain scenes, and those that leave the
    colour open, as no caption of the regularisation pictures does.
    """
    chosen = scenes(24)
    groups = (
        ("striped with the token", TOKEN, shows_striped),
        ("plain scenes right", None, shows_scene),
        ("striped without a colour", "", shows_striped),
    )
    asked = [Asked(prompt=caption(scene, colour), scene=scene) for _, colour, _ in groups for scene in chosen]
    lines = []
    for name, keeps in (("with regularisation", True), ("without regularisation", False)):
        folder = work / name.replace(" ", "-")
        moments = run(
            "train_db.py",
            folder,
            asked,
            1000,
            f"--dataset_config={striped_dataset(folder, keeps=keeps)}",
            "--learning_rate=1e-3",
            "--learning_rate_te=3e-3",
            "--lr_scheduler=cosine",
            "--lr_warmup_steps=100",
            "--min_snr_gamma=5",
            "--save_model_as=safetensors",
        )
        measured = []
        for number, (what, _, is_right) in enumerate(groups):
            part = (number * len(chosen), (number + 1) * len(chosen))
            first, last = (moment.part(*part).share(is_right) for moment in moments)
            measured.append(f"{what} {first:.2f} -> {last:.2f}")
        lines.append(f"train_db.py {name}: {', '.join(measured)}")
    return lines


def caption(scene: Scene, colour: str | None) -> str:
    """A sentence for ``scene``, with another word for its colour, or none ("")."""
    word = scene.colour if colour is None else colour
    return f"{with_article(' '.join(part for part in (word, scene.shape) if part))} on a {scene.background} background"


def striped_dataset(folder: Path, *, keeps: bool) -> Path:
    """The quickstart's data set, with its regularisation pictures where the class is kept."""
    text = (QUICKSTART / "dataset.toml").read_text(encoding="utf-8")
    folder.mkdir(parents=True)
    config = folder / "dataset.toml"
    config.write_text(text if keeps else text[: text.rindex("[[datasets.subsets]]")], encoding="utf-8")
    return config


def inversion(script: str) -> Callable[[Path], list[str]]:
    """Find the word for a pink star from 8 pictures."""

    def measure(work: Path) -> list[str]:
        images = work / "images"
        images.mkdir(parents=True)
        rng = np.random.default_rng(3)
        concept = scenes(8, shape="star", colour="pink")
        for number, scene in enumerate(concept):
            Image.fromarray(render(scene, SIZE, rng)).save(images / f"{number}.png")
            (images / f"{number}.txt").write_text(f"a {TOKEN} on a {scene.background} background", encoding="utf-8")
        config = work / "dataset.toml"
        config.write_text(
            f"[general]\ncaption_extension = '.txt'\n[[datasets]]\nresolution = 128\nbatch_size = 4\n"
            f"[[datasets.subsets]]\nimage_dir = '{images.as_posix()}'\nnum_repeats = 8\n",
            encoding="utf-8",
        )
        asked = [
            Asked(prompt=f"a {TOKEN} on a {scene.background} background", scene=scene)
            for scene in scenes(32, shape="star", colour="pink")
        ]
        before, after = run(
            script,
            work / "out",
            asked,
            300,
            f"--dataset_config={config}",
            f"--token_string={TOKEN}",
            "--init_word=shape",
            "--learning_rate=2e-2",
            "--lr_scheduler=cosine",
            "--min_snr_gamma=5",
            "--save_model_as=safetensors",
        )
        return [f"{script}: pink stars {before.share(shows_object):.2f} -> {after.share(shows_object):.2f}"]

    return measure


def fine_tuning(work: Path) -> list[str]:
    """Teach the model the world's words in another language."""
    images = work / "images"
    images.mkdir(parents=True)
    rng = np.random.default_rng(4)
    entries = {}
    for number, scene in enumerate(scenes(160)):
        path = images / f"{number:03d}.png"
        Image.fromarray(render(scene, SIZE, rng)).save(path)
        entries[path.as_posix()] = {"caption": in_italian(scene)}
    metadata = work / "meta.json"
    metadata.write_text(json.dumps(entries), encoding="utf-8")
    asked = [Asked(prompt=in_italian(scene), scene=scene) for scene in scenes(24)]
    before, after = run(
        "fine_tune.py",
        work / "out",
        asked,
        400,
        f"--in_json={metadata}",
        f"--train_data_dir={images}",
        "--resolution=128",
        "--train_batch_size=4",
        "--vae_batch_size=8",
        "--train_text_encoder",
        "--learning_rate=1e-3",
        "--learning_rate_te=3e-3",
        "--lr_scheduler=cosine",
        "--min_snr_gamma=5",
        "--save_model_as=diffusers_safetensors",
    )
    tests = (shows_scene, shows("shape"), shows("colour"), shows("background"))
    whole, shape, colour, ground = (f"{before.share(test):.2f} -> {after.share(test):.2f}" for test in tests)
    return [f"fine_tune.py: Italian captions right {whole}; shape {shape}, colour {colour}, background {ground}"]


def in_italian(scene: Scene) -> str:
    """The caption of ``scene`` in Italian."""
    return f"{ITALIAN[scene.shape]} {ITALIAN[scene.colour]} su sfondo {ITALIAN[scene.background]}"


METHODS: dict[str, Callable[[Path], list[str]]] = {
    "dreambooth": dreambooth,
    "textual_inversion": inversion("train_textual_inversion.py"),
    "xti": inversion("train_textual_inversion_XTI.py"),
    "fine_tuning": fine_tuning,
}


def main() -> None:
    """Run the methods and print a line for each measurement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=tuple(METHODS), help="the one method to run")
    parser.add_argument("--sheet", type=Path, help="folder for sheets of the pictures")
    options = parser.parse_args()
    for name, measure in METHODS.items():
        if options.only not in (None, name):
            continue
        with tempfile.TemporaryDirectory() as temporary:
            work = Path(temporary) / name
            work.mkdir()
            print("\n".join(measure(work)), flush=True)
            if options.sheet:
                keep_sheets(work, options.sheet, name)


def keep_sheets(work: Path, folder: Path, name: str) -> None:
    """Write one sheet of all previews for every run below ``work``."""
    folder.mkdir(parents=True, exist_ok=True)
    for samples in sorted(work.rglob("sample")):
        pictures = [np.asarray(Image.open(path).convert("RGB")) for path in sorted(samples.glob("*_*_*.png"))]
        target = folder / f"{name}-{samples.parent.name}.png"
        Image.fromarray(contact_sheet(pictures, 16)).save(target, optimize=True)
    shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    main()
