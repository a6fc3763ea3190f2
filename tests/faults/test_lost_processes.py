"""A process that loads data, or one of two that train, ended by the system."""

import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from library.errors import UserError
from library.training.states import read_state
from tests.faults.runs import RESULT, after_steps, arguments, train
from tests.scripts.runs import Run, read_scalars

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")


def kill_workers() -> None:
    children = multiprocessing.active_children()
    assert children
    for child in children:
        assert child.pid is not None
        os.kill(child.pid, signal.SIGKILL)


def test_a_killed_worker_ends_the_run_which_can_be_continued(
    model: Path, plain: Callable[[int], Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Torch looks after its workers every five seconds: too long for a test.
    monkeypatch.setattr(_MultiProcessingDataLoaderIter._try_get_data, "__defaults__", (0.2,))
    given = arguments(model, tmp_path, steps=8)
    with monkeypatch.context() as patch:
        after_steps(patch, {2: kill_workers})
        with pytest.raises(UserError, match=r"ended unexpectedly \(exit code -9\)") as caught:
            train(tmp_path / "out", *given, "--max_data_loader_n_workers=1")
    problem = caught.value.problems[0]
    assert problem.where == "--max_data_loader_n_workers"
    assert "Memory may have run out" in str(problem.remedy)
    (state,) = (tmp_path / "out").glob("*-state")
    assert train(tmp_path / "out", *given, f"--resume={state}").tensor_hash(RESULT) == plain(8).tensor_hash(RESULT)


# The second of two processes spoils the loss of the second step, and is killed after the third.
TWO = """
import math, os, signal, sys
from library import run
from library.errors import run_script
from library.task import DenoisingTask
import train_network

second = os.environ["RANK"] == "1"
losses, fit = DenoisingTask.losses, run.fit

def spoilt(self, batch, context):
    return losses(self, batch, context) * (math.nan if second and batch.step == 1 else 1.0)

def die(moment):
    if second and moment.step == 3:
        os.kill(os.getpid(), signal.SIGKILL)

def watched(*given, hooks, **more):
    return fit(*given, hooks=[*hooks, die], **more)

DenoisingTask.losses, run.fit = spoilt, watched
run_script(train_network.main)
"""


@pytest.mark.slow
def test_one_of_two_processes_is_killed(model: Path, tmp_path: Path) -> None:
    """The other ends at once with a message and a state; a step that one of them cannot use is left out by both."""
    script = tmp_path / "two.py"
    script.write_text(TWO)
    output = tmp_path / "out"
    launcher = ["torch.distributed.run", "--nproc_per_node=2", "--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0"]
    given = [*arguments(model, tmp_path, "--on_nonfinite=skip", steps=50), "--seed=7"]
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            *launcher,
            str(script),
            f"--output_dir={output}",
            f"--logging_dir={output / 'log'}",
            *given,
        ],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        timeout=120,
        check=False,
    )
    assert done.returncode
    assert "error: another process of this run has ended" in done.stderr
    # The launcher's own.
    assert done.stderr.count("Traceback") == 1
    (left_out,) = [line for line in done.stderr.splitlines() if "the step is left out" in line]
    # Two images of each process.
    assert len(left_out.rpartition("images: ")[2].split(", ")) == 4
    state = output / "thing-step00000003-state"
    assert read_state(state).step == 3
    assert not [path for path in output.iterdir() if path.name.startswith(".")]
    assert read_scalars(output / "log", "skipped_steps") == [1, 1]
