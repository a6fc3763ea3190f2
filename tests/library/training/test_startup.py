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
    ]


def test_epochs_that_set_the_length_and_an_earlier_run_are_told():
    lines = startup_lines(facts(epochs_asked=3, start_step=5))
    assert lines[0] == "override steps. steps for 3 epochs is: 18"
    assert lines[-1] == "  continuing after step: 5"
