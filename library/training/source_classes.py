"""Classes of installed packages, found and read in their source.

Importing them would import torch, which takes longer than telling a user about a misspelt name may.
"""

import ast
import importlib.util
from dataclasses import dataclass
from functools import cache
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Final

_MOST_STEPS: Final = 8
"""Modules that a name may be passed on through."""


@dataclass(frozen=True, slots=True)
class FoundClass:
    """A class in a source file.

    Attributes:
        module: The module that defines it, importable.
        arguments: Names of what it is made with, in order, without ``self``; None where the source does not tell.
    """

    module: str
    arguments: tuple[str, ...] | None


def is_installed(module: str) -> bool:
    """Whether the package that ``module`` belongs to is there; whether it can be loaded is another matter."""
    return _spec(module) is not None


def is_import_path(text: str) -> bool:
    """Whether ``text`` is made of names with dots between them."""
    return all(part.isidentifier() for part in text.split("."))


def _spec(module: str) -> ModuleSpec | None:
    """What the system knows of the package that ``module`` belongs to; None where it cannot be imported by its name."""
    try:
        return importlib.util.find_spec(module.partition(".")[0])
    except (ImportError, ValueError):
        # A name that is empty, or stands for what was not imported by it, as __main__ does.
        return None


def find_class(module: str, name: str) -> FoundClass | None:
    """The class that ``module`` calls ``name``, wherever it is written; None where the source does not tell."""
    return _find(module, name, _MOST_STEPS)


def exported_classes(module: str) -> dict[str, str]:
    """Modules by the public classes that ``module`` passes on with ``from ... import``, or defines itself."""
    tree = _source(module)
    if tree is None:
        return {}
    found = {node.name: module for node in tree.body if isinstance(node, ast.ClassDef)}
    for node in tree.body:
        if isinstance(node, ast.ImportFrom):
            origin = _origin(node, module)
            found |= {alias.asname or alias.name: origin for alias in node.names}
    return {name: origin for name, origin in found.items() if name[:1].isupper()}


def _find(module: str, name: str, steps: int) -> FoundClass | None:
    tree = _source(module) if steps else None
    if tree is None:
        return None
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and node.name == name:
            return FoundClass(module, _arguments(node))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if name == (alias.asname or alias.name):
                    return _find(_origin(node, module), alias.name, steps - 1)
    return None


def _source(module: str) -> ast.Module | None:
    path = _path(module)
    return None if path is None else _parsed(path)


@cache
def _parsed(path: Path) -> ast.Module | None:
    try:
        return ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError):
        return None


def _path(module: str) -> Path | None:
    """The source file of a module; packages in between are not imported."""
    parts, spec = module.split(".")[1:], _spec(module)
    if spec is None:
        return None
    if not spec.submodule_search_locations:
        return Path(spec.origin) if spec.origin and not parts else None
    place = Path(spec.submodule_search_locations[0], *parts)
    return next((path for path in (place.with_suffix(".py"), place / "__init__.py") if path.is_file()), None)


def _origin(node: ast.ImportFrom, module: str) -> str:
    """The module that a ``from`` statement in ``module`` names."""
    if not node.level:
        return node.module or ""
    path = _path(module)
    is_package = path is not None and path.name == "__init__.py"
    parts = module.split(".")
    parts = parts[: len(parts) - node.level + is_package]
    return ".".join([*parts, node.module] if node.module else parts)


def _arguments(node: ast.ClassDef) -> tuple[str, ...] | None:
    for item in node.body:
        if isinstance(item, ast.FunctionDef) and item.name == "__init__" and item.args.kwarg is None:
            return tuple(argument.arg for argument in (*item.args.args[1:], *item.args.kwonlyargs))
    return None
