import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from library.errors import UserError
from library.training.optimizer_kinds import KINDS
from library.training.optimizers import (
    build_optimizer,
    check_groups,
    check_optimizer,
    learning_rates,
    result_weights,
    try_optimizer,
)
from library.training.options import OptimizerOptions

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "optimizers.json").read_text())["cases"]
CPU = torch.device("cpu")
TORCH = ("ASGD", "Adadelta", "Adagrad", "Adam", "AdamW", "Adamax", "Muon", "NAdam", "RAdam", "RMSprop", "Rprop", "SGD")


def needs(name):
    """Marks a test of an optimizer that may not be installed."""
    package = next(kind.module.partition(".")[0] for kind in KINDS if kind.name.lower() == name.lower())
    return pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=f"{package} is not installed")


EVERY = [pytest.param(kind.name, marks=needs(kind.name)) for kind in KINDS]


def options_from(arguments):
    """The option values of a golden command line."""
    values = {}
    rest = list(arguments)
    while rest:
        name = rest.pop(0).removeprefix("--")
        given = []
        while rest and not rest[0].startswith("--"):
            given.append(rest.pop(0))
        if name in ("use_8bit_adam", "use_lion_optimizer", "fused_backward_pass"):
            values[name] = True
        else:
            values[name] = tuple(given) if name == "optimizer_args" else given[0]
    values["learning_rate"] = float(values["learning_rate"])
    return values


def is_installed(case):
    name = options_from(case["args"]).get("optimizer_type", "adamw").lower()
    kinds = [kind for kind in KINDS if kind.name.lower() == name]
    return not kinds or importlib.util.find_spec(kinds[0].module.partition(".")[0]) is not None


def golden():
    for case in GOLDEN:
        skipped = pytest.mark.skipif(not is_installed(case), reason="its package is not installed")
        yield pytest.param(case, id=" ".join(case["args"]), marks=skipped)


def groups(size=(4, 4), lr=1e-3):
    return [{"params": [torch.nn.Parameter(torch.ones(size))], "lr": lr, "name": "unet"}]


@pytest.mark.parametrize("case", list(golden()))
def test_golden(case):
    options = OptimizerOptions(**options_from(case["args"]))
    if "error" in case:
        problems = options.problems() + check_optimizer(options)
        assert problems
        assert all(problem.remedy for problem in problems)
        return
    built = build_optimizer(options, groups())
    assert built.name == case["logged_name"]
    assert ",".join(f"{name}={value}" for name, value in built.arguments.items()) == case["logged_args"]
    found = {name: value for name, value in built.optimizer.param_groups[0].items() if name not in ("params", "name")}
    recorded = {name: math.inf if value == "Infinity" else value for name, value in case["param_group"].items()}
    shown = {name: str(value) if isinstance(value, tuple) else value for name, value in found.items()}
    assert {name: value for name, value in shown.items() if name in recorded} == recorded


@pytest.mark.parametrize("name", EVERY)
def test_every_optimizer_runs_on_the_cpu(name):
    try_optimizer(OptimizerOptions(optimizer_type=name, learning_rate=1e-2), CPU)


@pytest.mark.parametrize("name", [name for name in dir(torch.optim) if name in TORCH])
def test_every_optimizer_of_torch_is_built_by_its_name(name):
    options = OptimizerOptions(optimizer_type=name, learning_rate=1e-2)
    assert check_optimizer(options) == []
    try_optimizer(options, CPU)


@pytest.mark.parametrize("name", ["LBFGS", "torch.optim.LBFGS", "SparseAdam"])
def test_optimizers_that_do_not_fit_are_refused(name):
    (problem,) = check_optimizer(OptimizerOptions(optimizer_type=name))
    assert problem.remedy == "Choose another, for example AdamW."


def test_adamw8bit_runs_on_this_machine():
    (group,) = groups(size=(64, 128), lr=0.5)
    built = build_optimizer(OptimizerOptions(use_8bit_adam=True, learning_rate=1e-3), [group])
    (parameter,) = group["params"]
    parameter.grad = torch.ones_like(parameter)
    built.optimizer.step()
    assert built.name == "bitsandbytes.optim.adamw.AdamW8bit"
    assert built.optimizer.state[parameter]["state1"].dtype == torch.uint8
    # The first step of Adam moves by the learning rate of the group, minus its weight decay of 0.01.
    assert torch.allclose(parameter, torch.full_like(parameter, 1 * (1 - 0.5 * 0.01) - 0.5), atol=1e-3)


def test_groups_keep_their_rates_and_names():
    built = build_optimizer(OptimizerOptions(learning_rate=1e-3), groups(lr=0.25) + groups(lr=0.5))
    assert [(group["lr"], group["name"]) for group in built.optimizer.param_groups] == [(0.25, "unet"), (0.5, "unet")]


def test_description_for_metadata():
    built = build_optimizer(OptimizerOptions(optimizer_args=("betas=0.8,0.9", "eps=1e-6")), groups())
    assert built.description == "torch.optim.adamw.AdamW(betas=(0.8, 0.9),eps=1e-06)"
    assert build_optimizer(OptimizerOptions(), groups()).description == "torch.optim.adamw.AdamW"


def test_added_momentum_is_announced_unless_given(caplog):
    caplog.set_level("INFO")
    build_optimizer(OptimizerOptions(optimizer_type="SGDNesterov"), groups())
    assert "momentum=0.9 is set" in caplog.text
    caplog.clear()
    build_optimizer(OptimizerOptions(optimizer_type="SGDNesterov", optimizer_args=("momentum=0.5",)), groups())
    assert "is set" not in caplog.text


@pytest.mark.parametrize(
    ("name", "argument", "nearest"),
    [
        ("AdamW", "weight_deacy=0.1", "weight_decay"),
        ("AdamW8bit", "bettas=0.9,0.99", "betas"),
        ("Lion", "beta=0.9", "betas"),
        ("SGDNesterov", "momentm=0.9", "momentum"),
    ],
)
def test_unknown_argument_names_the_nearest_and_the_accepted(name, argument, nearest):
    with pytest.raises(UserError, match=f"Did you mean {nearest}") as caught:
        build_optimizer(OptimizerOptions(optimizer_type=name, optimizer_args=(argument,)), groups())
    assert f"{name} accepts: " in str(caught.value)


def test_arguments_that_have_their_own_place_are_refused():
    problems = check_optimizer(OptimizerOptions(optimizer_type="SGDNesterov", optimizer_args=("lr=1", "nesterov=True")))
    assert [problem.what for problem in problems] == [
        "the learning rate has its own option",
        "SGDNesterov has no argument 'nesterov'",
    ]


def test_value_out_of_range_is_the_users():
    with pytest.raises(UserError, match="Invalid epsilon value"):
        build_optimizer(OptimizerOptions(optimizer_args=("eps=-1",)), groups())
    with pytest.raises(UserError, match="Lion refuses"):
        build_optimizer(OptimizerOptions(optimizer_type="Lion", learning_rate=0), groups())


def test_unknown_name():
    (problem,) = check_optimizer(OptimizerOptions(optimizer_type="SGDNestrov"))
    assert problem.what == "the optimizer 'SGDNestrov' is not known"
    assert problem.remedy.startswith("Did you mean SGDNesterov? Available: AdamW, AdamW8bit, ")
    assert problem.remedy.endswith("RMSprop, Rprop, SGD. Or give the import path of a class: package.module.Class.")


def test_names_of_torch_have_their_capitals():
    (problem,) = check_optimizer(OptimizerOptions(optimizer_type="adam"))
    assert problem.remedy.startswith("Did you mean Adam?")


@pytest.mark.parametrize(
    ("name", "package"),
    [("Lion", "lion-pytorch"), ("AdamW8bit", "bitsandbytes"), ("DAdaptLion", "dadaptation"), ("prodigy", "prodigyopt")],
)
def test_missing_package_names_the_install(monkeypatch, name, package):
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: None)
    with pytest.raises(UserError, match=f"pip install {package} ") as caught:
        build_optimizer(OptimizerOptions(optimizer_type=name), groups())
    assert "is not installed" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("__main__.Mine", "needs the package __main__, which is not installed"),
        ("..Mine", "'..Mine' is no import path"),
        ("torch.optim.", "'torch.optim.' is no import path"),
    ],
)
def test_names_that_lead_to_no_class(monkeypatch, name, what):
    # As it is where a script was started by its file.
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)
    (problem,) = check_optimizer(OptimizerOptions(optimizer_type=name))
    assert what in problem.what


def test_package_that_does_not_load_names_the_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim.adamw", None)
    with pytest.raises(UserError, match="cannot be loaded.*\n.*\n.*pip install bitsandbytes"):
        build_optimizer(OptimizerOptions(optimizer_type="AdamW8bit"), groups())


def test_machine_that_cannot_run_it_says_so(monkeypatch):
    from bitsandbytes.optim.adamw import AdamW8bit

    def fail(self, closure=None):
        raise RuntimeError("no kernel")

    monkeypatch.setattr(AdamW8bit, "step", fail)
    with pytest.raises(UserError, match="cannot run on cpu here: no kernel"):
        try_optimizer(OptimizerOptions(optimizer_type="AdamW8bit"), CPU)


def test_trying_out_tells_of_wrong_values_and_disturbs_no_random_numbers():
    before = torch.get_rng_state()
    with pytest.raises(UserError, match="Invalid beta"):
        try_optimizer(OptimizerOptions(optimizer_args=("betas=1.5,0.9",)), CPU)
    with pytest.raises(UserError, match="AdamW refuses"):
        try_optimizer(OptimizerOptions(optimizer_args=("betas=0.9",)), CPU)
    try_optimizer(OptimizerOptions(), CPU)
    assert torch.equal(before, torch.get_rng_state())


def test_a_class_by_import_path():
    built = build_optimizer(OptimizerOptions(optimizer_type="lion_pytorch.Lion"), groups())
    assert built.name == "lion_pytorch.lion_pytorch.Lion"
    assert built.coupled, "nothing is known of it"
    (problem,) = check_optimizer(OptimizerOptions(optimizer_type="lion_pytorch.Lion", optimizer_args=("beta=1",)))
    assert "Did you mean betas?" in problem.remedy
    (problem,) = check_optimizer(OptimizerOptions(optimizer_type="no_such_package.Best"))
    assert problem.what == "no_such_package.Best needs the package no_such_package, which is not installed"
    with pytest.raises(UserError, match="cannot be loaded.*LionKing"):
        build_optimizer(OptimizerOptions(optimizer_type="lion_pytorch.LionKing"), groups())


@needs("Prodigy")
def test_one_rate_for_all_parts():
    parts = groups(lr=1.0) + groups(lr=0.5) + groups(lr=0.0)
    options = OptimizerOptions(optimizer_type="Prodigy", learning_rate=1.0)
    (problem,) = check_groups(options, parts)
    assert problem.what.startswith("Prodigy takes one learning rate for all that is trained, but there are: unet 1")
    with pytest.raises(UserError, match="one learning rate"):
        build_optimizer(options, parts)
    assert check_groups(options, [parts[0], parts[2]]) == []
    assert check_groups(OptimizerOptions(), parts) == []


@needs("Prodigy")
def test_rates_that_are_found_are_shown_beside_the_factor():
    optimizer = build_optimizer(OptimizerOptions(optimizer_type="Prodigy", learning_rate=0.5), groups(lr=0.5)).optimizer
    assert learning_rates(optimizer) == {"unet": 0.5, "d*lr/unet": 0.5e-6}
    other = build_optimizer(OptimizerOptions(optimizer_type="torch.optim.Adafactor"), groups(lr=0.5)).optimizer
    assert learning_rates(other) == {"unet": 0.5}


@pytest.mark.parametrize("name", ["Prodigy", "DAdaptAdan", "AdamWScheduleFree"])
def test_coupled_ones_are_refused_within_the_backward_pass(name):
    problems = check_optimizer(OptimizerOptions(optimizer_type=name, fused_backward_pass=True, max_grad_norm=0))
    if importlib.util.find_spec({"P": "prodigyopt", "D": "dadaptation", "A": "schedulefree"}[name[0]]) is not None:
        assert [problem.where for problem in problems] == ["--fused_backward_pass"]
    else:
        assert "pip install" in problems[0].remedy


@pytest.mark.parametrize(
    "name", [pytest.param(kind.name, marks=needs(kind.name)) for kind in KINDS if kind.schedule_free]
)
def test_results_of_schedule_free_ones_are_their_average(name):
    """x of the paper, here computed alongside: a running mean of z with equal weights while the rate is constant."""
    (group,) = groups(size=(3, 2), lr=0.05)
    (parameter,) = group["params"]
    options = OptimizerOptions(optimizer_type=name, learning_rate=0.05)
    if name == "RAdamScheduleFree":
        options = OptimizerOptions(
            optimizer_type=name, learning_rate=0.05, optimizer_args=("silent_sgd_phase=False", "betas=0.9,0.999")
        )
    optimizer = build_optimizer(options, [group]).optimizer
    assert_unchanged(optimizer, parameter)
    mean = torch.zeros_like(parameter)
    for step in range(1, 5):
        parameter.grad = torch.linspace(-1, 1, 6).reshape(3, 2) * parameter.detach()
        optimizer.step()
        mean += (optimizer.state[parameter]["z"] - mean) / step
    trained = parameter.detach().clone()
    with result_weights(optimizer):
        assert not torch.equal(parameter, trained)
        if name != "RAdamScheduleFree":
            assert torch.allclose(parameter, mean, atol=1e-6)
    assert torch.equal(parameter, trained)
    optimizer.step()


def assert_unchanged(optimizer, parameter):
    before = parameter.detach().clone()
    with result_weights(optimizer):
        assert torch.equal(parameter, before)


def test_results_of_others_are_their_weights():
    (group,) = groups()
    assert_unchanged(build_optimizer(OptimizerOptions(), [group]).optimizer, group["params"][0])


def test_checking_imports_nothing_heavy():
    code = (
        "import sys\n"
        "from library.training.optimizers import check_optimizer\n"
        "from library.training.options import OptimizerOptions\n"
        "for name in ('AdamW', 'AdamW8bit', 'Lion', 'AdaFactor', 'Prodigy', 'Adam', 'nothing', 'a.B'):\n"
        "    assert check_optimizer(OptimizerOptions(optimizer_type=name, optimizer_args=('typo=1',)))\n"
        "print({'torch', 'bitsandbytes', 'lion_pytorch', 'transformers', 'numpy'} & set(sys.modules))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
