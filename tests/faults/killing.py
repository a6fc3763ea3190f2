"""Runs that are killed without notice: started as a user starts them, ended by SIGKILL, and looked at afterwards.

A run is a fork of a process that has already imported the libraries, so it is at work within a second; everything else
is the script's own ``main``.
"""

import contextlib
import hashlib
import importlib
import json
import os
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from tests.scripts.methods import method_arguments

NAME = "thing"
STEPS = 6
SAVING = ("--save_state", "--save_every_n_steps=1", "--save_last_n_steps=2", "--resume=auto", "--seed=7")
KILLED = -signal.SIGKILL


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """A run to be killed.

    Attributes:
        title: What it is about.
        script: The script, without its suffix.
        more: Arguments besides those that all share.
    """

    title: str
    script: str
    more: tuple[str, ...] = ()

    def arguments(self, model: Path, folder: Path) -> list[str]:
        """The command line, but for the output folder; images and their description go to ``folder``."""
        given = [*method_arguments(self.script, model, folder, steps=STEPS), *SAVING, *self.more]
        prompts = folder / "prompts.txt"
        prompts.write_text("a thing --w 64 --h 64 --s 1\n", encoding="utf-8")
        return [*given, f"--sample_prompts={prompts}"]


@dataclass(slots=True)
class Findings:
    """What was found out about the runs of a scenario.

    Attributes:
        kills: Runs that were killed.
        during_saves: Those of them that left a file in the making.
        series: Runs that were continued to their end.
        wrong: What should not have been, a line each.
        seconds: Time it took.
    """

    kills: int = 0
    during_saves: int = 0
    series: int = 0
    wrong: list[str] = field(default_factory=list)
    seconds: float = 0.0


def run_forked(
    script: str,
    argv: list[str],
    log: Path,
    *,
    kill_after: float | None = None,
    before: Callable[[], None] | None = None,
) -> int:
    """Run ``main`` of ``script`` in a fork and wait for it.

    Args:
        script: The script, without its suffix.
        argv: Its arguments.
        log: Where its output goes.
        kill_after: Seconds after which it is killed, with the processes it has started.
        before: Called in the fork before ``main``.

    Returns:
        Its exit code; minus the signal's number where one has ended it.
    """
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.setsid()
            # The usual one is shared by all forks, and one that is killed while it holds it never gives it back.
            tqdm.set_lock(threading.RLock())
            output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(output, sys.stdout.fileno())
            os.dup2(output, sys.stderr.fileno())
            if before is not None:
                before()
            code = importlib.import_module(script).main(argv)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    if kill_after is not None:
        time.sleep(kill_after)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    # Loader workers notice the death of their process within seconds; the next run does not wait for them.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(status)


def kill_at(number: int) -> Callable[[], None]:
    """Let a fork kill itself just before its ``number``-th change to the file system, from 1."""

    def prepare() -> None:
        left = number

        def count() -> None:
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

        watch_changes(count)

    return prepare


def watch_changes(told: Callable[[], None]) -> None:
    """Call ``told`` before every change that this process makes to the file system from now on."""
    for module, name in ((os, "replace"), (os, "fsync"), (os, "unlink"), (os, "mkdir"), (os, "rmdir")):
        original: Any = getattr(module, name)

        def watched(*arguments: Any, _original: Any = original, **named: Any) -> Any:
            told()
            return _original(*arguments, **named)

        setattr(module, name, watched)


def results(folder: Path) -> dict[str, str]:
    """A hash of the tensors of every model file below ``folder``, states left out, by relative path."""
    return {
        path.relative_to(folder).as_posix(): _tensor_hash(path)
        for path in sorted(folder.rglob("*"))
        if path.suffix in (".safetensors", ".pt", ".ckpt", ".bin")
        and not any(part.endswith("-state") or part.startswith(".") for part in path.relative_to(folder).parts)
    }


def unreadable(folder: Path) -> list[str]:
    """What under its final name below ``folder`` is not whole."""
    return [f"{path.relative_to(folder)}: {reason}" for path in sorted(folder.rglob("*")) if (reason := _defect(path))]


def orphans(*folders: Path) -> list[str]:
    """What is left in the making below ``folders``."""
    return [path.name for folder in folders for path in folder.rglob(".*") if path.name != ".gitignore"]


def examine(
    scenario: Scenario,
    model: Path,
    folder: Path,
    attempt: Callable[[list[str], Path, float], int],
    *,
    kills: int | None,
    a_series: int,
) -> Findings:
    """Kill runs of ``scenario`` until ``kills`` were, and compare what they come to with an uninterrupted run.

    Args:
        scenario: The runs.
        model: The base model.
        folder: A folder for everything; what went wrong stays there.
        attempt: ``attempt(argv, log, seconds)`` starts a run and kills it; ``seconds`` is how long a whole one takes.
        kills: Runs to be killed; None goes on until one has ended by itself.
        a_series: Most kills of one run before it may end.
    """
    found, begun = Findings(), time.monotonic()
    data = folder / "data"
    argv = scenario.arguments(model, data)
    whole = folder / "whole"
    code = run_forked(scenario.script, [*argv, f"--output_dir={whole}"], folder / "whole.log")
    seconds = time.monotonic() - begun
    expected = results(whole)
    if code != 0 or not expected:
        found.wrong.append(f"the uninterrupted run ended with {code}")
        return found
    code = KILLED
    while (code == KILLED if kills is None else found.kills < kills) and len(found.wrong) < 3:
        output, log = folder / f"series-{found.series}", folder / f"series-{found.series}.log"
        for _ in range(a_series):
            code = attempt([*argv, f"--output_dir={output}"], log, seconds)
            if code != KILLED:
                break
            found.kills += 1
            found.during_saves += bool(orphans(output))
            found.wrong += unreadable(output)
        ended = code
        if code == KILLED:
            ended = run_forked(scenario.script, [*argv, f"--output_dir={output}"], log)
        found.series += 1
        found.wrong += [f"a run ended with {ended}"] if ended != 0 else _compared(expected, output, data)
        if not found.wrong:
            shutil.rmtree(output)
    found.seconds = time.monotonic() - begun
    return found


def _compared(expected: dict[str, str], output: Path, data: Path) -> list[str]:
    """How a run that was killed and continued differs from one that was not."""
    found = results(output)
    wrong = [f"{name} is missing" for name in expected if name not in found]
    wrong += [f"{name} is another" for name, value in found.items() if expected.get(name, value) != value]
    wrong += [f"{name} should not be there" for name in found if name not in expected]
    return [*wrong, *unreadable(output), *(f"{name} was left in the making" for name in orphans(output, data))]


def _tensor_hash(path: Path) -> str:
    import torch

    from library.files import read_tensors

    digest = hashlib.sha256()
    for name, tensor in sorted(read_tensors(path).tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _defect(path: Path) -> str | None:
    """Why a file or a state is not whole; None where it is, or is only in the making."""
    from PIL import Image

    from library.files import read_tensors
    from library.training.states import read_state

    if any(part.startswith(".") for part in path.parts):
        return None
    try:
        if path.is_dir():
            if path.name.endswith("-state"):
                read_state(path)
        elif path.suffix in (".safetensors", ".pt", ".ckpt"):
            read_tensors(path)
        elif path.suffix == ".json":
            json.loads(path.read_text(encoding="utf-8"))
        elif path.suffix == ".png":
            with Image.open(path) as image:
                image.load()
    except Exception as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return None
