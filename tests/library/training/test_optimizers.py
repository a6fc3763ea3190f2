import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from library.errors import UserError
from library.training.optimizers import build_optimizer, check_optimizer
from library.training.options import OptimizerOptions

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "optimizers.json").read_text())["cases"]
NOW = ("adamw", "adamw8bit", "lion", "sgdnesterov")


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


def is_ours(case):
    values = options_from(case["args"])
    return values.get("optimizer_type", "adamw").lower() in NOW and "fused_backward_pass" not in values


def groups(size=(4, 4), lr=1e-3):
    return [{"params": [torch.nn.Parameter(torch.ones(size))], "lr": lr, "name": "unet"}]


@pytest.mark.parametrize("case", [case for case in GOLDEN if is_ours(case)], ids=lambda case: " ".join(case["args"]))
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
    assert {name: str(value) if name == "betas" else value for name, value in found.items()} == case["param_group"]


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
    assert "momentum=0.9 is added" in caplog.text
    caplog.clear()
    build_optimizer(OptimizerOptions(optimizer_type="SGDNesterov", optimizer_args=("momentum=0.5",)), groups())
    assert "is added" not in caplog.text


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
    assert problem.remedy == "Did you mean sgdnesterov? Available: AdamW, AdamW8bit, Lion, SGDNesterov."


@pytest.mark.parametrize(
    "case",
    [case for case in GOLDEN if not is_ours(case) and "--fused_backward_pass" not in case["args"]],
    ids=lambda case: " ".join(case["args"]),
)
def test_golden_optimizers_of_later_are_refused(case):
    options = OptimizerOptions(**options_from(case["args"]))
    assert [problem.where for problem in check_optimizer(options)] == ["--optimizer_type"]


@pytest.mark.parametrize(("name", "package"), [("Lion", "lion-pytorch"), ("AdamW8bit", "bitsandbytes")])
def test_missing_package_names_the_install(monkeypatch, name, package):
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: None)
    with pytest.raises(UserError, match=f"pip install {package} ") as caught:
        build_optimizer(OptimizerOptions(optimizer_type=name), groups())
    assert "is not installed" in str(caught.value)


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
        build_optimizer(OptimizerOptions(optimizer_type="AdamW8bit"), groups())


def test_checking_imports_nothing_heavy():
    code = (
        "import sys\n"
        "from library.training.optimizers import check_optimizer\n"
        "from library.training.options import OptimizerOptions\n"
        "for name in ('AdamW', 'AdamW8bit', 'Lion', 'SGDNesterov'):\n"
        "    assert check_optimizer(OptimizerOptions(optimizer_type=name, optimizer_args=('typo=1',)))\n"
        "print({'torch', 'bitsandbytes', 'lion_pytorch', 'numpy'} & set(sys.modules))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
