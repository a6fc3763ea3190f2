"""Who may import whom, read from the source."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Lower layers first; a module may import its own layer's package and every layer below it.
BASE = [
    "library.errors",
    "library.streams",
    "library.disk_space",
    "library.documents",
    "library.files",
    "library.pages",
    "library.scrubbing",
    "library.tensor_headers",
    "library.torch_files",
    "library.wording",
]
OPTIONS = [
    "library.options",
    "library.option_fields",
    "library.option_foreign",
    "library.option_help",
    "library.option_positions",
    "library.option_sources",
    "library.option_values",
    "library.runtime_options",
]
RUNTIME = ["library.randomness", "library.messages", "library.runtime", "library.script_options"]
PACKAGES = ["library.models", "library.diffusion", "library.data", "library.training"]
TOP = [
    "library.breakdowns",
    "library.option_relations",
    "library.conditioning",
    "library.cached_conditioning",
    "library.task",
    "library.new_words",
    "library.inputs",
    "library.start_screen",
    "library.inspection",
    "library.resuming",
    "library.results",
    "library.validation",
    "library.hooks",
    "library.reporting",
    "library.provenance",
    "library.manifest",
    "library.reproduction",
    "library.run",
    "library.caption_lengths",
    "library.full_model_options",
    "library.full_model_checks",
    "library.full_model",
    "library.textual_inversion",
    "library.textual_inversion_options",
    "library.layered_conditioning",
    "library.new_word_checks",
]


def imported_modules(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.add(node.module)
    return found


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def layer(name: str) -> int:
    for number, names in enumerate([BASE, OPTIONS, RUNTIME, PACKAGES, TOP]):
        if any(name == known or name.startswith(known + ".") for known in names):
            return number
    raise AssertionError(f"{name} has no layer: add it to this test and to the design")


LIBRARY = sorted((ROOT / "library").rglob("*.py"))


@pytest.mark.parametrize("path", LIBRARY, ids=module_name)
def test_library_imports_only_downwards(path: Path) -> None:
    name = module_name(path)
    if name in {"library", *PACKAGES}:
        return
    for other in imported_modules(path):
        root = other.split(".")[0]
        assert root not in {"networks", "finetune", "tools", "tests"}, f"{name} imports {other}"
        assert not (ROOT / f"{root}.py").exists(), f"{name} imports the script {other}"
        if root != "library" or other == "library":
            continue
        assert layer(other) <= layer(name), f"{name} imports {other} from a higher layer"
        if layer(other) == layer(name) == 3:
            assert other.split(".")[1] == name.split(".")[1], f"{name} imports {other}: the packages stand side by side"


@pytest.mark.parametrize("folder", ["networks", "finetune", "tools"])
def test_nobody_imports_a_script_or_the_full_model(folder: str) -> None:
    for path in sorted((ROOT / folder).rglob("*.py")):
        for other in imported_modules(path):
            assert other != "library.full_model", f"{path.name} imports {other}"
            assert not (ROOT / f"{other.split('.')[0]}.py").exists(), f"{path.name} imports the script {other}"


@pytest.mark.parametrize("path", [*LIBRARY, *sorted((ROOT / "networks").rglob("*.py"))], ids=module_name)
def test_modules_are_of_a_readable_size(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 500
