"""The report of a run: one HTML page that opens offline, with curves, previews, data, options, versions and messages.

What stands in it comes from the user's files and options, so the page's template escapes everything; what may hold
paths or secrets has been through :mod:`library.training.privacy` before.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from library.files import write_text
from library.pages import data_address, page_template
from library.training import charts
from library.training.charts import Chart
from library.training.preview_grid import PreviewGrid

Outcome = Literal["finished", "stopped", "failed"]

_PAGE: Final = Path(__file__).with_name("report.html")


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """A table of the page.

    Attributes:
        title: What it shows.
        head: Names of the columns.
        rows: Cells, as many in each row as there are columns.
        number_columns: Positions of the columns that hold numbers.
    """

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    number_columns: frozenset[int] = frozenset()


@dataclass(frozen=True, kw_only=True, slots=True)
class Failure:
    """Why a run failed.

    Attributes:
        what: The message.
        trace: Where in the program, for a mistake of ours; "" for one that the user can mend.
    """

    what: str
    trace: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Message:
    """A warning or an error of the log.

    Attributes:
        level: WARNING or ERROR, in lower case.
        time: When, as text.
        text: What it says.
        count: How often it came.
    """

    level: str
    time: str
    text: str
    count: int = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Shot:
    """A preview on the page.

    Attributes:
        step: Finished steps when it was made.
        source: The picture as a ``data:`` address; "" where there is none.
    """

    step: int
    source: str


@dataclass(frozen=True, kw_only=True, slots=True)
class PreviewRow:
    """The previews of one prompt over time.

    Attributes:
        prompt: What they show.
        settings: What else they were made with.
        shots: The pictures, oldest first.
    """

    prompt: str
    settings: str
    shots: tuple[Shot, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """What the page tells.

    Attributes:
        title: Name of the result.
        outcome: How the run ended.
        ending: The same in a sentence.
        summary: Names and values of the most important facts.
        failure: Why it failed, if it did.
        charts: The curves.
        previews: The previews.
        data: The training set, in tables.
        captions: File names and captions of a few examples.
        options: Name, value and default of every option that is not the default.
        versions: Names and versions of programs and packages.
        messages: Warnings and errors of the log.
    """

    title: str
    outcome: Outcome
    ending: str
    summary: tuple[tuple[str, str], ...]
    failure: Failure | None
    charts: tuple[Chart, ...]
    previews: tuple[PreviewRow, ...]
    data: tuple[Table, ...]
    captions: tuple[tuple[str, str], ...]
    options: tuple[tuple[str, str, str], ...]
    versions: tuple[tuple[str, str], ...]
    messages: tuple[Message, ...]


def report_path(folder: Path, name: str | None) -> Path:
    """Where the report of a run goes: ``<name>-report.html``, or ``report.html`` without a name."""
    return folder / (f"{name}-report.html" if name else "report.html")


def write_report(path: Path, report: Report) -> None:
    """Write the page, whole or not at all.

    Raises:
        UserError: The place cannot be written to.
    """
    # A name of a file need not be UTF-8.
    write_text(path, render(report), errors="backslashreplace")


def render(report: Report) -> str:
    """The page."""
    return page_template(_PAGE).render(report=report, size=charts)


def preview_rows(grid: PreviewGrid) -> tuple[PreviewRow, ...]:
    """The previews of ``grid`` for the page; nothing where none were made."""
    if not grid.steps:
        return ()
    return tuple(
        PreviewRow(
            prompt=prompt.prompt,
            settings=", ".join(
                [
                    *([f"without: {prompt.negative_prompt}"] if prompt.negative_prompt else []),
                    f"{prompt.width}x{prompt.height}",
                    f"{prompt.sampler}, {prompt.steps} steps, scale {prompt.scale:g}",
                    *([f"seed {prompt.seed}"] if prompt.seed is not None else []),
                ]
            ),
            shots=tuple(
                Shot(step=step, source=data_address(image) if (image := grid.at(row, step)) else "")
                for step in grid.steps
            ),
        )
        for row, prompt in enumerate(grid.prompts)
    )


def counted(messages: Sequence[Message]) -> tuple[Message, ...]:
    """``messages`` with repeated ones told once, with their number."""
    counts: dict[tuple[str, str], tuple[Message, int]] = {}
    for message in messages:
        first, count = counts.get((message.level, message.text), (message, 0))
        counts[message.level, message.text] = (first, count + message.count)
    return tuple(
        Message(level=first.level, time=first.time, text=first.text, count=count) for first, count in counts.values()
    )
