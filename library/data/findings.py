"""What is wrong, or remarkable, about a training set."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from library.errors import Problem, UserError

Severity = Literal["error", "warning"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One observation about the training set.

    Attributes:
        severity: An ``error`` stops the run before training; a ``warning`` is shown.
        what: What was found.
        where: The file, the folder, or the line that asked for it.
        remedy: What the user can do about it.
    """

    severity: Severity
    what: str
    where: str
    remedy: str

    def __str__(self) -> str:
        return str(_problem(self))


def error(what: str, where: str, remedy: str) -> Finding:
    """A finding that stops the run."""
    return Finding("error", what, where, remedy)


def warning(what: str, where: str, remedy: str) -> Finding:
    """A finding that is only shown."""
    return Finding("warning", what, where, remedy)


def merged(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """``findings`` with those that say the same of several places as one, in the order of the first of each.

    The same folder in several data sets, one for each resolution, is the usual case.
    """
    places: dict[tuple[Severity, str, str], dict[str, None]] = {}
    for finding in findings:
        places.setdefault((finding.severity, finding.what, finding.remedy), {})[finding.where] = None
    return tuple(
        Finding(severity, what, ", ".join(where), remedy) for (severity, what, remedy), where in places.items()
    )


def _problem(finding: Finding) -> Problem:
    return Problem(finding.what, finding.where, finding.remedy)


def warnings_of(findings: Iterable[Finding]) -> list[Finding]:
    """The warnings among ``findings``.

    Raises:
        UserError: There are errors; it carries all of them.
    """
    found = list(findings)
    errors = [_problem(finding) for finding in found if finding.severity == "error"]
    if errors:
        raise UserError.of(errors)
    return found
