"""A few of the kills of ``benchmarks/kill_resume.py``; the whole of it takes half an hour."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="the runs are forks")
@pytest.mark.parametrize("kind", ["LoRA, AdamW, cosine, 2 workers", "DreamBooth, AdamW, 1 worker", "XTI"])
def test_killed_runs_come_to_the_same_weights(kind: str) -> None:
    command = [sys.executable, "benchmarks/kill_resume.py", "--kills=3", f"--only={kind}"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    figures = ended.stdout.splitlines()[-1].split("|")
    assert int(figures[2]) >= 3
