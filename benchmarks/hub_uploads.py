"""How uploads to the hub fare when requests fail, are answered late, or end in the middle.

Run ``python benchmarks/hub_uploads.py`` from the project's folder; it takes some minutes and needs no network: a
stand-in for the hub answers on the loopback address. Each line of the table is 200 uploads, of one small file each.
Waits between attempts are a hundredth of those of a real run.

- failing: part of all requests that fail: with status 500, 503 or 429, or by a cut connection, half of these after the
  hub has done what it was asked for;
- beside training: whether the uploads are a queue that is worked off meanwhile (``--async_upload``);
- arrived and missing: files on the hub as they were saved, and files named as missing at the end; together 200;
- wrong: files that are neither;
- sent again: files that were sent after the hub had acknowledged them;
- held up: seconds that training would have waited for uploads, the end of the run left out.
"""

import argparse
import hashlib
import logging
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from library.training.hub import uploads_to_hub  # noqa: E402
from library.training.options import HubOptions  # noqa: E402
from library.training.uploads import Patience  # noqa: E402
from tests.hub_stand_in import TOKEN, Faults, running, used_by_this_process  # noqa: E402

PATIENCE = Patience(first=0.01, longest=0.6, one=9, save=3, end=18)
HEADINGS = ("failing", "beside training", "requests", "failed", "arrived", "missing", "wrong", "sent again", "held up",
            "seconds")  # fmt: skip


def measure(folder: Path, *, count: int, rate: float, background: bool, seed: int) -> tuple[str, ...]:
    """One line of the table."""
    options = HubOptions(huggingface_repo_id="owner/thing", huggingface_token=TOKEN, async_upload=background)
    saved: dict[str, str] = {}
    begun, held_up = time.monotonic(), 0.0
    faults = Faults(rate=rate, slow=0.2, seconds=0.02)
    with running(faults, seed=seed) as hub, used_by_this_process(hub, str(folder / "cache")):
        uploads = uploads_to_hub(options, is_main=True, patience=PATIENCE)
        assert uploads is not None
        with uploads:
            for number in range(count):
                path = folder / f"{number:03d}.safetensors"
                content = hashlib.sha256(f"{seed} {rate} {background} {number}".encode()).digest() * 64
                path.write_bytes(content)
                saved[path.name] = hashlib.sha256(content).hexdigest()
                before = time.monotonic()
                uploads.add(path)
                held_up += time.monotonic() - before
        files = hub.files if hub.repos else {}
        arrived = {name for name, digest in saved.items() if files.get(name) == digest}
        missing = {path.name for path in uploads.missing}
        return (
            f"{rate:.0%}",
            "yes" if background else "no",
            str(len(hub.requests)),
            str(hub.faulty),
            str(len(arrived)),
            str(len(missing)),
            str(len(set(saved) - arrived - missing)),
            str(len(hub.sent_again)),
            f"{held_up:.1f}",
            f"{time.monotonic() - begun:.1f}",
        )


def main() -> int:
    """Print the table; 1 if a file was lost without a word, or sent again."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--uploads", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0, help="seed of the faults")
    arguments = parser.parse_args()
    logging.getLogger("library").setLevel(logging.ERROR)
    print(" | ".join(HEADINGS))
    print(" | ".join("-" * len(heading) for heading in HEADINGS))
    failed = False
    for rate in (0.0, 0.2, 0.5):
        for background in (False, True):
            with tempfile.TemporaryDirectory() as folder:
                line = measure(
                    Path(folder), count=arguments.uploads, rate=rate, background=background, seed=arguments.seed
                )
            print(
                " | ".join(cell.rjust(len(heading)) for cell, heading in zip(line, HEADINGS, strict=True)), flush=True
            )
            failed = failed or line[6] != "0" or line[7] != "0"
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
