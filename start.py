#!/usr/bin/env python3
"""Make the environment, show the program at work, or test it: ``python3 start.py setup | demo | test``.

Needs nothing but Python 3.11 and a connection to a package index. Everything is installed into the folder ``.venv``
beside this file; a second run finds it there and starts in seconds.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections import deque
from pathlib import Path

# This file must be readable by older Pythons, so that they can say what they lack.
OLDEST_PYTHON = (3, 11)
TORCH = "torch==2.13.0"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
WINDOWS_CUDA_INDEX = "https://download.pytorch.org/whl/cu130"
DISK_NEEDED = {"cpu": 2.0, "cuda": 9.0}  # GB, of which about a quarter is for the downloads
ROOT = Path(__file__).resolve().parent
DEMO_CONFIG = Path("examples/quickstart/train.toml")
DEMO_OUTPUT = Path("outputs/quickstart")
LOG_LINES_SHOWN = 12
# What the log of a failed installation says, in lower case, and what to do about it.
REMEDIES = (
    (
        ("no space left", "errno 28", "not enough space", "disk quota"),
        "The disk is full: free about {disk:.0f} GB and run the same command again.",
    ),
    (
        ("name resolution", "connection", "timed out", "timeout", "unreachable", "getaddrinfo", "proxy", "ssl"),
        "The package index was not reached: check the connection or the proxy, and run the same command again.",
    ),
    (
        ("permission denied", "access is denied", "read-only file system"),
        "This folder cannot be written to: move the project to a folder of your own, or close what uses .venv.",
    ),
    (
        ("no matching distribution", "could not find a version"),
        "A package has no build for this Python ({python}) on this machine: try Python 3.11 or 3.12.",
    ),
)


class SetupError(Exception):
    """Something the user has to mend; its text says what and how."""


class Environment:
    """The virtual environment of the project.

    It remembers what was installed by a hash of the requirement files, and that an installation is under way by a mark
    that only a finished or cleanly failed one removes.

    Args:
        root: Folder of the project.
    """

    def __init__(self, root: Path = ROOT) -> None:
        self.root = root
        self.folder = root / ".venv"
        self.log = self.folder / "setup.log"
        self._stamp = self.folder / "installed.json"
        self._under_way = self.folder / "installing"

    @property
    def python(self) -> Path:
        """Its interpreter."""
        return self.folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")

    def prepare(self, *, for_tests: bool) -> None:
        """Make or repair the environment and install what is missing.

        Raises:
            SetupError: It cannot be made.
        """
        self._create()
        self._install("requirements.txt", torch=True)
        if has_nvidia_gpu():
            self._install("requirements-cuda.txt")
        if for_tests:
            for name in ("requirements-optim.txt", "requirements-tagger.txt", "requirements-dev.txt"):
                self._install(name)

    def _create(self) -> None:
        if self._under_way.exists():
            print("The last set-up was interrupted: starting over.")
        elif self._works():
            return
        check_venv_module()
        print(f"Making the environment {self.folder.name}")
        made = subprocess.run(
            [sys.executable, "-m", "venv", "--clear", str(self.folder)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        if made.returncode != 0:
            raise SetupError(explain(f"{made.stdout}\n{made.stderr}".splitlines(), "The environment was not made."))

    def _works(self) -> bool:
        """Whether its Python runs, is new enough and has pip: false after a move, an update or an interruption."""
        if not self.python.exists():
            return False
        code = f"import sys, pip; sys.exit(sys.version_info < {OLDEST_PYTHON})"
        return subprocess.run([str(self.python), "-c", code], capture_output=True, check=False).returncode == 0

    def _install(self, name: str, *, torch: bool = False) -> None:
        """Install a requirement file unless exactly this one was installed before."""
        requirements = self.root / name
        wanted = hashlib.sha256(requirements.read_bytes()).hexdigest()
        installed = self._installed()
        if installed.get(name) == wanted:
            return
        self._stamp.write_text(json.dumps({**installed, name: None}), encoding="utf-8")
        self._under_way.touch()
        if torch and not self._has_torch():
            self._install_torch()
        self._pip_or_fail(["-r", str(requirements)], f"Installing {name}")
        self._stamp.write_text(json.dumps({**installed, name: wanted}), encoding="utf-8")
        self._under_way.unlink()

    def _installed(self) -> dict[str, str]:
        try:
            content = json.loads(self._stamp.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return content if isinstance(content, dict) else {}

    def _has_torch(self) -> bool:
        """Whether the wanted version is there, whatever it is built for."""
        version = TORCH.partition("==")[2]
        packages = "Lib/site-packages" if os.name == "nt" else "lib/python*/site-packages"
        folders = self.folder.glob(f"{packages}/torch-*.dist-info")
        return any(folder.name.split("-")[1].split("+")[0].removesuffix(".dist") == version for folder in folders)

    def _install_torch(self) -> None:
        """Install torch before anything that needs it, so that the build fits the machine."""
        kind = "cuda" if has_nvidia_gpu() else "cpu"
        check_disk(self.root, DISK_NEEDED[kind])
        if kind == "cuda":
            index = ["--index-url", WINDOWS_CUDA_INDEX] if os.name == "nt" else []
            self._pip_or_fail([TORCH, *index], "Installing torch for the NVIDIA GPU (several GB)")
            return
        if platform.system() == "Linux":
            once = ["--index-url", CPU_INDEX, "--timeout", "10", "--retries", "0"]
            if self._pip([TORCH, *once], "Installing torch for the processor (about 200 MB)"):
                return
            print("PyTorch's index of processor builds was not reached: taking torch from the usual package index.")
            print("There it may be the CUDA build, which works here too but is several GB large.")
        self._pip_or_fail([TORCH], "Installing torch")

    def _pip_or_fail(self, arguments: list[str], title: str) -> None:
        if not self._pip(arguments, title):
            # Pip has undone what it began, so there is nothing to repair.
            self._under_way.unlink(missing_ok=True)
            with self.log.open(encoding="utf-8", errors="replace") as log:
                lines = list(deque(log, LOG_LINES_SHOWN * 4))
            raise SetupError(explain(lines, f"{title} failed; all of pip's output is in {self.log}."))

    def _pip(self, arguments: list[str], title: str) -> bool:
        command = [str(self.python), "-m", "pip", "install", "--no-input", "--progress-bar", "off", *arguments]
        environment = {**os.environ, "PIP_USER": "0", "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PYTHONUTF8": "1"}
        begun = time.monotonic()
        with self.log.open("w", encoding="utf-8") as log:
            running = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=environment, cwd=self.root
            )
            code = wait_visibly(running, title, begun)
        print(f"{title}: {'done' if code == 0 else 'failed'} after {time.monotonic() - begun:.0f} s")
        return code == 0


def wait_visibly(running: subprocess.Popen[bytes], title: str, begun: float) -> int:
    """Wait for a process; on a screen, show that time passes. Its exit code."""
    try:
        while True:
            try:
                return running.wait(timeout=1)
            except subprocess.TimeoutExpired:
                if sys.stdout.isatty():
                    print(f"{title}: {time.monotonic() - begun:.0f} s", end="\r", flush=True)
    except BaseException:
        running.terminate()
        running.wait()
        raise


def explain(log_lines: list[str], failure: str) -> str:
    """What failed, the last lines of the log, and what to do."""
    text = "\n".join(log_lines).lower()
    advice = next((remedy for signs, remedy in REMEDIES if any(sign in text for sign in signs)), "")
    advice = advice or "Mend what the last lines say and run the same command again."
    last = "\n".join(f"    {line.rstrip()}" for line in log_lines[-LOG_LINES_SHOWN:] if line.strip())
    needed = DISK_NEEDED["cpu"]
    return f"{failure}\n{last}\n{advice.format(disk=needed, python=platform.python_version())}"


def check_python(version: tuple[int, ...] = sys.version_info[:3]) -> None:
    """Refuse a Python that is too old.

    Raises:
        SetupError: It is.
    """
    if version < OLDEST_PYTHON:
        wanted, found = ".".join(map(str, OLDEST_PYTHON)), ".".join(map(str, version))
        raise SetupError(
            f"Python {wanted} or newer is needed; this is {found} ({sys.executable}).\n"
            f"Install a newer one from python.org or your system's packages, then run it by its name, "
            f"for instance: python{wanted} start.py setup"
        )


def check_venv_module() -> None:
    """Refuse a Python that cannot make environments.

    Raises:
        SetupError: It cannot.
    """
    missing = [name for name in ("venv", "ensurepip") if importlib.util.find_spec(name) is None]
    if missing:
        major, minor = sys.version_info[:2]
        raise SetupError(
            f"This Python has no module {' and no module '.join(missing)}, so it cannot make an environment.\n"
            f"On Debian or Ubuntu: sudo apt install python{major}.{minor}-venv"
        )


def check_disk(folder: Path, needed: float) -> None:
    """Refuse a disk without ``needed`` GB.

    Raises:
        SetupError: It has less.
    """
    free = shutil.disk_usage(folder).free / 1e9
    if free < needed:
        raise SetupError(
            f"The set-up needs about {needed:.0f} GB on the disk of {folder}; {free:.1f} GB are free.\n"
            f"Free some space, or move the project to a larger disk."
        )


def has_nvidia_gpu() -> bool:
    """Whether a driver reports an NVIDIA GPU."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return False
    try:
        listed = subprocess.run([program, "-L"], capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return listed.returncode == 0 and "GPU" in listed.stdout


def run(command: list[str], root: Path) -> int:
    """Run a command of the project on the screen; its exit code."""
    # The tensors of tiny models are too small to share: one thread is the quickest, beside other programs by far.
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    return subprocess.run(command, cwd=root, stdin=subprocess.DEVNULL, env=environment, check=False).returncode


def demo(environment: Environment) -> int:
    """Train the LoRA of the quickstart, show its pictures before and after, and name what was written."""
    root, python = environment.root, str(environment.python)
    begun = time.monotonic()
    code = run([python, "train_network.py", "--config_file", str(DEMO_CONFIG)], root)
    if code == 0:
        code = run([python, "examples/quickstart/before_after.py", str(DEMO_OUTPUT)], root)
    if code != 0:
        return code
    minutes, seconds = divmod(round(time.monotonic() - begun), 60)
    print(f"\nThe demo took {minutes} min {seconds} s and wrote:")
    pictures = len(list((root / DEMO_OUTPUT / "sample").glob("*[0-9].png")))
    for what, path in (
        ("LoRA", DEMO_OUTPUT / "shs.safetensors"),
        (f"{pictures} previews", DEMO_OUTPUT / "sample"),
        ("log", DEMO_OUTPUT / "log"),
        ("before and after", DEMO_OUTPUT / "before_after.png"),
    ):
        print(f"  {what:17} {path}")
    return 0


def test(environment: Environment, pytest_arguments: list[str]) -> int:
    """Run every check, also after one has failed; the exit code of the first that failed."""
    python = str(environment.python)
    first_failure = 0
    for title, command in (
        ("ruff check", ["ruff", "check", "."]),
        ("ruff format", ["ruff", "format", "--check", "."]),
        ("mypy", ["mypy"]),
        # A file's tests share models, so they stay together.
        ("pytest", ["pytest", "-n", "logical", "--maxprocesses", "4", "--dist", "loadfile", *pytest_arguments]),
    ):
        print(f"--- {title}", flush=True)
        code = run([python, "-m", *command], environment.root)
        first_failure = first_failure or code
    return first_failure


def parse_arguments(argv: list[str]) -> tuple[str, list[str]]:
    """The command, and for ``test`` what else pytest is given."""
    parser = argparse.ArgumentParser(prog="start.py", description="Set the program up, show it at work, or test it.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="setup | demo | test")
    commands.add_parser("setup", help="make the environment .venv and install what the program needs")
    commands.add_parser("demo", help="set-up, then train a LoRA on the pictures in examples/quickstart (minutes)")
    commands.add_parser("test", help="set-up, then ruff, mypy and every test; more arguments go to pytest")
    options, rest = parser.parse_known_args(argv)
    if rest and options.command != "test":
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return options.command, rest


def main(argv: list[str]) -> int:
    """Run a command; its exit code, 1 when the set-up fails."""
    command, rest = parse_arguments(argv)
    environment = Environment()
    try:
        check_python()
        environment.prepare(for_tests=command == "test")
    except SetupError as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    if command == "demo":
        return demo(environment)
    if command == "test":
        return test(environment, rest)
    print(f"Ready. Programs run with {environment.python.relative_to(ROOT)}, for instance:")
    print(f"  {environment.python.relative_to(ROOT)} train_network.py --help")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        sys.exit(130)
