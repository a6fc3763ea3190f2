from dataclasses import replace

import pytest

from library.training.forecast import forecast, preview_lines, saving_lines
from library.training.naming import END, OutputNames, SavePlan, SavePoint
from library.training.options import PreviewOptions, SaveOptions
from library.training.progress import RunLength
from library.training.prompt_files import PreviewPrompt

LENGTH = RunLength(total_steps=10, steps_per_epoch=4)


def prompt(sampler):
    return PreviewPrompt(prompt="a thing", sampler=sampler)


def points(*told):
    kinds = {"e": "epoch", "s": "step"}
    return tuple(END if one == "last" else SavePoint(kind=kinds[one[0]], number=int(one[1:])) for one in told)


def test_without_a_rule_only_the_end_is_saved():
    found = forecast(SavePlan(), LENGTH)
    assert found.points == found.kept == (END,)
    assert found.most == 1


def test_every_rule_and_the_short_last_epoch():
    found = forecast(SavePlan(every_epochs=1, every_steps=3), LENGTH)
    assert found.points == points("s3", "e1", "s6", "e2", "s9", "last")


def test_the_epoch_that_ends_the_run_has_no_file_of_its_own():
    found = forecast(SavePlan(every_epochs=1), replace(LENGTH, total_steps=8))
    assert found.points == points("e1", "last")


def test_a_long_run_is_looked_at_where_something_is_due(monkeypatch):
    looked_at = []
    due = SavePlan.due
    monkeypatch.setattr(SavePlan, "due", lambda plan, moment: looked_at.append(moment.step) or due(plan, moment))
    long = RunLength(total_steps=4_000, steps_per_epoch=2)
    assert forecast(SavePlan(every_epochs=700), long).points == points("e700", "e1400", "last")
    assert looked_at == [1400, 2800, 4000]


def test_removed_files_are_counted_until_their_follower_is_safe():
    found = forecast(SavePlan(every_steps=2, keep_steps=2), LENGTH)
    assert found.points == points("s2", "s4", "s6", "s8", "s10", "last")
    # Saving step N removes step N - 3, rounded down to a multiple of 2.
    assert found.kept == points("s8", "s10", "last")
    assert found.most == 3


def test_a_resumed_run_saves_what_is_left():
    assert forecast(SavePlan(every_steps=3), LENGTH, start_step=6).points == points("s9", "last")


def lines(tmp_path, **options):
    names = OutputNames(folder=tmp_path / "out", name="dog", suffix=".safetensors")
    return saving_lines(SaveOptions(**options), names, LENGTH, trained_values=1_000_000)


def test_the_files_and_the_disk_are_told(tmp_path):
    head, models, disk = lines(tmp_path, save_every_n_steps=5, save_precision="fp16")
    assert head.startswith("saving in ")
    assert models == ("  models: dog-step00000005.safetensors, dog-step00000010.safetensors, dog.safetensors (3 saved)")
    assert disk.startswith("  disk: about 6 MB at most (3 models of 2 MB); ")
    assert disk.endswith(" free")


def test_states_count_three_times(tmp_path):
    _, models, states, disk = lines(tmp_path, save_state_on_train_end=True)
    assert models == "  models: dog.safetensors (1 saved)"
    assert states == "  states: dog-state (1 saved)"
    assert "about 16 MB at most (1 model of 4 MB, 1 state of up to 12 MB)" in disk


def test_many_files_are_shortened(tmp_path):
    models = lines(tmp_path, save_every_n_steps=1, save_last_n_steps=1)[1]
    assert models == (
        "  models: dog-step00000001.safetensors, dog-step00000002.safetensors, dog-step00000003.safetensors, …, "
        "dog.safetensors (11 saved, 3 stay)"
    )


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({}, "never: 0 times, 0 images"),
        ({"sample_every_n_epochs": 1}, "after every epoch: 2 times, 6 images"),
        ({"sample_every_n_steps": 3}, "after every 3rd step: 3 times, 9 images"),
        ({"sample_every_n_epochs": 2, "sample_at_first": True}, "before training and after every 2nd epoch: 2 times"),
    ],
)
def test_previews_are_counted(options, told):
    (line,) = preview_lines(PreviewOptions(**options), [prompt("ddim"), prompt("euler"), prompt("ddim")], LENGTH)
    assert line.startswith("previews of 3 prompts (ddim, euler) ")
    assert told in line


def test_one_is_counted_as_one():
    options = PreviewOptions(sample_at_first=True)
    assert preview_lines(options, [prompt("ddim")], LENGTH) == [
        "previews of 1 prompt (ddim) before training: 1 time, 1 image"
    ]


def test_without_prompts_nothing_is_said():
    assert preview_lines(PreviewOptions(sample_at_first=True), [], LENGTH) == []
