from library.training.speed import Speed, memory_figures
from tests.library.training.moments import moments


def test_the_time_of_hooks_does_not_count():
    times = iter([0.0, 10.0, 12.0, 20.0, 24.0])
    speed = Speed(lambda step: [8, 4][step], clock=lambda: next(times))
    first, second = moments(2, 2)
    speed.start()
    assert speed.stop(first) == {"speed/images_per_second": 4.0, "speed/seconds_per_step": 2.0}
    speed.start(first)
    assert speed.stop(second) == {"speed/images_per_second": 1.0, "speed/seconds_per_step": 4.0}
    assert speed.images_per_second == 2.0


def test_a_clock_that_stands_still():
    speed = Speed(lambda step: 1, clock=lambda: 0.0)
    assert speed.stop(moments(1, 1)[0])["speed/seconds_per_step"] == 0.0
    assert speed.images_per_second == 0.0


def test_memory_is_plausible():
    figures = memory_figures()
    # A process with Python and numpy in it, on any machine that runs tests.
    assert 0.01 < figures["memory/peak_ram_gb"] < 1000
