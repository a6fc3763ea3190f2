"""The slow part of the checks: what only reading every pixel and every token shows."""

from collections.abc import Sequence

from library.data.file_facts import read_facts
from library.data.findings import Finding
from library.data.lint_captions import Tokens, lint_lengths, lint_orphans
from library.data.lint_files import lint_copies, lint_files
from library.data.records import ImageRecord
from library.data.spec import DataSpec


def lint_thoroughly(spec: DataSpec, records: Sequence[ImageRecord], tokens: Tokens) -> list[Finding]:
    """What only reading every pixel and every token shows; slow, so for checks without training.

    Args:
        spec: The data sets.
        records: Their images.
        tokens: How captions fall into tokens.
    """
    facts, findings = read_facts(records)
    for number, dataset in enumerate(spec.datasets):
        own = [record for record in records if record.dataset == number]
        for position, subset in enumerate(dataset.subsets):
            images = [record for record in own if record.subset == position]
            findings.extend(lint_files(subset, images, facts))
            findings.extend(lint_lengths(subset, images, tokens))
            findings.extend(lint_orphans(subset))
        findings.extend(lint_copies(own, facts, dataset.where))
    return findings
