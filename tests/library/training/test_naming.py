import json
from pathlib import Path

import pytest

from library.training.naming import (
    END,
    OutputNames,
    SavePlan,
    SavePoint,
    check_saving,
    epoch_to_remove,
    finished_epochs,
    step_to_remove,
)
from library.training.options import SaveOptions
from tests.library.training.moments import moments

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "naming_and_retention.json").read_text())


def names(name, suffix=".safetensors"):
    return OutputNames(folder=Path("out"), name=name, suffix=suffix)


def test_golden_names():
    for case in GOLDEN["epoch"]:
        point = SavePoint(kind="epoch", number=case["epoch"])
        assert names(case["output_name"]).model(point) == Path("out", case["name"])
    for case in GOLDEN["step"]:
        point = SavePoint(kind="step", number=case["step"])
        assert names(case["output_name"]).model(point) == Path("out", case["name"])
    for case in GOLDEN["samples"]:
        assert names(case["output_name"], ".ckpt").model(END) == Path("out", case["last"])


def test_names_of_states():
    points = (SavePoint(kind="epoch", number=2), SavePoint(kind="step", number=30), END)
    assert [names("toy").state(point).name for point in points] == [
        "toy-000002-state",
        "toy-step00000030-state",
        "toy-state",
    ]
    assert [names(None).state(point).name for point in points] == [
        "epoch-000002-state",
        "at-step00000030-state",
        "last-state",
    ]


@pytest.mark.parametrize("case", GOLDEN["remove_epoch"], ids=str)
def test_golden_epoch_to_remove(case):
    for epoch, removed in case["remove_after_epoch"].items():
        found = epoch_to_remove(int(epoch), every=case["save_every_n_epochs"], last=case["save_last_n_epochs"])
        assert found == removed


@pytest.mark.parametrize("case", GOLDEN["remove_step"], ids=str)
def test_golden_step_to_remove(case):
    for step, removed in case["remove_after_step"].items():
        found = step_to_remove(int(step), every=case["save_every_n_steps"], last=case["save_last_n_steps"])
        assert found == removed


def due(plan, total_steps, steps_per_epoch):
    return [
        (moment.step, point.kind, point.number)
        for moment in moments(total_steps, steps_per_epoch)
        for point in plan.due(moment)
    ]


def test_epochs_are_saved_but_not_the_last():
    assert due(SavePlan(every_epochs=2), 18, 3) == [(6, "epoch", 2), (12, "epoch", 4), (18, "last", 0)]


def test_steps_are_saved_and_the_last_too():
    assert due(SavePlan(every_steps=3), 6, 6) == [(3, "step", 3), (6, "step", 6), (6, "last", 0)]


def test_an_epoch_that_a_shorter_run_cuts_is_not_saved():
    assert due(SavePlan(every_epochs=1), 5, 3) == [(3, "epoch", 1), (5, "last", 0)]


@pytest.mark.parametrize(("ratio", "every"), [(4, 2), (10, 1), (100, 1), (3, 3)])
def test_ratio_overrides_the_number_of_epochs(ratio, every):
    options = SaveOptions(save_every_n_epochs=7, save_n_epoch_ratio=ratio)
    assert SavePlan.for_models(options, epochs=10).every_epochs == every


def test_states_have_limits_of_their_own_or_those_of_the_models():
    options = SaveOptions(save_every_n_steps=5, save_last_n_steps=10, save_last_n_epochs=3, save_last_n_epochs_state=1)
    plan = SavePlan.for_states(options, epochs=10)
    assert (plan.every_steps, plan.keep_steps, plan.keep_epochs) == (5, 10, 1)


def test_what_is_outdated_is_of_the_same_kind():
    plan = SavePlan(every_epochs=1, every_steps=5, keep_epochs=2, keep_steps=5)
    assert plan.outdated(SavePoint(kind="epoch", number=3)) == SavePoint(kind="epoch", number=1)
    assert plan.outdated(SavePoint(kind="step", number=15)) == SavePoint(kind="step", number=5)
    assert plan.outdated(END) is None
    assert SavePlan(every_steps=5).outdated(SavePoint(kind="step", number=15)) is None


def test_finished_epochs():
    assert [finished_epochs(moment) for moment in moments(6, 2)] == [0, 1, 1, 2, 2, 3]


def test_output_folder_is_checked(tmp_path):
    assert check_saving(SaveOptions(output_dir=tmp_path / "new" / "folder")) == []
    (problem,) = check_saving(SaveOptions())
    assert problem.where == "--output_dir"
    blocker = tmp_path / "file"
    blocker.write_text("")
    for folder in (blocker, blocker / "below"):
        (problem,) = check_saving(SaveOptions(output_dir=folder))
        assert "is a file" in problem.what
