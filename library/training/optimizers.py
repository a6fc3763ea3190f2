"""Optimizers: checked without importing torch, tried out before a model is loaded, and built."""

import contextlib
import importlib
import io
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, cast

from library.errors import Problem, UserError, raise_if_any
from library.training.arguments import read_arguments, unknown_names
from library.training.optimizer_kinds import NAME_FLAG, OptimizerKind, missing_package, resolve
from library.training.options import OptimizerOptions
from library.training.source_classes import find_class

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

ResultWeights = Callable[[], AbstractContextManager[None]]
"""Makes a block in which the weights are those to save, show and measure."""

FOUND_RATE: Final = "d*lr/"
"""Begins the names of rates that an optimizer has found itself."""
_ARGS_FLAG: Final = "--optimizer_args"
_TRIAL_SHAPE: Final = (64, 64)
"""Large enough for 8-bit state, which smaller weights do not get."""


@dataclass(frozen=True, slots=True)
class BuiltOptimizer:
    """An optimizer with what is told about it.

    Attributes:
        optimizer: The optimizer.
        name: Full name of its class.
        arguments: The arguments given or added, without the learning rate.
        coupled: What it does to one weight depends on the others.
    """

    optimizer: "torch.optim.Optimizer"
    name: str
    arguments: dict[str, object]
    coupled: bool

    @property
    def description(self) -> str:
        """``module.Class(key=value,...)``, as stored in a result's metadata."""
        listed = ",".join(f"{name}={value}" for name, value in self.arguments.items())
        return f"{self.name}({listed})" if listed else self.name


def kind_of(options: OptimizerOptions) -> OptimizerKind | None:
    """The optimizer that is asked for; None where the name is wrong or the package missing."""
    found = _resolved(options)
    return None if isinstance(found, Problem) else found


def _resolved(options: OptimizerOptions) -> OptimizerKind | Problem:
    return resolve(options.settled().optimizer_type or "AdamW")


def check_optimizer(options: OptimizerOptions) -> list[Problem]:
    """What is wrong with the optimizer's name, package or arguments; imports nothing heavy."""
    arguments, problems = read_arguments(options.optimizer_args, flag=_ARGS_FLAG)
    kind = _resolved(options)
    if isinstance(kind, Problem):
        return [*problems, kind]
    if kind.coupled and options.fused_backward_pass:
        problems.append(
            Problem(
                f"{kind.name} needs the whole gradient before it can change any weight",
                where="--fused_backward_pass",
                remedy="Leave it out, or choose another optimizer, for example AdamW8bit.",
            )
        )
    return problems + _argument_problems(kind, arguments)


def _argument_problems(kind: OptimizerKind, arguments: Mapping[str, object]) -> list[Problem]:
    problems = []
    if "lr" in arguments:
        problems.append(
            Problem("the learning rate has its own option", where=_ARGS_FLAG, remedy="Use --learning_rate.")
        )
    found = find_class(kind.module, kind.class_name)
    if found is None or found.arguments is None:
        return problems
    accepted = [name for name in found.arguments if name not in ("params", "lr", *kind.fixed)]
    given = [name for name in arguments if name != "lr"]
    return problems + unknown_names(given, accepted, flag=_ARGS_FLAG, owner=kind.name)


def check_groups(options: OptimizerOptions, groups: Sequence[Mapping[str, Any]]) -> list[Problem]:
    """Learning rates of parts that differ where the optimizer takes one for all."""
    kind = kind_of(options)
    rates = {float(group["lr"]) for group in groups if group["lr"]}
    if kind is None or not kind.one_rate or len(rates) < 2:
        return []
    parts = ", ".join(f"{group['name']} {group['lr']:g}" for group in groups)
    return [
        Problem(
            f"{kind.name} takes one learning rate for all that is trained, but there are: {parts}",
            where="--learning_rate and the rates of single parts",
            remedy="Give every part the same rate, leave them out, or train one part only.",
        )
    ]


def uses_relative_step(options: OptimizerOptions) -> bool:
    """Whether Adafactor sets its learning rate by itself."""
    kind = kind_of(options)
    given, _ = read_arguments(options.optimizer_args, flag=_ARGS_FLAG)
    return kind is not None and kind.relative_step and bool(_arguments(kind, given)["relative_step"])


def _arguments(kind: OptimizerKind, given: Mapping[str, object]) -> dict[str, object]:
    """The arguments given, and those that are added."""
    arguments = {**given, **{name: value for name, value in kind.added.items() if name not in given}}
    if kind.relative_step:
        # A warm-up of its own is one of relative steps.
        arguments["relative_step"] = bool(given.get("relative_step", True) or given.get("warmup_init", False))
    return arguments


def build_optimizer(options: OptimizerOptions, groups: Sequence[dict[str, Any]]) -> BuiltOptimizer:
    """Build the optimizer that ``options`` ask for over ``groups``, ready for its first step; tells what was added.

    Args:
        options: The optimizer options.
        groups: Parameter groups with ``params``, ``lr`` and ``name``.

    Raises:
        UserError: A name, a package or an argument is wrong, or the rates of the groups do not go together.
    """
    built = _built(options, groups)
    given, _ = read_arguments(options.optimizer_args, flag=_ARGS_FLAG)
    for name, value in built.arguments.items():
        if name not in given or given[name] != value:
            logger.info("%s: %s=%s is set; %s changes it", built.name.rpartition(".")[2], name, value, _ARGS_FLAG)
    return built


def _built(options: OptimizerOptions, groups: Sequence[dict[str, Any]]) -> BuiltOptimizer:
    raise_if_any(check_optimizer(options) or check_groups(options, groups))
    kind = _resolved(options)
    assert isinstance(kind, OptimizerKind), "checked above"
    given, _ = read_arguments(options.optimizer_args, flag=_ARGS_FLAG)
    arguments = _arguments(kind, given)
    members, rate = list(groups), cast(float | None, options.learning_rate)
    if arguments.get("relative_step") is True and kind.relative_step:
        members, rate = [{name: value for name, value in group.items() if name != "lr"} for group in groups], None
    factory = _import_class(kind)
    try:
        optimizer = factory(members, lr=rate, **arguments, **kind.fixed)
    except (TypeError, ValueError, AssertionError, NotImplementedError) as error:
        raise UserError(
            f"{kind.name} refuses its arguments: {error or 'a value is out of range'}",
            where=f"{_ARGS_FLAG}, --learning_rate",
            remedy="See the documentation of the optimizer for the range of each argument.",
        ) from error
    if kind.schedule_free:
        optimizer.train()
    return BuiltOptimizer(optimizer, f"{factory.__module__}.{factory.__qualname__}", arguments, kind.coupled)


def _import_class(kind: OptimizerKind) -> Any:
    """The class of ``kind``; a package may be installed and yet not load (a library or driver it needs is missing)."""
    try:
        return getattr(importlib.import_module(kind.module), kind.class_name)
    except (ImportError, AttributeError, OSError, RuntimeError) as error:
        raise UserError.of([missing_package(kind, f"cannot be loaded: {error}")]) from error


def try_optimizer(options: OptimizerOptions, device: "torch.device") -> "torch.optim.Optimizer":
    """Make one step on a throw-away weight, so that what an optimizer refuses is known before a model is loaded.

    Args:
        options: The optimizer options.
        device: Where the run will be.

    Returns:
        The optimizer that made the step.

    Raises:
        UserError: An argument is out of range, the package does not load, or the machine cannot run the optimizer.
    """
    import torch

    weight = torch.nn.Parameter(torch.zeros(_TRIAL_SHAPE, device=device))
    weight.grad = torch.ones_like(weight)
    group = {"params": [weight], "lr": options.learning_rate, "name": "trial"}
    # Some print what they were given; it would be said twice.
    with contextlib.redirect_stdout(io.StringIO()):
        built = _built(options, [group])
        try:
            built.optimizer.step()
        except Exception as error:
            kind = kind_of(options)
            assert kind is not None, "it has been built"
            raise UserError.of([missing_package(kind, f"cannot run on {device.type} here: {error}")]) from error
    return built.optimizer


def rehearse_optimizer(options: OptimizerOptions, groups: Sequence[Mapping[str, Any]]) -> "torch.optim.Optimizer":
    """Make the optimizer for the weights of a run once more, to throw it away: some take only weights of some shapes.

    Args:
        options: The optimizer options, tried out.
        groups: Parameter groups; they are not changed.

    Raises:
        UserError: The optimizer cannot train these weights, or with these rates.
    """
    raise_if_any(check_groups(options, groups))
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            return _built(options, [dict(group) for group in groups]).optimizer
        except UserError as error:
            # Its arguments were good for the weight that it was tried out with.
            raise UserError(
                f"{options.settled().optimizer_type} cannot train these weights: {error.__cause__ or error}",
                where=NAME_FLAG,
                remedy="Choose another optimizer, for example AdamW, or train other parts.",
            ) from error


def result_weights(optimizer: Any) -> AbstractContextManager[None]:
    """Inside the block the weights are those that the optimizer means as its result; afterwards as before, bit by bit.

    Optimizers without a schedule train at one point and give another, an average, as the result. With all others
    nothing happens.
    """
    switches: tuple[object, object] = (getattr(optimizer, "eval", None), getattr(optimizer, "train", None))
    if not all(callable(switch) for switch in switches):
        return nullcontext()
    return _switched(optimizer)


@contextmanager
def _switched(optimizer: Any) -> Iterator[None]:
    import torch

    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    weights = [parameter.detach().clone() for parameter in parameters]
    optimizer.eval()
    try:
        yield
    finally:
        # Its own way back is a computation that rounds.
        optimizer.train()
        with torch.no_grad():
            for parameter, weight in zip(parameters, weights, strict=True):
                parameter.copy_(weight)


def learning_rates(optimizer: Any) -> dict[str, float]:
    """The rate of each parameter group by its name; ``d*lr/<name>`` is that of an optimizer that finds its steps."""
    rates: dict[str, float] = {}
    found: dict[str, float] = {}
    for number, group in enumerate(optimizer.param_groups):
        name = str(group.get("name", f"group{number}"))
        rates[name] = float(group["lr"])
        # A "d" alone is another quantity of other optimizers.
        if {"d", "k"} <= group.keys():
            found[f"{FOUND_RATE}{name}"] = float(group["d"]) * float(group["lr"])
    return {**rates, **found}
