"""Repeat a run from its manifest, and say whether the same tensors come of it.

Usage, from anywhere: ``python tools/reproduce.py NAME.run.json --output_dir FOLDER --map NAME=PLACE ...``. Exit code 0:
the results are equal; 1: they are not; 2: the run could not be repeated as asked.
"""

import logging
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from library.errors import Problem, UserError, run_script  # noqa: E402
from library.option_positions import name_positions, split_positions  # noqa: E402
from library.options import option, parse_options  # noqa: E402

DESCRIPTION = (
    "Repeat a run from the manifest that lies beside its result, and compare the tensors. Checked before training: "
    "images, captions, base model, versions."
)
DIFFERENT = 1
"""Exit code when the results are not equal."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ReproduceOptions:
    """Repeating a run."""

    manifest: Path | None = option(None, metavar="FILE", help="The manifest: NAME.run.json.")
    output_dir: Path | None = option(None, metavar="DIR", help="New folder for the results of the repeated run.")
    map: tuple[str, ...] = option(
        (),
        metavar="NAME=PLACE",
        help="Where a file or folder of the run is now, by its name in the manifest. Can be given several times.",
    )
    anyway: bool = option(False, help="Run although images, captions or models are not those of the manifest.")
    dry_run: bool = option(False, help="Show the command and what the checks find, and train nothing.")

    def problems(self) -> list[Problem]:
        """What is missing, and results in the way."""
        found = []
        if self.manifest is None:
            found.append(Problem("no manifest is given", "--manifest", "Write the NAME.run.json beside the result."))
        folder = self.output_dir
        if folder is None and not self.dry_run:
            found.append(Problem("there is no folder for the results", "--output_dir", "Give a new folder."))
        if folder is not None and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            found.append(Problem(f"{folder} is not empty", "--output_dir", "Give a new folder."))
        return found


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """The tool's options."""

    reproduce: ReproduceOptions


def main(argv: list[str]) -> int:
    """Check, repeat, compare; returns the exit code."""
    words, rest = split_positions(Options, _joined_maps(argv))
    given = [*name_positions(words, ["manifest"]), *rest]
    options = parse_options(Options, given, prog=Path(__file__).name, description=DESCRIPTION).reproduce
    assert options.manifest is not None, "asked for with the options"
    # What is remarkable about the data set, the run itself will tell.
    logging.getLogger().addHandler(logging.NullHandler())
    from library.reproduction import places_of
    from library.training.manifest import read_manifest

    manifest = read_manifest(options.manifest)
    places = places_of(manifest, options.map)
    # The data set file that is written for the run holds paths, and results are passed on: it lies apart from them.
    with tempfile.TemporaryDirectory() as folder:
        code = _repeat(manifest, places, Path(folder), options)
    if options.dry_run or code:
        return code
    assert options.output_dir is not None, "asked for with the options"
    return _compare(manifest, options.manifest.parent, options.output_dir)


def _repeat(manifest: Mapping[str, Any], places: Mapping[str, str], inputs: Path, options: ReproduceOptions) -> int:
    """Check what goes into the run, and train unless nothing is to be trained; returns the exit code of that."""
    from library.reproduction import arguments_of, script_of, write_inputs

    script = script_of(manifest)
    write_inputs(manifest, places, inputs)
    arguments = arguments_of(manifest, places, inputs=inputs, output_dir=options.output_dir or Path("OUTPUT_DIR"))
    _check(manifest, places, arguments, anyway=options.anyway)
    command = [*_launcher(manifest["processes"]), str(ROOT / script), *arguments]
    print("\nthe command:\n" + shlex.join(command).replace(" --", " \\\n  --"))
    if options.dry_run:
        print("\ndry run: nothing was trained")
        return 0
    code = _run(command, threads=manifest["environment"]["threads"])
    if code:
        print(f"\nthe repeated run ended with exit code {code}", file=sys.stderr)
    return code


def _joined_maps(argv: Sequence[str]) -> list[str]:
    """The command line with all that follows each ``--map`` behind one."""
    words, maps = list(argv), []
    rest: list[str] = []
    while words:
        word = words.pop(0)
        if word.startswith("--map="):
            maps.append(word.removeprefix("--map="))
        elif word == "--map":
            while words and "=" in words[0] and not words[0].startswith("--"):
                maps.append(words.pop(0))
        else:
            rest.append(word)
    return [*rest, *(["--map", *maps] if maps else [])]


def _launcher(processes: int) -> list[str]:
    if processes == 1:
        return [sys.executable]
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]


def _check(manifest: Mapping[str, Any], places: Mapping[str, str], arguments: Sequence[str], *, anyway: bool) -> None:
    """Tell what is not as it was.

    Raises:
        UserError: Models, images or captions are not, and ``anyway`` is not given.
    """
    from library.reproduction import history_notices, input_differences
    from library.training.environment import environment, environment_differences

    differences = input_differences(manifest, places, arguments)
    if differences and not anyway:
        remedy = "Map the original, or add --anyway to train with what is there."
        raise UserError.of([Problem(f"not as it was: {line}", remedy=remedy) for line in differences])
    for line in differences:
        print(f"not as it was: {line}")
    if not differences:
        print("images, captions and models are as they were")
    before = manifest["environment"]
    # The run is started with as many threads as it had.
    changed = environment_differences(before, environment() | {"threads": before.get("threads")})
    for line in [*history_notices(manifest), *changed]:
        print(f"equal bytes cannot be promised: {line}")
    if not changed:
        print("versions and processor are as they were")


def _run(command: Sequence[str], *, threads: int) -> int:
    """Run the command with a number of threads; returns its exit code."""
    surroundings = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    with subprocess.Popen(command, env=surroundings) as process:
        while True:
            try:
                return process.wait()
            except KeyboardInterrupt:
                # The run was asked to stop as well, and saves first.
                continue


def _compare(manifest: Mapping[str, Any], before: Path, output_dir: Path) -> int:
    """Say which results are equal; returns the exit code."""
    from library.reproduction import largest_difference
    from library.training.manifest import manifest_path, read_manifest, result_differences

    name = manifest["options"].get("output_name")
    again = read_manifest(manifest_path(output_dir, name))
    equal, different, missing = result_differences(manifest["results"], again["results"])
    print()
    for file in equal:
        print(f"equal: {file}")
    for file in different:
        both = (before / file).exists() and (output_dir / file).exists()
        more = f": {largest_difference(before / file, output_dir / file)}" if both else ""
        print(f"DIFFERENT: {file}{more}")
    for file in missing:
        print(f"not written this time: {file}")
    final = {file for file, one in manifest["results"].items() if one["step"] == manifest["steps"]["total"]}
    is_same = bool(equal) and not different and not final.intersection(missing)
    print("the results are equal" if is_same else "the results are not equal")
    return 0 if is_same else DIFFERENT


if __name__ == "__main__":
    run_script(main)
