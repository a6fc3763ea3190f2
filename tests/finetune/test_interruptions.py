"""Tools that are killed or stopped at any moment, and started again."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from finetune import merge_captions_to_metadata
from library.files import is_temporary
from tests.scripts.runs import write_images
from tests.tiny import tiny_sd

ROOT = Path(__file__).parents[2]
SMALL = ("--max_resolution=64,64", "--min_bucket_reso=64")


def start(script: str, *given: object) -> "subprocess.Popen[str]":
    command = [sys.executable, str(ROOT / "finetune" / script), *map(str, given)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="the runs are forks")
def test_killed_tools_come_to_the_same_bytes() -> None:
    command = [sys.executable, "benchmarks/kill_tools.py", "--kills=4"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    rows = [line.split("|") for line in ended.stdout.splitlines()[2:]]
    assert len(rows) == 9
    assert all(int(kills.split()[0]) == 4 and int(wrong) == 0 for _, _, kills, _, wrong, *_ in rows)


def latents(images: Path) -> list[Path]:
    """The files that are complete; a killed process leaves one in the making behind, under another name."""
    return [path for path in images.glob("*.npz") if not is_temporary(path.name)]


def count(images: Path) -> int:
    return len(latents(images))


def wait_for(images: Path, latents: int, process: "subprocess.Popen[str]") -> None:
    while count(images) < latents and process.poll() is None:
        time.sleep(0.005)


@pytest.mark.slow
def test_latents_killed_and_stopped_end_in_the_same_bytes(tmp_path: Path) -> None:
    model = tiny_sd(tmp_path / "model", "sd1", layers_per_block=1)
    images = write_images(tmp_path / "images", 120)
    meta, out, whole = (tmp_path / name for name in ("meta.json", "out.json", "whole.json"))
    merge_captions_to_metadata.main(["--caption_extension=.txt", str(images), str(meta)])
    given = [images, meta, out, model, *SMALL]
    moments = random.Random(7)
    for _ in range(int(os.environ.get("KILLS", "2"))):
        process = start("prepare_buckets_latents.py", *given)
        wait_for(images, count(images) + moments.randrange(1, 5), process)
        process.kill()
        process.communicate()
        assert not out.exists()
    stopped = start("prepare_buckets_latents.py", *given)
    wait_for(images, count(images) + 1, stopped)
    stopped.send_signal(signal.SIGINT)
    _, told = stopped.communicate()
    assert stopped.returncode == 130
    assert "Traceback" not in told
    assert not out.exists()
    kept = {path.name: path.stat().st_mtime_ns for path in latents(images)}
    assert 0 < len(kept) < 120
    assert start("prepare_buckets_latents.py", *given).wait() == 0
    made = {path.name: path.read_bytes() for path in latents(images)}
    assert all((images / name).stat().st_mtime_ns == moment for name, moment in kept.items())
    for path in latents(images):
        path.unlink()
    assert start("prepare_buckets_latents.py", images, meta, whole, model, *SMALL).wait() == 0
    assert out.read_bytes() == whole.read_bytes()
    assert {path.name: path.read_bytes() for path in latents(images)} == made
