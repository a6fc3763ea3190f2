"""Looking without training: ``--dry_run``, ``--validate_dataset`` and ``--debug_dataset``."""

import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Protocol

from library.data.findings import Finding
from library.data.setup import prepare_data
from library.data.support import NETWORK, DataSupport
from library.data.validation import hold_out
from library.errors import EXIT_USER_ERROR, UserError
from library.inputs import Inputs, caption_tokens, check_data, read_data, split_data
from library.new_words import Rewording, check_captions
from library.runtime import has_gpu
from library.runtime_options import RuntimeOptions
from library.start_screen import ScreenOptions, start_screen


class InspectionOptions(ScreenOptions, Protocol):
    """The groups of a script's options that looking needs."""

    @property
    def runtime(self) -> RuntimeOptions: ...  # noqa: D102


def inspect_data(
    options: InspectionOptions, *, support: DataSupport = NETWORK, rewording: Rewording | None = None
) -> int | None:
    """Do what ``--validate_dataset`` or ``--debug_dataset`` asks for; the exit code, None where neither is given.

    Only the data set is looked at: no model needs to be named.

    Args:
        options: The script's options.
        support: What data sets the script can use.
        rewording: The new word that captions are made of, where the script trains one.

    Raises:
        UserError: There is nothing to show, because of mistakes in the data set.
    """
    if options.check.validate_dataset:
        as_json = options.check.validate_dataset == "json"
        return validate_dataset(options, as_json=as_json, support=support, rewording=rewording)
    if options.source.debug_dataset:
        return show_dataset(options, support=support, rewording=rewording)
    return None


def dry_run(
    options: InspectionOptions,
    inputs: Inputs,
    *,
    suffix: str,
    trained_values: int | None = None,
    saved_values: int | None = None,
    rewording: Rewording | None = None,
) -> int:
    """Print what a run would do; returns the exit code.

    Args:
        options: The script's options.
        inputs: The checked inputs.
        suffix: Suffix of the result's file.
        trained_values: Number of weights that would be trained, where it is known without loading the model.
        saved_values: Number of weights that a saved model would hold, where it is another.
        rewording: The new word that captions are made of, where the script trains one.
    """
    if _is_main():
        screen = start_screen(
            options,
            inputs,
            prepare_data(inputs.spec, inputs.records, reword=rewording),
            seed=_seed(options),
            world=_processes(),
            suffix=suffix,
            trained_values=trained_values,
            saved_values=saved_values,
        )
        print("\n".join(screen))
        if options.runtime.mixed_precision == "fp16" and not has_gpu():
            print("on this computer the run would be refused: it has no GPU that torch finds, and fp16 needs one")
        if options.runtime.seed is None:
            print("without --seed a run draws one: the captions shown are those of --seed=0")
        print("dry run: nothing was trained")
    return 0


def validate_dataset(
    options: InspectionOptions, *, as_json: bool, support: DataSupport = NETWORK, rewording: Rewording | None = None
) -> int:
    """Print what is wrong with the data set; returns the exit code, 2 where there are errors."""
    images = 0
    try:
        found = check_data(options, support=support)
        split = hold_out(found.spec, found.records, options.validation)
        words = check_captions(rewording, found.spec, split.training) if rewording is not None else []
        findings, images = (*found.findings, *split.findings, *words), len(found.records)
    except UserError as problem:
        findings = tuple(Finding("error", one.what, one.where or "", one.remedy or "") for one in problem.problems)
    if _is_main():
        print(_as_json(findings, images) if as_json else _as_text(findings, images))
    return EXIT_USER_ERROR if any(finding.severity == "error" for finding in findings) else 0


def _as_json(findings: Sequence[Finding], images: int) -> str:
    counts = Counter(finding.severity for finding in findings)
    report = {
        "images": images,
        "errors": counts["error"],
        "warnings": counts["warning"],
        "findings": [asdict(finding) for finding in findings],
    }
    return json.dumps(report, indent=2, ensure_ascii=False)


def _as_text(findings: Sequence[Finding], images: int) -> str:
    counts = Counter(finding.severity for finding in findings)
    ordered = sorted(findings, key=lambda finding: finding.severity != "error")
    summary = f"{images} images: {counts['error']} errors, {counts['warning']} warnings"
    return "\n".join([*(f"{finding.severity}: {finding}" for finding in ordered), summary])


def show_dataset(
    options: InspectionOptions, *, support: DataSupport = NETWORK, rewording: Rewording | None = None
) -> int:
    """Write the pages and pictures of ``--debug_dataset``, and open them where there is a screen."""
    spec, records = read_data(options, support=support)
    split = split_data(spec, records, options.validation)
    data = prepare_data(spec, split.training, reword=rewording)
    if not _is_main():
        return 0
    from library.data.preview import open_in_browser, write_preview
    from library.training.progress import RunLength

    plan = data.plan(_seed(options), accumulation=options.length.gradient_accumulation_steps, world=_processes())
    length = RunLength.of(
        max_train_steps=options.length.max_train_steps,
        max_train_epochs=options.length.max_train_epochs,
        steps_per_epoch=plan.steps_per_epoch,
    )
    preview = write_preview(
        (options.save.output_dir or Path()) / "dataset_preview",
        data,
        plan,
        tokens_of=caption_tokens(options.prompts, new_words=rewording.word.names if rewording else ()),
        seed=_seed(options),
        total_steps=length.total_steps,
    )
    print(f"data set: {preview.page} and {len(preview.sheets)} contact sheets beside it")
    open_in_browser(preview.page)
    return 0


def _seed(options: InspectionOptions) -> int:
    return options.runtime.seed or 0


def _processes() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def _is_main() -> bool:
    return os.environ.get("RANK", "0") == "0"
