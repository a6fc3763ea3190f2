"""What computes a run, as far as its result depends on it: programs, packages, processor, threads."""

import platform
from collections.abc import Mapping
from importlib import metadata
from typing import Any, Final

PACKAGES: Final = (
    "torch", "diffusers", "transformers", "accelerate", "safetensors", "numpy", "Pillow", "bitsandbytes", "xformers",
)  # fmt: skip
_FURTHER: Final = (
    "opencv-python-headless", "lion-pytorch", "prodigyopt", "dadaptation", "schedulefree", "lycoris-lora",
)  # fmt: skip


def versions(names: tuple[str, ...] = PACKAGES) -> dict[str, str]:
    """Versions of the packages that are installed."""
    found = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def environment() -> dict[str, Any]:
    """What this process computes with, ready for JSON: nothing that tells whose machine it is."""
    import torch

    found: dict[str, Any] = {
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
