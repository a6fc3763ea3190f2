"""Options that do nothing as they are given are told, not ignored."""

from pathlib import Path

import pytest

from library.training.options import PreviewOptions, SaveOptions

NO_PREVIEWS = (
    "--sample_prompts makes no previews without --sample_every_n_epochs, --sample_every_n_steps or --sample_at_first"
)


@pytest.mark.parametrize("options", [{}, {"sample_every_n_steps": 0}])
def test_prompts_without_an_interval(options):
    assert NO_PREVIEWS in PreviewOptions(sample_prompts=Path("p.txt"), **options).notices()


@pytest.mark.parametrize(
    "options", [{"sample_at_first": True}, {"sample_every_n_steps": 5}, {"sample_every_n_epochs": 1}]
)
def test_prompts_with_an_interval(options):
    assert PreviewOptions(sample_prompts=Path("p.txt"), **options).notices() == []


@pytest.mark.parametrize(
    ("options", "notices"),
    [
        ({"save_last_n_epochs": 2}, ["without effect without --save_every_n_epochs: --save_last_n_epochs"]),
        ({"save_last_n_steps": 9}, ["without effect without --save_every_n_steps: --save_last_n_steps"]),
        (
            {"save_last_n_steps_state": 9, "save_every_n_steps": 3},
            ["without effect without --save_state: --save_last_n_steps_state"],
        ),
        ({"save_last_n_epochs": 2, "save_n_epoch_ratio": 3}, []),
        ({"save_last_n_epochs": 2, "save_every_n_epochs": 1}, []),
        ({"save_last_n_steps": 2, "save_every_n_steps": 1, "save_last_n_steps_state": 1, "save_state": True}, []),
    ],
)
def test_how_many_to_keep_of_nothing(options, notices):
    assert SaveOptions(**options).notices() == notices
