"""Moments of a run, as the loop makes them."""

from library.training.progress import Moment


def moments(total_steps, steps_per_epoch):
    """Every moment of a run of ``total_steps`` steps."""
    return [
        Moment(
            step=step,
            epoch=(step - 1) // steps_per_epoch + 1,
            epoch_ended=step % steps_per_epoch == 0,
            finished=step == total_steps,
            loss=1.0 / step,
            average_loss=2.0 / step,
            learning_rates={"unet": 1e-3, "textencoder": 5e-4},
        )
        for step in range(1, total_steps + 1)
    ]
