"""How quickly, and in how little memory, a run with a large data set comes to the point where models are loaded.

Run ``python benchmarks/dataset_start.py`` from the project's folder; with 100,000 images it needs about 1 GB of disk in
the temporary folder and some minutes. Three programs, each in a process of its own, are timed with the files in the
system's memory:

- bare loop: open each image with Pillow for its size, and read its caption file;
- first start: read the data set's description, scan, check, place in buckets and plan the first epoch, with nothing
  remembered from an earlier run;
- second start: the same again.

They take turns, and the shortest time of each counts: other programs only make a run longer. Beside the time on the
clock stands the time that the program itself had a CPU, which other programs disturb less.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
CONFIG = """
[[datasets]]
resolution = 64
enable_bucket = true
min_bucket_reso = 64
max_bucket_reso = 128
batch_size = 4

[[datasets.subsets]]
image_dir = "images"
caption_extension = ".txt"
"""
BARE_LOOP = """
from pathlib import Path
from PIL import Image
images = 0
for path in sorted(Path({folder!r}, "images").glob("*.jpg")):
    with Image.open(path) as image:
        width, height = image.size
    caption = path.with_suffix(".txt").read_text(encoding="utf-8").strip()
    images += 1
"""
START = """
import sys
from pathlib import Path
sys.path.insert(0, {root!r})
from library.data.config import read_spec
from library.data.lint import lint
from library.data.options import CacheOptions, CaptionOptions, ImageOptions, SourceOptions
from library.data.records import scan
from library.data.setup import prepare_data
source = SourceOptions(dataset_config=Path({folder!r}, "dataset.toml"))
spec, findings = read_spec(source, ImageOptions(), CaptionOptions(), CacheOptions())
records, found = scan(spec)
findings = [*findings, *found, *lint(spec, records)]
assert not [finding for finding in findings if finding.severity == "error"], findings
data = prepare_data(spec, records)
data.plan(0, accumulation=1, world=1).epoch(1)
images = len(data.records)
"""
MEASURED = """
import json, resource, time
began, cpu_began = time.perf_counter(), time.process_time()
{program}
seconds, cpu = time.perf_counter() - began, time.process_time() - cpu_began
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps([images, seconds, cpu, peak]))
"""
COLOURS = ("red", "blue", "green", "yellow", "black", "white", "brown", "silver")
THINGS = ("dog", "cat", "horse", "house", "tree", "river", "bicycle", "boat", "bridge", "chair", "street", "window")
PLACES = ("in the morning light", "on a meadow", "by the sea", "in the snow", "at night", "in a room", "under a tree")


def write_images(folder: Path, count: int) -> None:
    """``count`` small JPEGs of several sizes, no two of them alike, each with a caption file."""
    import numpy as np
    from PIL import Image

    folder.mkdir()
    coarse = np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    scene = np.asarray(Image.fromarray(coarse).resize((192, 192), Image.Resampling.BICUBIC))
    for number in range(count):
        width, height = 48 + 8 * (number % 5), 48 + 8 * (number // 5 % 5)
        left, top = number % 97, number // 97 % 89
        pixels = scene[top : top + height, left : left + width].copy()
        pixels[:8, :8] = (number % 256, number // 256 % 256, number // 65536)
        Image.fromarray(pixels).save(folder / f"{number:06d}.jpg", quality=85)
        words = f"a photo of a {COLOURS[number % 8]} {THINGS[number // 8 % 12]}, {PLACES[number // 96 % 7]}"
        (folder / f"{number:06d}.txt").write_text(f"{words}, number {number}\n", encoding="utf-8")


@dataclass(frozen=True, slots=True)
class Run:
    """What one run of a program took: seconds on the clock, seconds of a CPU, and peak resident set in bytes."""

    seconds: float
    cpu: float
    peak: int


def measure(program: str, *, cache: Path) -> tuple[int, Run]:
    """How many images ``program`` saw, and what it took in a process of its own."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    done = subprocess.run(
        [sys.executable, "-c", MEASURED.format(program=program)],
        check=True,
        cwd=cache,
        capture_output=True,
        text=True,
        env={
            **environment,
            "XDG_CACHE_HOME": str(cache),
            "OMP_NUM_THREADS": "1",
            # As in daily use, the modules are compiled once.
            "PYTHONPYCACHEPREFIX": f"{cache}.pyc",
        },
    )
    images, *figures = json.loads(done.stdout.splitlines()[-1])
    return images, Run(*figures)


def main() -> None:
    """Write the images, let the programs take turns, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=100_000, help="number of images (default: 100000)")
    parser.add_argument("--rounds", type=int, default=3, help="how often each program runs (default: 3)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_images(folder / "images", arguments.images)
        (folder / "dataset.toml").write_text(CONFIG, encoding="utf-8")
        loop, start = BARE_LOOP.format(folder=temporary), START.format(folder=temporary, root=str(ROOT))
        cache = folder / "cache"
        cache.mkdir()
        # Bring the files into memory and compile the modules, and are not counted.
        measure(loop, cache=cache)
        measure(start, cache=cache)
        time.sleep(3)  # a file that was written just now is not remembered
        results: dict[str, list[Run]] = {"bare loop": [], "first start": [], "second start": []}
        for _ in range(arguments.rounds):
            shutil.rmtree(cache)
            cache.mkdir()
            for name, program in (("bare loop", loop), ("first start", start), ("second start", start)):
                images, run = measure(program, cache=cache)
                assert images == arguments.images, f"{name} saw {images} images"
                results[name].append(run)
        remembered = sum(path.stat().st_size for path in cache.rglob("*.npz"))
        print_table(results, arguments.images, remembered)


def print_table(results: dict[str, list[Run]], images: int, remembered: int) -> None:
    """The shortest times of each program, ratios, and the highest peak."""
    clock = {name: min(run.seconds for run in runs) for name, runs in results.items()}
    cpu = {name: min(run.cpu for run in runs) for name, runs in results.items()}
    print(f"{images} images; shortest of {len(results['bare loop'])} runs, longest in brackets")
    for name, runs in results.items():
        peak = max(run.peak for run in runs)
        print(f"{name:14}{clock[name]:7.2f} s ({max(run.seconds for run in runs):.2f})", end="")
        print(f"{cpu[name]:7.2f} s of CPU ({max(run.cpu for run in runs):.2f})  {peak / 1e9:.3f} GB peak")
    for kind, shortest in (("clock", clock), ("CPU", cpu)):
        first = shortest["first start"] / shortest["bare loop"]
        second = shortest["second start"] / shortest["first start"]
        print(f"by {kind}: first start / bare loop {first:.2f}, second start / first start {second:.3f}")
    print(f"remembered: {remembered / 1e6:.1f} MB", flush=True)


if __name__ == "__main__":
    main()
