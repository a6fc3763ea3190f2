"""Going on with another number of processes, and signals to several of them."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.scripts.methods import RESULT, method_arguments
from tests.scripts.runs import run_script
from tests.scripts.test_several_processes import LAUNCHERS, ROOT, in_two_processes
from tests.tiny import tiny_sd

STATES = ("--save_state", "--save_every_n_steps=1")


@pytest.mark.slow
def test_one_process_goes_on_as_two_and_two_as_one(tmp_path: Path) -> None:
    """Batches of 4 in one process and of 2 in each of two: the same images in every step, and nearly the same sums."""
    model = tiny_sd(tmp_path / "sd1", "sd1", layers_per_block=1)
    alone, shared = (method_arguments("train_network", model, tmp_path, batch_size=size, steps=4) for size in (4, 2))
    whole = run_script("train_network", tmp_path / "whole", *alone, *STATES)
    state = whole.folder / "thing-step00000001-state"
    both = tmp_path / "both"
    losses = in_two_processes("torchrun", "train_network", both, *shared, *STATES, f"--resume={state}")
    assert losses == pytest.approx(whole.losses[1:], rel=1e-5)
    last = run_script("train_network", tmp_path / "last", *alone, f"--resume={both / 'thing-step00000003-state'}")
    assert last.losses == pytest.approx(whole.losses[3:], rel=1e-5)
    expected, found = load_file(whole.folder / RESULT), load_file(last.folder / RESULT)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="Windows has no such signals")
def test_a_signal_to_all_of_several_processes_saves_once(tmp_path: Path) -> None:
    model = tiny_sd(tmp_path / "sd1", "sd1", layers_per_block=1)
    given = method_arguments("train_network", model, tmp_path, batch_size=2, steps=2000)
    output = tmp_path / "out"
    command = [
        *(sys.executable, "-m", *LAUNCHERS["torchrun"], str(ROOT / "train_network.py")),
        *(f"--output_dir={output}", "--seed=7", "--save_every_n_steps=1", "--save_last_n_steps=1", *given),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    running = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not list(output.glob("thing-step*.safetensors")):
        assert running.poll() is None, running.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.2)
    running.send_signal(signal.SIGTERM)
    running.communicate(timeout=60)
    (state,) = output.glob("*-state")
    assert (state / "manifest.json").is_file()
    assert (output / state.name.replace("-state", ".safetensors")).is_file()
    assert not list(output.glob(".*"))
