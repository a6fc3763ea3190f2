"""The average of the weights against its closed form."""

import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from library.errors import UserError
from library.training.ema import WeightAverage
from library.training.options import EmaOptions
from library.training.states import TrainingState, check_state, read_state, write_state
from tests.library.training.moments import moments

CPU = torch.device("cpu")


def module(value=0.0, dtype=torch.float32):
    made = nn.Linear(2, 1, bias=False).to(dtype)
    nn.init.constant_(made.weight, value)
    return made


def set_to(made, value):
    with torch.no_grad():
        made.weight.fill_(value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_three_steps_in_closed_form(dtype):
    """From 1 over 2, 3 and 5, with a decay that the warm-up stays below twice: 1/10, 2/11, then 0.2."""
    made = module(1.0, dtype)
    average = WeightAverage(made, decay=0.2, device=CPU)
    for moment, value in zip(moments(3, 3), (2.0, 3.0, 5.0), strict=True):
        set_to(made, value)
        average(moment)
    kept = (1 / 10, 2 / 11, 0.2)
    weights = [kept[0] * kept[1] * kept[2]]
    weights += [(1 - kept[0]) * kept[1] * kept[2], (1 - kept[1]) * kept[2], 1 - kept[2]]
    expected = sum(weight * value for weight, value in zip(weights, (1.0, 2.0, 3.0, 5.0), strict=True))
    (tensor,) = average.state_dict().values()
    assert tensor.dtype == torch.float32
    assert tensor.tolist() == [pytest.approx([expected, expected], rel=1e-6)]
    assert average.updates == 3


def test_a_small_change_is_not_lost_in_bf16():
    """The average of bf16 weights is finer than bf16: 1 + 1/256 lies between two of its numbers."""
    made = module(1.0, torch.bfloat16)
    average = WeightAverage(made, decay=0.9999, device=CPU)
    average.load({"weight": torch.ones(1, 2)}, 10**6)
    set_to(made, 1.0078125)
    average.update()
    assert average.state_dict()["weight"][0, 0].item() == pytest.approx(1 + 0.0078125 * 1e-4, abs=1e-7)


def test_a_step_that_was_left_out_does_not_count():
    made = module()
    average = WeightAverage(made, decay=0.5, device=CPU)
    set_to(made, 1.0)
    (moment,) = moments(1, 1)
    average(replace(moment, skipped=True))
    assert average.updates == 0
    assert average.state_dict()["weight"].tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_weights_come_back_bit_by_bit(dtype):
    torch.manual_seed(0)
    made = nn.Linear(64, 64).to(dtype)
    made.weight.data[0, 0] = -0.0
    before = {name: tensor.clone() for name, tensor in made.state_dict().items()}
    held = made.weight
    average = WeightAverage(made, decay=0.9, device=CPU)
    average.load({name: torch.full_like(tensor, 3.0).float() for name, tensor in before.items()}, 5)
    with average.applied():
        assert bool((made.weight == 3).all())
        assert made.weight is held
    for name, tensor in made.state_dict().items():
        assert torch.equal(tensor.view(torch.uint8), before[name].view(torch.uint8))
    with pytest.raises(RuntimeError), average.applied():
        raise RuntimeError
    assert torch.equal(made.weight, before["weight"])


def test_buffers_are_left_alone():
    made = nn.BatchNorm1d(2)
    average = WeightAverage(made, decay=0.9, device=CPU)
    assert set(average.state_dict()) == {"weight", "bias"}
    made.running_mean.fill_(7.0)
    with average.applied():
        assert made.running_mean.tolist() == [7.0, 7.0]


def test_weights_with_two_names_are_averaged_once():
    made = nn.ModuleDict({"a": module(1.0)})
    made["b"] = made["a"]
    average = WeightAverage(made, decay=0.0, device=CPU)
    set_to(made["a"], 4.0)
    average.update()
    assert set(average.state_dict()) == {"a.weight"}


def test_continuing_equals_not_stopping():
    def trained(average, made, steps):
        for step in steps:
            set_to(made, float(step**2))
            average.update()

    made = module()
    whole = WeightAverage(made, decay=0.3, device=CPU)
    trained(whole, made, range(6))
    made = module()
    first = WeightAverage(made, decay=0.3, device=CPU)
    trained(first, made, range(3))
    second = WeightAverage(made, decay=0.3, device=CPU)
    second.load({name: tensor.clone() for name, tensor in first.state_dict().items()}, first.updates)
    trained(second, made, range(3, 6))
    assert torch.equal(second.state_dict()["weight"], whole.state_dict()["weight"])


def test_an_average_of_other_weights_is_refused():
    average = WeightAverage(module(), decay=0.9, device=CPU)
    with pytest.raises(UserError, match="one of other weights"):
        average.load({"weight": torch.zeros(3, 3)}, 1)
    with pytest.raises(UserError, match="one of other weights"):
        average.load({"other": torch.zeros(1, 2)}, 1)


def test_only_when_asked_for():
    assert WeightAverage.of(EmaOptions(), module(), CPU) is None
    kept = WeightAverage.of(EmaOptions(ema=True, ema_decay=0.5, ema_device="cpu"), module(), torch.device("meta"))
    assert kept.decay == 0.5
    assert kept.state_dict()["weight"].device.type == "cpu"


def test_what_is_saved():
    assert EmaOptions().saved == ("model",)
    assert EmaOptions(ema=True).saved == ("model", "ema")
    assert EmaOptions(ema=True, ema_save="ema").saved == ("ema",)
    assert EmaOptions(ema=True, ema_save="model").saved == ("model",)
    assert EmaOptions(ema_save="ema").saved == ("model",)


def test_settings_without_an_average_are_told():
    assert EmaOptions().notices() == []
    assert EmaOptions(ema=True, ema_decay=0.5).notices() == []
    (notice,) = EmaOptions(ema_decay=0.5, ema_previews=True).notices()
    assert "--ema_decay, --ema_previews" in notice


def test_a_state_keeps_it(tmp_path):
    average = {"w": torch.tensor([1.0, 2.0])}
    state = TrainingState(step=4, epoch=1, tensors={"w": torch.zeros(2)}, optimizer={}, scheduler={})
    write_state(tmp_path / "without", state)
    write_state(tmp_path / "with", replace(state, ema=average, ema_updates=3))
    assert read_state(tmp_path / "without").ema is None
    kept = read_state(tmp_path / "with")
    assert torch.equal(kept.ema["w"], average["w"])
    assert kept.ema_updates == 3
    assert "ema.safetensors" in json.loads((tmp_path / "with" / "manifest.json").read_text())["files"]
    (tmp_path / "with" / "ema.safetensors").unlink()
    assert check_state(tmp_path / "with")


def test_the_loop_says_which_steps_were_left_out(monkeypatch):
    from tests.library.training.test_loop import batches, train

    seen = []
    train(batches(2), steps=2, hooks=(seen.append,))
    monkeypatch.setattr("accelerate.optimizer.AcceleratedOptimizer.step_was_skipped", True)
    train(batches(2), steps=2, hooks=(seen.append,))
    assert [moment.skipped for moment in seen] == [False, False, True, True]
