"""What computes a run, as far as its result depends on it: programs, packages, processor, threads."""

import hashlib
import platform
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, Final

from library.training.metadata import IMPLEMENTATION_VERSION

PACKAGES: Final = (
    "torch", "diffusers", "transformers", "accelerate", "safetensors", "numpy", "Pillow", "bitsandbytes", "xformers",
)  # fmt: skip
_FURTHER: Final = (
    "opencv-python-headless", "lion-pytorch", "prodigyopt", "dadaptation", "schedulefree", "lycoris-lora",
)  # fmt: skip
_ROOT: Final = Path(__file__).parents[2]


def versions(names: tuple[str, ...] = PACKAGES) -> dict[str, str]:
    """Versions of the packages that are installed."""
    found = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def source_digest() -> str:
    """A digest of the program's own source, which may change between two versions of it."""
    digest = hashlib.sha256()
    files = [
        *_ROOT.glob("*.py"),
        *(file for folder in ("library", "networks") for file in _ROOT.glob(f"{folder}/**/*.py")),
    ]
    for file in sorted(files):
        # Git may have given the lines other ends.
        content = file.read_bytes().replace(b"\r\n", b"\n")
        digest.update(f"{file.relative_to(_ROOT).as_posix()} {len(content)}\n".encode() + content)
    return digest.hexdigest()[:16]


def environment() -> dict[str, Any]:
    """What this process computes with, ready for JSON: nothing that tells whose machine it is."""
    import torch

    found: dict[str, Any] = {
        "program": IMPLEMENTATION_VERSION,
        "source": source_digest(),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "packages": versions((*PACKAGES, *_FURTHER)),
        "processor": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
        found["cuda"] = torch.version.cuda
        found["cudnn"] = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
    return found


def environment_differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between two environments, a line each; packages that only one of them has are told, too."""
    old, new = ({**one, **one.get("packages", {})} for one in (before, now))
    names = [name for name in dict.fromkeys([*old, *new]) if name != "packages"]
    return [
        f"{name}: {old.get(name, 'none')}, now {new.get(name, 'none')}"
        for name in names
        if old.get(name) != new.get(name)
    ]
