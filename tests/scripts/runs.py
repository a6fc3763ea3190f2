"""Running a training script as a user does, inside the test process, and reading what it left."""

import hashlib
import importlib
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
from PIL import Image

from tests.fresh import forget_accelerate

STEPS = 4


def write_images(folder: Path, count: int, *, size: tuple[int, int] = (64, 64), seed: int = 0) -> Path:
    """Write ``count`` noisy images with a caption each."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for number in range(count):
        pixels = rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:02d}.png")
        (folder / f"{number:02d}.txt").write_text(f"a thing, number {number}", encoding="utf-8")
    return folder


def write_dataset(folder: Path, *, batch_size: int = 2, images: int = 8, more: str = "") -> Path:
    """Write images and the TOML that describes them."""
    image_dir = write_images(folder / "images", images)
    config = folder / f"dataset-{batch_size}.toml"
    config.write_text(
        f"""
[general]
enable_bucket = true
caption_extension = ".txt"
{more}
[[datasets]]
resolution = 64
min_bucket_reso = 64
batch_size = {batch_size}

[[datasets.subsets]]
image_dir = '{image_dir.as_posix()}'
num_repeats = 1
""",
        encoding="utf-8",
    )
    return config


@dataclass(frozen=True)
class Run:
    """What a run left.

    Attributes:
        folder: The output folder.
        losses: ``loss/current`` of every step.
        code: The exit code.
    """

    folder: Path
    losses: list[float]
    code: int

    @property
    def files(self) -> set[str]:
        """Every file below the output folder, with the times in the names of previews left out."""
        return {path.relative_to(self.folder).as_posix() for path in self.folder.rglob("*") if path.is_file()}

    def tensor_hash(self, name: str = "last.safetensors") -> str:
        return tensor_hash(self.folder / name)


def tensor_hash(path: Path) -> str:
    """A hash of the tensors in a file, whatever its metadata."""
    from library.files import read_tensors

    digest = hashlib.sha256()
    for name, tensor in sorted(read_tensors(path).tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def script(name: str) -> ModuleType:
    return importlib.import_module(name)


def run_script(name: str, output: Path, *arguments: str) -> Run:
    """Run ``main`` of a script with output, log and fixed seed, and read what it left."""
    forget_accelerate()
    log = output / "log"
    code = script(name).main([f"--output_dir={output}", f"--logging_dir={log}", "--seed=7", *arguments])
    return Run(output, read_losses(log), code)


def read_losses(log: Path) -> list[float]:
    """``loss/current`` from the TensorBoard files below ``log``."""
    return read_scalars(log, "loss/current")


def read_scalars(log: Path, tag: str) -> list[float]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    values: list[float] = []
    for path in sorted(log.rglob("events*")):
        events = EventAccumulator(str(path))
        events.Reload()
        if tag in events.Tags()["scalars"]:
            values += [event.value for event in events.Scalars(tag)]
    return values
