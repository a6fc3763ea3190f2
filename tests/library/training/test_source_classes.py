import sys

import pytest

from library.training.source_classes import exported_classes, find_class, is_installed


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package that would fail if it were imported."""
    root = tmp_path / "fragile"
    (root / "inner").mkdir(parents=True)
    (root / "__init__.py").write_text("from .inner import Best as Good, Other\nraise RuntimeError\n")
    (root / "inner" / "__init__.py").write_text("from ..deep import Best\nfrom fragile.deep import Other, small\n")
    (root / "deep.py").write_text(
        "class Best:\n    def __init__(self, params, lr=1, *, decay=0): ...\n"
        "class Other:\n    def __init__(self, params, **settings): ...\n"
        "class Bare: ...\n"
    )
    (tmp_path / "single.py").write_text("class Alone:\n    def __init__(self, params): ...\n")
    (tmp_path / "broken.py").write_text("class Alone(\n")
    monkeypatch.syspath_prepend(str(tmp_path))


@pytest.mark.parametrize(
    ("module", "name", "defined", "arguments"),
    [
        ("fragile.deep", "Best", "fragile.deep", ("params", "lr", "decay")),
        ("fragile", "Good", "fragile.deep", ("params", "lr", "decay")),
        ("fragile.inner", "Other", "fragile.deep", None),
        ("fragile.deep", "Bare", "fragile.deep", None),
        ("single", "Alone", "single", ("params",)),
    ],
)
@pytest.mark.usefixtures("package")
def test_classes_are_found_without_importing(module, name, defined, arguments):
    found = find_class(module, name)
    assert found is not None
    assert (found.module, found.arguments) == (defined, arguments)
    assert "fragile" not in sys.modules


@pytest.mark.parametrize(
    ("module", "name"),
    [("fragile", "Best"), ("fragile.nowhere", "Best"), ("broken", "Alone"), ("absent", "Best"), ("single.a", "Alone")],
)
@pytest.mark.usefixtures("package")
def test_what_the_source_does_not_tell_is_none(module, name):
    assert find_class(module, name) is None


@pytest.mark.usefixtures("package")
def test_exported_and_installed(monkeypatch):
    assert exported_classes("fragile.inner") == {"Best": "fragile.deep", "Other": "fragile.deep"}
    assert exported_classes("absent") == {}
    assert is_installed("fragile.deep")
    assert not is_installed("absent.deep")
    # As it is where a script was started by its file.
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)
    assert not any(map(is_installed, ("__main__", "", ".fragile")))
