"""Keys of a dataset file that nothing here reads are told, not silently kept."""

from pathlib import Path

import pytest

from library.data.config import read_spec
from library.data.options import CacheOptions, CaptionOptions, ImageOptions, SourceOptions


def findings(tmp_path: Path, dataset: str, subset: str) -> list[tuple[str, str]]:
    (tmp_path / "images").mkdir()
    path = tmp_path / "dataset.toml"
    path.write_text(
        f"[[datasets]]\nresolution = 512\n{dataset}\n[[datasets.subsets]]\n"
        f"image_dir = '{(tmp_path / 'images').as_posix()}'\n{subset}\n",
        encoding="utf-8",
    )
    _, found = read_spec(SourceOptions(dataset_config=path), ImageOptions(), CaptionOptions(), CacheOptions())
    return [(finding.severity, finding.what) for finding in found]


@pytest.mark.parametrize(
    ("dataset", "subset", "severity", "words"),
    [
        ("network_multiplier = 0.5", "", "warning", "network_multiplier 0.5"),
        ("", "custom_attributes = { note = 'x' }", "warning", "note"),
        ("", "custom_attributes = { diff_output_preservation = true }", "error", "not available yet"),
    ],
)
def test_what_has_no_effect_is_told(dataset: str, subset: str, severity: str, words: str, tmp_path: Path) -> None:
    ((found, what),) = findings(tmp_path, dataset, subset)
    assert found == severity
    assert words in what


def test_usual_values_are_not_remarked(tmp_path: Path) -> None:
    assert findings(tmp_path, "network_multiplier = 1.0", "custom_attributes = {}") == []
