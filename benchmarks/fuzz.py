"""How the program's readers stand files that were made to break them.

Run ``python benchmarks/fuzz.py`` from the project's folder. Each reader gets 20,000 structured inputs (right in form,
with wrong, huge, deep or misleading content) and 200,000 that are valid files with some bytes changed. An input is a
finding if the reader does anything but take it or refuse it with a message: another exception, more than 2 seconds of
processor time, a file written outside of its folder, or a program started. Findings are kept in the folder
``--findings``; they are listed at the end, and the exit code is then 1. The same seed tries the same inputs.

Ctrl-C ends it with the table of what was tried so far.
"""

import argparse
import contextlib
import hashlib
import logging
import os
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from hypothesis import HealthCheck, Phase, given, seed, settings  # noqa: E402
from tqdm import tqdm  # noqa: E402

from tests.fuzz.corpora import corpus, mutated  # noqa: E402
from tests.fuzz.readers import READERS, prepare  # noqa: E402
from tests.fuzz.strategies import STRATEGIES  # noqa: E402
from tests.fuzz.watch import Case, answer, warm_up  # noqa: E402

MEMORY = 12 << 30
"""Bytes of address space; what asks for more fails instead of taking the machine's."""

PORTION = 1000
"""Structured inputs that are made at a time."""

HEADINGS = ("reader", "kind", "inputs", "refused", "findings", "seconds", "slowest")
WIDTHS = (13, 10, 7, 7, 8, 7, 7)


@dataclass
class Line:
    """A line of the table."""

    reader: str
    kind: str
    inputs: int = 0
    refused: int = 0
    seconds: float = 0.0
    slowest: float = 0.0
    findings: dict[str, Case] = field(default_factory=dict)

    def cells(self) -> tuple[str, ...]:
        """As text."""
        numbers = (f"{self.inputs:,}", f"{self.refused:,}", str(len(self.findings)))
        return self.reader, self.kind, *numbers, f"{self.seconds:.0f}", f"{self.slowest:.2f}"


def structured(reader: str, count: int, first: int) -> Iterator[Case]:
    """``count`` inputs of the strategy of ``reader``."""
    for start in range(0, count, PORTION):
        portion: list[Case] = []

        @seed(first + start)
        @settings(
            max_examples=min(PORTION, count - start),
            deadline=None,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(case=STRATEGIES[reader])
        def collect(case: Case) -> None:
            portion.append(case)  # noqa: B023 - it is done before the next portion

        collect()
        yield from portion


def changed(reader: str, count: int, first: int) -> Iterator[Case]:
    """``count`` valid files of ``reader`` with bytes changed."""
    cases = corpus(reader)
    for number in range(count):
        rng = Random(f"{first} {reader} {number}")
        case = rng.choice(cases)
        yield Case(case.name, mutated(case.content, rng.choice(cases).content, rng))


def run(line: Line, cases: Iterator[Case], count: int, folder: Path) -> None:
    """Try ``cases`` and count what happens."""
    read = READERS[line.reader]
    for case in tqdm(cases, total=count, desc=f"{line.reader}, {line.kind}", unit="file", disable=None, leave=False):
        started = time.process_time()
        try:
            line.refused += answer(read, case, folder) is not None
        except KeyboardInterrupt:
            raise
        except BaseException as problem:
            line.findings.setdefault(f"{type(problem).__name__}: {_place(problem)}: {str(problem)[:100]}", case)
        took = time.process_time() - started
        line.inputs, line.seconds, line.slowest = line.inputs + 1, line.seconds + took, max(line.slowest, took)


def _place(problem: BaseException) -> str:
    """The line of ours that was reached last."""
    trace, place = problem.__traceback__, "?"
    while trace is not None:
        file = Path(trace.tb_frame.f_code.co_filename)
        if file.is_relative_to(ROOT) and ".venv" not in file.parts:
            place = f"{file.relative_to(ROOT)}:{trace.tb_lineno}"
        trace = trace.tb_next
    return place


def show(*cells: str) -> None:
    """Print a line of the table."""
    print(" | ".join(cell.ljust(width) for cell, width in zip(cells, WIDTHS, strict=True)), flush=True)


def keep(lines: list[Line], findings: Path) -> None:
    """Keep the inputs that found something, and list them."""
    for line in lines:
        for what, case in line.findings.items():
            findings.mkdir(parents=True, exist_ok=True)
            digest = hashlib.sha256(case.content).hexdigest()[:8]
            name = f"{line.reader.replace(' ', '_')}-{digest}-{Path(case.name).name}"
            (findings / name).write_bytes(case.content)
            print(f"{name}: {what}", flush=True)


def main() -> int:
    """Try everything; 1 if something was found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--structured", type=int, default=20_000, help="structured inputs for each reader")
    parser.add_argument("--mutated", type=int, default=200_000, help="valid files with changed bytes for each reader")
    parser.add_argument("--reader", action="append", choices=list(READERS), help="only this one; may be repeated")
    parser.add_argument("--seed", type=int, default=0, help="other inputs for another seed")
    parser.add_argument("--findings", type=Path, default=Path("fuzz-findings"), help="where inputs with a finding go")
    arguments = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # What readers warn of is not what is looked for.
    logging.basicConfig(handlers=[logging.NullHandler()])
    lines: list[Line] = []
    show(*HEADINGS)
    show(*("-" * width for width in WIDTHS))
    with tempfile.TemporaryDirectory() as temporary, contextlib.suppress(KeyboardInterrupt):
        folder = Path(temporary) / "files"
        prepare(folder)
        for reader in arguments.reader or READERS:
            warm_up(READERS[reader], corpus(reader), folder)
            for kind, make, count in (
                ("structured", structured, arguments.structured),
                ("mutated", changed, arguments.mutated),
            ):
                lines.append(Line(reader, kind))
                try:
                    run(lines[-1], make(reader, count, arguments.seed), count, folder)
                finally:
                    show(*lines[-1].cells())
    keep(lines, arguments.findings)
    return int(any(line.findings for line in lines))


if __name__ == "__main__":
    sys.exit(main())
