"""From the manifest of a run back to its command, what is another way now, and whether the results are the same."""

import importlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from library.data.fingerprint import data_differences, data_fingerprint
from library.data.support import DREAMBOOTH, FINE_TUNING, NETWORK, DataSupport
from library.documents import home_expanded
from library.errors import Problem, UserError, raise_if_any
from library.files import write_json
from library.inputs import read_data, split_data
from library.new_words import word_support
from library.options import did_you_mean, parse_options
from library.provenance import content_of
from library.training.placeholders import MARK, filled_in

SUPPORT: Final[Mapping[str, Callable[[Any], DataSupport]]] = {
    "train_network.py": lambda _: NETWORK,
    "train_db.py": lambda _: DREAMBOOTH,
    "fine_tune.py": lambda _: FINE_TUNING,
    "train_textual_inversion.py": lambda options: word_support(options.embedding),
    "train_textual_inversion_XTI.py": lambda options: word_support(options.embedding),
}
"""The scripts, with the data sets that each can use with given options."""

DATASET_FILE: Final = "dataset.json"
PROMPT_FILE: Final = "prompts.json"

# What changes no result: where things go, what is told on the way, and states.
_LEFT_OUT: Final = (
    "console_", "dataset_config", "log_", "logging_dir", "metadata_thumbnail", "no_manifest", "output_dir", "resume",
    "sample_prompts", "save_last_n_epochs_state", "save_last_n_steps_state", "save_state", "seed", "wandb_",
)  # fmt: skip
_PREVIEWS: Final = "sample_"


def places_of(manifest: Mapping[str, Any], given: Sequence[str]) -> dict[str, str]:
    """Where the inputs of a run are now, by their names.

    Args:
        manifest: The run's manifest.
        given: ``NAME=PLACE`` for inputs that are not where the manifest says.

    Raises:
        UserError: With every name that has no place, and everything wrong with those given.
    """
    inputs = {name: one for name, one in manifest["inputs"].items() if one.get("is") != "hub model"}
    places: dict[str, str] = {}
    problems: list[Problem] = []
    for text in given:
        name, place = _divided(text.removeprefix(MARK), inputs)
        if name not in inputs:
            remedy = did_you_mean(name, inputs) or f"The manifest names: {', '.join(inputs) or 'none'}."
            problems.append(Problem(f"the manifest has no input called '{name}'", f"--map '{text}'", remedy))
        elif not place or not home_expanded(Path(place)).exists():
            problems.append(Problem(f"there is no '{place}'", f"--map '{text}'", "Write --map 'NAME=PLACE'."))
        else:
            places[name] = os.path.abspath(home_expanded(Path(place)))
    mistaken = {_divided(text.removeprefix(MARK), inputs)[0] for text in given}
    for name, one in inputs.items():
        kept = one.get("path")
        if name not in mistaken and isinstance(kept, str) and Path(kept).exists():
            places[name] = os.path.abspath(kept)
        elif name not in mistaken:
            problems.append(_unmapped(name, one))
    raise_if_any(problems)
    return places


def _divided(text: str, names: Iterable[str]) -> tuple[str, str]:
    """Name and place; a name may hold the sign that divides them."""
    for name in sorted(names, key=len, reverse=True):
        if text.startswith(f"{name}="):
            return name, text[len(name) + 1 :]
    name, _, place = text.partition("=")
    return name, place


def _unmapped(name: str, one: Mapping[str, Any]) -> Problem:
    uses = " and ".join(map(str, one.get("used_as", ())))
    return Problem(
        f"where is '{name}', a {one.get('is')} given as {uses}?",
        remedy=f"Add --map '{name}=PATH OF THE {str(one.get('is')).upper()}'",
    )


def write_inputs(manifest: Mapping[str, Any], places: Mapping[str, str], folder: Path) -> None:
    """Write the dataset file and the prompts of a run to ``folder``."""
    if manifest.get("dataset") is not None:
        write_json(folder / DATASET_FILE, filled_in(manifest["dataset"], places))
    if manifest.get("prompts"):
        write_json(folder / PROMPT_FILE, manifest["prompts"])


def arguments_of(
    manifest: Mapping[str, Any], places: Mapping[str, str], *, inputs: Path, output_dir: Path
) -> list[str]:
    """The command line of a run that is repeated, without the name of its script.

    Args:
        manifest: The run's manifest.
        places: Where its inputs are.
        inputs: Where :func:`write_inputs` has written.
        output_dir: Where results go.
    """
    prompts = manifest.get("prompts")
    left_out = _LEFT_OUT if prompts else (*_LEFT_OUT, _PREVIEWS)
    words = [f"--output_dir={output_dir}", f"--seed={manifest['seed']}"]
    if manifest.get("dataset") is not None:
        words.append(f"--dataset_config={inputs / DATASET_FILE}")
    if prompts:
        words.append(f"--sample_prompts={inputs / PROMPT_FILE}")
    for name, value in filled_in(manifest["options"], places).items():
        if not name.startswith(left_out):
            words += _words(name, value)
    return words


def _words(name: str, value: Any) -> list[str]:
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--no_{name}"]
    return [f"--{name}", *map(str, value)] if isinstance(value, list) else [f"--{name}={value}"]


def script_of(manifest: Mapping[str, Any]) -> str:
    """The script that made a run.

    Raises:
        UserError: It is none of ours.
    """
    script = manifest["script"]
    if script not in SUPPORT:
        raise UserError(
            f"the manifest is of {script!r}, which is none of {', '.join(SUPPORT)}", where="run.json", remedy="Edit it."
        )
    return str(script)


def input_differences(manifest: Mapping[str, Any], places: Mapping[str, str], arguments: Sequence[str]) -> list[str]:
    """What of a run's models, images and captions is not the same any more, a line each.

    Raises:
        UserError: The options or the data set cannot be used.
    """
    script = script_of(manifest)
    kind = importlib.import_module(script.removesuffix(".py")).Options
    options: Any = parse_options(kind, arguments, prog=script, description="", announce=lambda text: None)
    spec, records = read_data(options, support=SUPPORT[script](options))
    training = split_data(spec, records, options.validation).training
    return [
        *(line for name, one in manifest["inputs"].items() for line in _of_input(name, one, places.get(name, name))),
        *data_differences(manifest["data"], data_fingerprint(spec, training, progress=True)),
    ]


def _of_input(name: str, before: Mapping[str, Any], source: str) -> list[str]:
    now = content_of(before["used_as"], source)
    if "sha256" in before or "sha256" in now:
        return [] if before.get("sha256") == now.get("sha256") else [f"{name}: another file"]
    old, new = before.get("files", {}), now.get("files", {})
    return [f"{name}: another {file}" for file in sorted({*old, *new}) if old.get(file) != new.get(file)]


def history_notices(manifest: Mapping[str, Any]) -> list[str]:
    """Why a run may not be what one run from its beginning gives: how it ended, and what its parts were."""
    steps = manifest["steps"]
    found = []
    if manifest["outcome"] != "finished":
        found.append(f"the run has not finished: {steps['done']} of {steps['total']} steps are known to be done")
    for part in manifest["parts"]:
        first, last = part["steps"]
        if part["outcome"] == "unknown":
            found.append(f"of the first {last} steps nothing is known but the state they led to")
        changed = "; ".join(map(str, part.get("changed_afterwards", ())))
        if changed:
            found.append(f"after step {last} the run was continued with changes ({changed})")
        if part.get("environment", manifest["environment"]) != manifest["environment"]:
            found.append(f"steps {first} to {last} were done with other versions or threads")
    return found


def largest_difference(first: Path, second: Path) -> str:
    """How far two models are apart, in words."""
    from library.files import read_tensors

    if first.is_dir() or second.is_dir():
        return "folders are not compared further"
    old, new = (read_tensors(path, mapped=True).tensors for path in (first, second))
    if {name: one.shape for name, one in old.items()} != {name: one.shape for name, one in new.items()}:
        return "they do not hold the same tensors"
    apart = {name: float((old[name].double() - new[name].double()).abs().max()) for name in old if old[name].numel()}
    name = max(apart, key=lambda one: apart[one])
    return f"at most {apart[name]:.3g} apart, in {name}"
