"""Kill runs without notice at random moments, go on with them, and compare the results with uninterrupted runs.

Run ``python benchmarks/kill_resume.py`` from the project's folder, on Linux; it takes about half an hour on two cores.
Every run is one of a tiny model with a state after each of its six steps, and goes on with ``--resume=auto``. A line of
the table is one kind of run:

- kills: how often it was killed (SIGKILL), at moments drawn evenly over the time that a whole run takes;
- within a save: kills that left a file in the making behind;
- to the end: runs that were killed one or several times and then went on to their end;
- wrong: tensors of any saved model that differ from the uninterrupted run, files that are missing or should not be
  there, files under their final names that cannot be read, and files left in the making after the run has ended.

``--every_change`` kills runs of three steps instead: one before its first change to the file system, the next before
its second, and so on to the last.
"""

import argparse
import itertools
import random
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from tests.faults.killing import STEPS, Findings, Scenario, examine, kill_at, run_forked  # noqa: E402
from tests.tiny import tiny_sd  # noqa: E402

HEADINGS = ("kills", "within a save", "to the end", "wrong", "seconds")
PREVIEWS = ("--sample_every_n_steps=2", "--sample_sampler=euler_a")
SCENARIOS = (
    Scenario(title="LoRA, AdamW, cosine, 2 workers", script="train_network",
             more=("--lr_scheduler=cosine", "--max_data_loader_n_workers=2", "--network_dropout=0.1")),
    Scenario(title="LoRA, Prodigy, bf16, previews", script="train_network",
             more=("--optimizer_type=Prodigy", "--learning_rate=1", "--mixed_precision=bf16", *PREVIEWS)),
    Scenario(title="LoRA, AdamW8bit, cache on disk, EMA", script="train_network",
             more=("--optimizer_type=AdamW8bit", "--cache_latents_to_disk", "--ema")),
    Scenario(title="DyLoRA, Lion, accumulation", script="train_network",
             more=("--network_module=networks.dylora", "--optimizer_type=Lion", "--learning_rate=1e-3",
                   "--gradient_accumulation_steps=2")),
    Scenario(title="LoKr (LyCORIS), RAdamScheduleFree", script="train_network",
             more=("--network_module=lycoris.kohya", "--network_args", "algo=lokr",
                   "--optimizer_type=RAdamScheduleFree")),
    Scenario(title="DreamBooth, AdamW, 1 worker", script="train_db",
             more=("--max_data_loader_n_workers=1", "--stop_text_encoder_training=3")),
    Scenario(title="DreamBooth, fused, full bf16, .ckpt", script="train_db",
             more=("--fused_backward_pass", "--max_grad_norm=0", "--mixed_precision=bf16", "--full_bf16",
                   "--save_model_as=ckpt")),
    Scenario(title="fine-tuning, AdaFactor, diffusers folder", script="fine_tune",
             more=("--optimizer_type=AdaFactor", "--save_model_as=diffusers_safetensors", "--train_text_encoder")),
    Scenario(title="fine-tuning, SGDNesterov, validation, EMA", script="fine_tune",
             more=("--optimizer_type=SGDNesterov", "--validation_split=0.25", "--ema")),
    Scenario(title="textual inversion, AdamW, 4 workers", script="train_textual_inversion",
             more=("--max_data_loader_n_workers=4", "--save_model_as=pt")),
    Scenario(title="textual inversion, DAdaptAdam, bf16", script="train_textual_inversion",
             more=("--optimizer_type=DAdaptAdam", "--learning_rate=1", "--mixed_precision=bf16")),
    Scenario(title="XTI, AdamW, polynomial", script="train_textual_inversion_XTI",
             more=("--lr_scheduler=polynomial", "--max_data_loader_n_workers=1")),
)  # fmt: skip


def at_random(scenario: Scenario, model: Path, folder: Path, *, kills: int, seed: int) -> Findings:
    """Kill runs at random moments."""
    moments = random.Random(f"{seed} {scenario.title}")

    def attempt(argv: list[str], log: Path, seconds: float) -> int:
        return run_forked(scenario.script, argv, log, kill_after=moments.uniform(0, seconds))

    return examine(scenario, model, folder, attempt, kills=kills, a_series=3)


def at_every_change(scenario: Scenario, model: Path, folder: Path) -> Findings:
    """Kill a run before its first change to the file system, another one before its second, and so on."""
    numbers = itertools.count(1)
    short = replace(scenario, more=(*scenario.more, "--max_train_steps=3"))

    def attempt(argv: list[str], log: Path, seconds: float) -> int:
        return run_forked(scenario.script, argv, log, before=kill_at(next(numbers)))

    return examine(short, model, folder, attempt, kills=None, a_series=1)


def main() -> int:
    """Print the table; exit code 1 when anything was wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=9, help="kills of each kind of run [default: 9, 108 in all]")
    parser.add_argument("--only", default="", help="kinds of runs whose title holds this text")
    parser.add_argument("--every_change", action="store_true", help="kill before each change to the file system")
    parser.add_argument("--seed", type=int, default=0, help="of the moments [default: 0]")
    options = parser.parse_args()
    import_everything()
    total = Findings()
    print(
        f"runs of {STEPS} steps\n| run | kills | within a save | to the end | wrong | seconds |\n| --- "
        + "| ---: " * 5
        + "|"
    )
    with tempfile.TemporaryDirectory() as temporary:
        model = tiny_sd(Path(temporary) / "model", "sd1")
        for number, scenario in enumerate(SCENARIOS):
            if options.only not in scenario.title:
                continue
            folder = Path(temporary) / str(number)
            folder.mkdir()
            if options.every_change:
                found = at_every_change(scenario, model, folder)
            else:
                found = at_random(scenario, model, folder, kills=options.kills, seed=options.seed)
            print(line(scenario.title, found), flush=True)
            for what in found.wrong:
                print(f"    {what}", flush=True)
            if found.wrong:
                print(tail(folder), flush=True)
            total.kills += found.kills
            total.during_saves += found.during_saves
            total.series += found.series
            total.wrong += found.wrong
            total.seconds += found.seconds
    print(line("all", total))
    return 1 if total.wrong else 0


def import_everything() -> None:
    """What every run would import, so that a run is at work at once."""
    import diffusers  # noqa: F401
    import torch
    import torch.utils.tensorboard
    import transformers  # noqa: F401

    torch.set_num_threads(1)


def line(title: str, found: Findings) -> str:
    """A row of the table."""
    figures = (found.kills, found.during_saves, found.series, len(found.wrong), round(found.seconds))
    return f"| {title} | " + " | ".join(map(str, figures)) + " |"


def tail(folder: Path) -> str:
    """The end of the newest log below ``folder``."""
    logs = sorted(folder.glob("*.log"), key=lambda path: path.stat().st_mtime)
    return "\n".join(logs[-1].read_text(encoding="utf-8", errors="replace").splitlines()[-15:]) if logs else ""


if __name__ == "__main__":
    sys.exit(main())
