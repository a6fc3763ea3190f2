from library.training.startup import StartFacts, startup_lines


def facts(**changes):
    values = {
        "train_images": 20,
        "reg_images": 4,
        "batches_per_epoch": 12,
        "epochs": 3,
        "batch_sizes": (2, 4),
        "accumulation": 2,
        "processes": 1,
        "steps_per_epoch": 6,
        "total_steps": 18,
    }
    return StartFacts(**{**values, **changes})


def test_lines():
    assert startup_lines(facts()) == [
        "running training",
        "  num train images * repeats: 20",
        "  num validation images * repeats: 0",
        "  num reg images: 4",
        "  num batches per epoch: 12",
        "  num epochs: 3",
        "  batch size per device: 2, 4",
        "  gradient accumulation steps: 2",
        "  num processes: 1",
        "  total optimization steps: 18",
        "  an epoch: 12 batches / (2 accumulated x 1 processes) = 6 steps",
        "  the run: 18 steps / 6 steps an epoch = 3 epochs",
    ]


def test_epochs_that_set_the_length_and_an_earlier_run_are_told():
    lines = startup_lines(facts(epochs_asked=3, start_step=5))
    assert lines[0] == "override steps. steps for 3 epochs is: 18"
    assert "  the run: 3 epochs x 6 steps = 18 steps" in lines
    assert lines[-1] == "  continuing after step: 5"


def test_a_short_last_step_is_told():
    lines = startup_lines(facts(batches_per_epoch=13, steps_per_epoch=7, total_steps=10))
    assert "  an epoch: 13 batches / (2 accumulated x 1 processes) = 7 steps (rounded up)" in lines
    assert "  the run: 10 steps / 7 steps an epoch = 1.42857 epochs" in lines
