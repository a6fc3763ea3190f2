"""Kill the data tools without notice at random moments, start them again, and compare with an uninterrupted run.

Run ``python benchmarks/kill_tools.py`` from the project's folder (needs ``requirements-dev.txt``), on Linux. Every tool
works on a folder of small images with a small model that is made here. It is killed (SIGKILL), up to three times, and
then left to end. Every second kill comes at a moment drawn evenly over the time that a whole run takes, the others just
before a change to the file system, drawn evenly of all that a whole run makes. A line of the table is one tool:

- kills: how often it was killed, and in brackets how often it had written something by then;
- to the end: runs that were started anew after that and left to end;
- wrong: files that differ from those of the uninterrupted run, that are missing or should not be there, files that
  after a kill were neither as before nor as at the end, and files in the making that stayed after the last run.
"""

import argparse
import json
import mmap
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from library.files import is_temporary  # noqa: E402
from tests.faults.killing import KILLED, kill_at, run_forked, watch_changes  # noqa: E402

IMAGES = 40
ENTRIES = 3000
"""Entries of the metadata besides those of the images, so that a kill meets the work on them."""

A_SERIES = 3
"""Most kills of one run before it may end."""

Made = dict[str, bytes]


@dataclass(frozen=True, kw_only=True)
class Tool:
    """A tool to be killed.

    Attributes:
        title: What it is called in the table.
        script: Its module.
        given: Its arguments; ``{work}`` is the folder it works in, ``{models}`` that of the models.
        before: Called in its process before it starts.
    """

    title: str
    script: str
    given: tuple[str, ...]
    before: Callable[[], None] = lambda: None


@dataclass(slots=True)
class Findings:
    """What was found out about a tool."""

    kills: int = 0
    amid: int = 0
    series: int = 0
    wrong: list[str] = field(default_factory=list)


def keep_every_result() -> None:
    """Keep results after every image, instead of every half minute, so that a kill meets it."""
    import finetune.tag_output

    finetune.tag_output._KEPT_EVERY = 0.0  # type: ignore[misc]


SMALL = ("--max_resolution=64,64", "--min_bucket_reso=64", "--mixed_precision=no")
BLIP = ("--caption_weights={models}/blip", "--max_length=12", "--batch_size=2", "--skip_existing")
TAGGER = ("--model_dir={models}/tagger", "--batch_size=2", "--skip_existing", "--thresh=0.2")
TOOLS = (
    Tool(title="captions", script="make_captions", given=("{work}/images", *BLIP)),
    Tool(title="captions by GIT", script="make_captions_by_git",
         given=("{work}/images", "--model_id={models}/git", "--max_length=12", "--batch_size=2", "--skip_existing")),
    Tool(title="tags", script="tag_images_by_wd14_tagger",
         given=("{work}/images", *TAGGER, "--caption_extension=.tags")),
    Tool(title="tags, one file", script="tag_images_by_wd14_tagger",
         given=("{work}/images", *TAGGER, "--output_path={work}/tags.json"), before=keep_every_result),
    Tool(title="merged captions", script="merge_captions_to_metadata",
         given=("{work}/images", "{work}/meta.json", "--caption_extension=.txt")),
    Tool(title="merged tags, in place", script="merge_dd_tags_to_metadata",
         given=("{work}/images", "{work}/meta.json", "--in_json={work}/meta.json")),
    Tool(title="cleaning", script="clean_captions_and_tags", given=("{work}/meta.json", "{work}/clean.json")),
    Tool(title="cleaning, in place", script="clean_captions_and_tags", given=("{work}/meta.json", "{work}/meta.json")),
    Tool(title="latents", script="prepare_buckets_latents",
         given=("{work}/images", "{work}/meta.json", "{work}/latents.json", "{models}/sd", *SMALL)),
)  # fmt: skip


def main() -> int:
    """Print the table; exit code 1 when anything was wrong."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=20, help="kills of each tool [default: 20]")
    parser.add_argument("--only", default="", help="tools whose title holds this text")
    parser.add_argument("--seed", type=int, default=0, help="of the moments [default: 0]")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        prepare(folder)
        print("| tool | kills | to the end | wrong | seconds |\n| --- | ---: | ---: | ---: | ---: |")
        wrong = 0
        for tool in TOOLS:
            if options.only not in tool.title:
                continue
            began = time.monotonic()
            found = examine(tool, folder, kills=options.kills, moments=random.Random(f"{options.seed} {tool.title}"))
            seconds = time.monotonic() - began
            shown = (f"{found.kills} ({found.amid})", found.series, len(found.wrong), round(seconds))
            print(f"| {tool.title} | " + " | ".join(map(str, shown)) + " |", flush=True)
            print("".join(f"    {line}\n" for line in found.wrong), end="", flush=True)
            wrong += len(found.wrong)
        return 1 if wrong else 0


def prepare(folder: Path) -> None:
    """Make the models and the files that every run starts with; import what every run would."""
    import diffusers  # noqa: F401
    import onnxruntime  # noqa: F401
    import torch
    import transformers  # noqa: F401

    from tests.finetune import tiny_models
    from tests.scripts.runs import write_images
    from tests.tiny import tiny_sd

    torch.set_num_threads(1)
    models, start = folder / "models", folder / "start"
    tiny_models.write_blip(models / "blip")
    tiny_models.write_git(models / "git")
    tiny_models.write_tagger(models / "tagger")
    tiny_sd(models / "sd", "sd1", layers_per_block=1)
    write_images(start / "images", IMAGES)
    names = [f"{number:02d}" for number in range(IMAGES)] + [f"elsewhere {number}" for number in range(ENTRIES)]
    entries = {name: {"tags": "1girl, long_hair, hair, smile", "caption": f"an old caption, {name}"} for name in names}
    (start / "meta.json").write_text(json.dumps(entries), encoding="utf-8")


def examine(tool: Tool, folder: Path, *, kills: int, moments: random.Random) -> Findings:
    """Kill runs of ``tool`` until ``kills`` were, and compare what they come to with an uninterrupted run."""
    found, work, log = Findings(), folder / "work", folder / f"{tool.title}.log"
    before = made(folder / "start")
    begin(folder)
    run(tool, folder, log)  # what is read for the first time is slower
    begin(folder)
    changes, began = Count(), time.monotonic()
    code = run(tool, folder, log, prepare=lambda: watch_changes(changes.add))
    length = time.monotonic() - began
    whole = made(work)
    if code != 0 or whole == before:
        found.wrong.append(f"the uninterrupted run ended with {code}: {log.read_text(encoding='utf-8')[-500:]}")
        return found
    while found.kills < kills and len(found.wrong) < A_SERIES:
        begin(folder)
        code = KILLED
        for _ in range(min(A_SERIES, kills - found.kills)):
            if found.kills % 2:
                code = run(tool, folder, log, kill_after=moments.uniform(0, length))
            else:
                code = run(tool, folder, log, prepare=kill_at(moments.randint(1, changes.value)))
            if code != KILLED:
                break
            found.kills += 1
            now = made(work)
            found.amid += before != now
            found.wrong += [f"killed: {name} is neither old nor new" for name in half_done(now, before, whole)]
        if code == KILLED:
            code = run(tool, folder, log)
        found.series += 1
        found.wrong += [f"a run ended with {code}"] if code != 0 else differences(made(work), whole)
        found.wrong += [f"{path.name} was left in the making" for path in leftovers(work)]
    return found


class Count:
    """A number that a forked process can add to."""

    def __init__(self) -> None:
        """Start at nought."""
        self._shared = mmap.mmap(-1, 8)

    @property
    def value(self) -> int:
        """The number."""
        return int.from_bytes(self._shared[:8], "little")

    def add(self) -> None:
        """Add one."""
        self._shared[:8] = (self.value + 1).to_bytes(8, "little")


def begin(folder: Path) -> None:
    """Put everything back to the start."""
    shutil.rmtree(folder / "work", ignore_errors=True)
    shutil.copytree(folder / "start", folder / "work")


def run(
    tool: Tool,
    folder: Path,
    log: Path,
    *,
    kill_after: float | None = None,
    prepare: Callable[[], None] = lambda: None,
) -> int:
    """Run ``tool`` in the working folder; returns the exit code.

    Args:
        tool: The tool.
        folder: Where everything is.
        log: Where its output goes.
        kill_after: Seconds after which it is killed.
        prepare: Called in its process before it starts.
    """
    places = {"models": folder / "models", "work": folder / "work"}
    given = [word.format(**places) for word in tool.given]

    def before() -> None:
        tool.before()
        prepare()

    return run_forked(f"finetune.{tool.script}", given, log, kill_after=kill_after, before=before)


def made(folder: Path) -> Made:
    """Every finished file below ``folder``."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not is_temporary(path.name)
    }


def leftovers(folder: Path) -> list[Path]:
    """Files in the making; those of latents stay, for another process may be writing them into the same cache."""
    return [path for path in folder.rglob("*") if is_temporary(path.name) and path.suffix != ".npz"]


def half_done(now: Made, before: Made, whole: Made) -> list[str]:
    """The files that are neither as before nor as at the end; results kept on the way need only be whole."""
    odd = [name for name, content in now.items() if content not in (before.get(name), whole.get(name))]
    odd += [name for name in before if name not in now]
    return [name for name in odd if not (".part" in name and _is_json(now[name]))]


def _is_json(content: bytes) -> bool:
    try:
        json.loads(content)
    except ValueError:
        return False
    return True


def differences(now: Made, whole: Made) -> list[str]:
    """How the files of a run that was killed and started again differ from those of one that was not."""
    names = sorted(now.keys() | whole.keys())
    return [f"{name} is not as without a kill" for name in names if now.get(name) != whole.get(name)]


if __name__ == "__main__":
    sys.exit(main())
