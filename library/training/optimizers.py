"""Optimizers by name: which there are, what they need, and how they are built.

Names, packages and arguments are checked without importing torch: what a class accepts is read from its source.
"""

import ast
import importlib
import importlib.util
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from library.errors import Problem, UserError, raise_if_any
from library.training.arguments import choose_from, read_arguments, unknown_names
from library.training.options import OptimizerOptions

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

_ARGS_FLAG: Final = "--optimizer_args"


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerKind:
    """One optimizer that can be asked for.

    Attributes:
        name: The spelling shown; any case is accepted.
        module: Where the class is written, importable.
        class_name: Name of the class.
        package: What ``pip install`` needs where the project's requirements do not bring it.
        fixed: Arguments that make the name what it says.
        added: Arguments added, and announced, unless the user gives them.
        small_state: It keeps 8-bit state, which not every machine can run.
    """

    name: str
    module: str
    class_name: str
    package: str | None = None
    fixed: Mapping[str, object] = field(default_factory=dict)
    added: Mapping[str, object] = field(default_factory=dict)
    small_state: bool = False


_KINDS: Final = {
    kind.name.lower(): kind
    for kind in (
        OptimizerKind(name="AdamW", module="torch.optim.adamw", class_name="AdamW"),
        OptimizerKind(
            name="AdamW8bit",
            module="bitsandbytes.optim.adamw",
            class_name="AdamW8bit",
            package="bitsandbytes",
            small_state=True,
        ),
        OptimizerKind(name="Lion", module="lion_pytorch.lion_pytorch", class_name="Lion", package="lion-pytorch"),
        OptimizerKind(
            name="SGDNesterov",
            module="torch.optim.sgd",
            class_name="SGD",
            fixed={"nesterov": True},
            added={"momentum": 0.9},
        ),
    )
}
# fmt: off
_LATER: Final = (
    "adafactor", "adamwschedulefree", "dadaptadagrad", "dadaptadam", "dadaptadampreprint", "dadaptadan",
    "dadaptadanip", "dadaptation", "dadaptlion", "dadaptsgd", "lion8bit", "pagedadamw", "pagedadamw32bit",
    "pagedadamw8bit", "pagedlion8bit", "prodigy", "radamschedulefree", "sgdnesterov8bit", "sgdschedulefree",
)
# fmt: on


class BuiltOptimizer(NamedTuple):
    """An optimizer with what is told about it.

    Attributes:
        optimizer: The optimizer.
        name: Full name of its class.
        arguments: The arguments given or added, without the learning rate.
    """

    optimizer: "torch.optim.Optimizer"
    name: str
    arguments: dict[str, object]

    @property
    def description(self) -> str:
        """``module.Class(key=value,...)``, as stored in a result's metadata."""
        listed = ",".join(f"{name}={value}" for name, value in self.arguments.items())
        return f"{self.name}({listed})" if listed else self.name


def check_optimizer(options: OptimizerOptions) -> list[Problem]:
    """What is wrong with the optimizer's name, package or arguments; imports nothing heavy."""
    name = _name_of(options)
    arguments, problems = read_arguments(options.optimizer_args, flag=_ARGS_FLAG)
    kind = _KINDS.get(name.lower())
    if kind is None:
        what = "is not available yet" if "." in name or name.lower() in _LATER else "is not known"
        remedy = choose_from(name, [known.name for known in _KINDS.values()], "Available")
        return [*problems, Problem(f"the optimizer {name!r} {what}", where="--optimizer_type", remedy=remedy)]
    if importlib.util.find_spec(kind.module.partition(".")[0]) is None:
        return [*problems, _missing_package(kind, "is not installed")]
    return problems + _argument_problems(kind, arguments)


def _name_of(options: OptimizerOptions) -> str:
    return options.settled().optimizer_type or "AdamW"


def _missing_package(kind: OptimizerKind, reason: str) -> Problem:
    module = kind.module.partition(".")[0]
    return Problem(
        f"{kind.name} needs the package {kind.package or module}, which {reason}",
        where="--optimizer_type",
        remedy=f"pip install {kind.package or module}   (or choose AdamW)",
    )


def _argument_problems(kind: OptimizerKind, arguments: Mapping[str, object]) -> list[Problem]:
    problems = []
    if "lr" in arguments:
        problems.append(
            Problem("the learning rate has its own option", where=_ARGS_FLAG, remedy="Use --learning_rate.")
        )
    accepted = _accepted_arguments(kind.module, kind.class_name)
    if accepted is None:
        return problems
    accepted = [name for name in accepted if name not in kind.fixed]
    given = [name for name in arguments if name != "lr"]
    return problems + unknown_names(given, accepted, flag=_ARGS_FLAG, owner=kind.name)


def _accepted_arguments(module: str, class_name: str) -> list[str] | None:
    """Arguments of a class beyond parameters and learning rate, read from its source; None where that does not tell.

    Importing the class would import torch, which takes longer than telling a user about a misspelt name may.
    """
    top, *parts = module.split(".")
    found = importlib.util.find_spec(top)
    if found is None or not found.submodule_search_locations:
        return None
    source = Path(found.submodule_search_locations[0], *parts).with_suffix(".py")
    if not source.is_file():
        return None
    for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ClassDef) and node.name == class_name:
            return next((_argument_names(item) for item in node.body if isinstance(item, ast.FunctionDef)), None)
    return None


def _argument_names(function: ast.FunctionDef) -> list[str] | None:
    if function.name != "__init__" or function.args.kwarg is not None:
        return None
    names = [argument.arg for argument in (*function.args.args, *function.args.kwonlyargs)]
    return [name for name in names if name not in ("self", "params", "lr")]


def build_optimizer(options: OptimizerOptions, groups: Sequence[dict[str, Any]]) -> BuiltOptimizer:
    """Build the optimizer that ``options`` ask for over ``groups``.

    Args:
        options: The optimizer options.
        groups: Parameter groups with ``params``, ``lr`` and ``name``.

    Raises:
        UserError: A name, a package or an argument is wrong, or the machine cannot run the optimizer.
    """
    raise_if_any(check_optimizer(options))
    kind = _KINDS[_name_of(options).lower()]
    given, _ = read_arguments(options.optimizer_args, flag=_ARGS_FLAG)
    added = {name: value for name, value in kind.added.items() if name not in given}
    for name, value in added.items():
        logger.info("%s: %s=%s is added; give it with %s to change it", kind.name, name, value, _ARGS_FLAG)
    arguments = {**given, **added}
    factory = _import_class(kind)
    try:
        optimizer = factory(list(groups), lr=options.learning_rate, **arguments, **kind.fixed)
    except (TypeError, ValueError, AssertionError) as error:
        raise UserError(
            f"{kind.name} refuses its arguments: {error or 'a value is out of range'}",
            where=f"{_ARGS_FLAG}, --learning_rate",
            remedy="See the documentation of the optimizer for the range of each argument.",
        ) from error
    if kind.small_state:
        _probe(kind, factory, groups)
    return BuiltOptimizer(optimizer, f"{factory.__module__}.{factory.__qualname__}", arguments)


def _import_class(kind: OptimizerKind) -> Any:
    """The class of ``kind``; a package may be installed and yet not load (a library or driver it needs is missing)."""
    try:
        return getattr(importlib.import_module(kind.module), kind.class_name)
    except (ImportError, AttributeError, OSError, RuntimeError) as error:
        raise UserError.of([_missing_package(kind, f"cannot be loaded: {error}")]) from error


def _probe(kind: OptimizerKind, factory: Any, groups: Sequence[Mapping[str, Any]]) -> None:
    """Make one step on a throw-away parameter, large enough for 8-bit state, where the real ones are."""
    import torch

    device = next((parameter.device for group in groups for parameter in group["params"]), torch.device("cpu"))
    parameter = torch.nn.Parameter(torch.zeros(4096, device=device))
    parameter.grad = torch.ones_like(parameter)
    try:
        factory([parameter], lr=1e-3).step()
    except Exception as error:
        raise UserError.of([_missing_package(kind, f"cannot run on {device.type} here: {error}")]) from error
