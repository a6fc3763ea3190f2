"""The optimizers that can be asked for by name, by their name in ``torch.optim``, or by import path.

Imports nothing heavy.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Final

from library.errors import Problem
from library.options import choose_from
from library.training.source_classes import exported_classes, is_import_path, is_installed

NAME_FLAG: Final = "--optimizer_type"


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerKind:
    """One optimizer that can be asked for.

    Attributes:
        name: The spelling shown; any case is accepted for those with a name of their own.
        module: Where the class is, importable.
        class_name: Name of the class.
        package: What ``pip install`` needs where the project's requirements do not bring it.
        fixed: Arguments that make the name what it says.
        added: Arguments added, and announced, unless the user gives them.
        coupled: What it does to one weight depends on the others.
        one_rate: It takes a single learning rate for all weights.
        finds_rate: It finds the size of its steps itself, and multiplies it by the learning rate (usually 1).
        schedule_free: It averages weights in place of a schedule.
        relative_step: It may set its learning rate by itself (Adafactor).
        zero_rate: It stands a step with a learning rate of 0.
    """

    name: str
    module: str
    class_name: str
    package: str | None = None
    fixed: Mapping[str, object] = field(default_factory=dict)
    added: Mapping[str, object] = field(default_factory=dict)
    coupled: bool = False
    one_rate: bool = False
    finds_rate: bool = False
    schedule_free: bool = False
    relative_step: bool = False
    zero_rate: bool = True


def _bitsandbytes(name: str, module: str) -> OptimizerKind:
    """One with 8-bit or paged state (Dettmers et al. 2021, arXiv 2110.02861)."""
    return OptimizerKind(name=name, module=f"bitsandbytes.optim.{module}", class_name=name, package="bitsandbytes")


def _nesterov(kind: OptimizerKind) -> OptimizerKind:
    """Gradient descent with Nesterov's momentum."""
    return replace(
        kind,
        class_name=kind.class_name.replace("Nesterov", ""),
        fixed={"nesterov": True},
        added={"momentum": 0.9},
    )


def _d_adaptation(name: str, module: str, class_name: str | None = None, *, one_rate: bool = True) -> OptimizerKind:
    """One of D-Adaptation (Defazio and Mishchenko 2023, arXiv 2301.07733)."""
    return OptimizerKind(
        name=name,
        module=f"dadaptation.{module}",
        class_name=class_name or name,
        package="dadaptation",
        coupled=True,
        one_rate=one_rate,
        finds_rate=True,
    )


def _schedule_free(name: str) -> OptimizerKind:
    """One without a schedule (Defazio et al. 2024, arXiv 2405.15682)."""
    module = f"schedulefree.{name.removesuffix('ScheduleFree').lower()}_schedulefree"
    return OptimizerKind(
        name=name, module=module, class_name=name, package="schedulefree", coupled=True, schedule_free=True
    )


KINDS: Final[tuple[OptimizerKind, ...]] = (
    OptimizerKind(name="AdamW", module="torch.optim.adamw", class_name="AdamW"),
    _bitsandbytes("AdamW8bit", "adamw"),
    _bitsandbytes("PagedAdamW", "adamw"),
    _bitsandbytes("PagedAdamW8bit", "adamw"),
    _bitsandbytes("PagedAdamW32bit", "adamw"),
    OptimizerKind(name="Lion", module="lion_pytorch.lion_pytorch", class_name="Lion", package="lion-pytorch"),
    _bitsandbytes("Lion8bit", "lion"),
    _bitsandbytes("PagedLion8bit", "lion"),
    _nesterov(OptimizerKind(name="SGDNesterov", module="torch.optim.sgd", class_name="SGD")),
    _nesterov(_bitsandbytes("SGDNesterov8bit", "sgd")),
    _d_adaptation("DAdaptation", "experimental.dadapt_adam_preprint", "DAdaptAdamPreprint"),
    _d_adaptation("DAdaptAdamPreprint", "experimental.dadapt_adam_preprint"),
    _d_adaptation("DAdaptAdaGrad", "dadapt_adagrad", one_rate=False),
    _d_adaptation("DAdaptAdam", "dadapt_adam"),
    _d_adaptation("DAdaptAdan", "dadapt_adan", one_rate=False),
    _d_adaptation("DAdaptAdanIP", "experimental.dadapt_adan_ip", one_rate=False),
    _d_adaptation("DAdaptLion", "dadapt_lion"),
    replace(_d_adaptation("DAdaptSGD", "dadapt_sgd"), zero_rate=False),
    OptimizerKind(
        name="Prodigy",
        module="prodigyopt.prodigy",
        class_name="Prodigy",
        package="prodigyopt",
        coupled=True,
        one_rate=True,
        finds_rate=True,
    ),
    OptimizerKind(
        name="AdaFactor",
        module="transformers.optimization",
        class_name="Adafactor",
        package="transformers",
        relative_step=True,
    ),
    _schedule_free("AdamWScheduleFree"),
    _schedule_free("RAdamScheduleFree"),
    _schedule_free("SGDScheduleFree"),
)
_BY_NAME: Final = {kind.name.lower(): kind for kind in KINDS}

# Why a class of torch.optim cannot be used here.
_UNSUITED: Final = {
    "LBFGS": "computes the loss several times in a step",
    "SparseAdam": "is for sparse gradients, and there are none here",
}


def resolve(name: str) -> OptimizerKind | Problem:
    """The optimizer called ``name``, or what is wrong with the name."""
    known = _BY_NAME.get(name.lower())
    if known is not None:
        return _installed(known)
    module, _, class_name = name.rpartition(".")
    unsuited = _UNSUITED.get(class_name) if module in ("", "torch.optim") else None
    if unsuited:
        return Problem(f"{class_name} {unsuited}", where=NAME_FLAG, remedy="Choose another, for example AdamW.")
    if "." in name and not is_import_path(name):
        remedy = "Write package.module.Class, or the name alone for one of torch.optim."
        return Problem(f"{name!r} is no import path of an optimizer", where=NAME_FLAG, remedy=remedy)
    if module:
        return _installed(_by_path(name, module, class_name))
    in_torch = exported_classes("torch.optim")
    if name in in_torch and name != "Optimizer":
        return OptimizerKind(name=name, module=in_torch[name], class_name=name)
    others = [name for name in sorted({*in_torch} - {"Optimizer", *_UNSUITED}) if name.lower() not in _BY_NAME]
    return Problem(
        f"the optimizer {name!r} is not known",
        where=NAME_FLAG,
        remedy=f"{choose_from(name, [*(kind.name for kind in KINDS), *others], 'Available')} "
        "Or give the import path of a class: package.module.Class.",
    )


def _by_path(name: str, module: str, class_name: str) -> OptimizerKind:
    return OptimizerKind(
        name=name,
        module=module,
        class_name=class_name,
        # Nothing is known of it, so nothing is done that not every optimizer stands.
        coupled=not module.startswith("torch.optim"),
        schedule_free=class_name.endswith("ScheduleFree"),
        relative_step=name in ("transformers.Adafactor", "transformers.optimization.Adafactor"),
    )


def _installed(kind: OptimizerKind) -> OptimizerKind | Problem:
    return kind if is_installed(kind.module) else missing_package(kind, "is not installed")


def missing_package(kind: OptimizerKind, reason: str) -> Problem:
    """The package of ``kind`` is not there, or of no use, for a ``reason``."""
    module = kind.module.partition(".")[0]
    if kind.package is None:
        remedy = f"Install what has the module {module}, check the spelling, or choose AdamW."
    else:
        remedy = f"pip install {kind.package}   (or choose AdamW)"
    return Problem(
        f"{kind.name} needs the package {kind.package or module}, which {reason}", where=NAME_FLAG, remedy=remedy
    )
