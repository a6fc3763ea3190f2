"""States that other programs have saved with Accelerate, as ``formats.md`` of the reference describes their folders."""

import json
import logging

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from library.errors import UserError
from library.training.foreign_states import read_foreign
from library.training.states import check_state, is_foreign


def folder(tmp_path, *files, optimizer=None, last_epoch=None, step=None):
    """A state of ``files``, each the tensors of a part."""
    tmp_path.mkdir(exist_ok=True)
    (tmp_path / "random_states_0.pkl").write_bytes(b"never read")
    for number, tensors in enumerate(files):
        save_file(tensors, tmp_path / ("model.safetensors" if number == 0 else f"model_{number}.safetensors"))
    if optimizer is not None:
        torch.save(optimizer.state_dict(), tmp_path / "optimizer.bin")
    if last_epoch is not None:
        torch.save({"last_epoch": last_epoch}, tmp_path / "scheduler.bin")
    if step is not None:
        (tmp_path / "train_state.json").write_text(json.dumps({"current_step": step, "current_epoch": 2}))
    return tmp_path


def trained_optimizer(module, groups=None):
    optimizer = torch.optim.AdamW(groups or module.parameters(), lr=1e-3)
    sum(parameter.sum() for parameter in module.parameters()).backward()
    optimizer.step()
    return optimizer


def test_a_model_and_its_text_encoder(tmp_path):
    """The text encoder's names begin with "text_model." there, and it keeps the numbers of its positions."""
    module = nn.ModuleDict({"unet": nn.Linear(2, 3), "text_encoder": nn.Linear(3, 1)})
    unet = {name: tensor + 1 for name, tensor in module["unet"].state_dict().items()}
    text = {f"text_model.{name}": tensor + 2 for name, tensor in module["text_encoder"].state_dict().items()}
    text["text_model.embeddings.position_ids"] = torch.arange(77)
    found = read_foreign(folder(tmp_path, unet, text, last_epoch=9), module, torch.optim.AdamW(module.parameters()))
    assert found.step == 9
    assert set(found.tensors) == set(module.state_dict())
    assert torch.equal(found.tensors["text_encoder.weight"], module["text_encoder"].weight + 2)
    assert torch.equal(found.tensors["unet.bias"], module["unet"].bias + 1)


def test_the_rows_of_a_new_word_stand_last_in_the_table(tmp_path):
    class Rows(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(2, 4))

    table = torch.arange(40.0).reshape(10, 4)
    state = folder(tmp_path, {"text_model.embeddings.token_embedding.weight": table}, step=5)
    found = read_foreign(state, Rows(), torch.optim.AdamW(Rows().parameters()))
    assert found.step == 5
    assert torch.equal(found.tensors["weight"], table[-2:])


def test_moments_are_taken_over_where_every_shape_fits(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    module = nn.Linear(2, 3)
    state = folder(tmp_path, module.state_dict(), optimizer=trained_optimizer(module), step=1)
    found = read_foreign(state, module, torch.optim.AdamW(module.parameters()))
    assert found.optimizer is not None
    assert float(found.optimizer["state"][0]["step"]) == 1
    assert "the optimizer's moments are taken over" in caplog.text


@pytest.mark.parametrize(
    "other", [nn.Linear(2, 4), nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 3)), nn.Bilinear(2, 2, 3)]
)
def test_moments_of_other_weights_begin_anew(tmp_path, caplog, other):
    module = nn.Linear(2, 3)
    state = folder(tmp_path, module.state_dict(), optimizer=trained_optimizer(module), step=1)
    assert read_foreign(state, module, torch.optim.AdamW(other.parameters())).optimizer is None
    assert "its moments begin anew" in caplog.text


@pytest.mark.parametrize(
    "content", [{}, {"state": {}}, {"state": {0: 3}, "param_groups": []}, {"state": {}, "param_groups": [{"lr": 1.0}]}]
)
def test_moments_of_what_is_no_optimizer_begin_anew(tmp_path, caplog, content):
    module = nn.Linear(2, 3)
    state = folder(tmp_path, module.state_dict())
    torch.save(content, state / "optimizer.bin")
    assert read_foreign(state, module, torch.optim.AdamW(module.parameters()), asked=7).optimizer is None
    assert "its moments begin anew" in caplog.text
    with pytest.raises(UserError, match="does not say at which step"):
        read_foreign(state, module, torch.optim.AdamW(module.parameters()))
    assert "after None" not in caplog.text


def test_the_step_is_that_of_the_optimizer_where_nothing_else_tells(tmp_path):
    module = nn.Linear(2, 3)
    state = folder(tmp_path, module.state_dict(), optimizer=trained_optimizer(module))
    assert read_foreign(state, module, torch.optim.AdamW(module.parameters())).step == 1


def test_a_state_that_does_not_tell_its_step_asks_for_it(tmp_path):
    module = nn.Linear(2, 3)
    state = folder(tmp_path, module.state_dict())
    with pytest.raises(UserError, match="does not say at which step") as caught:
        read_foreign(state, module, torch.optim.AdamW(module.parameters()))
    assert "--initial_step" in str(caught.value)
    assert read_foreign(state, module, torch.optim.AdamW(module.parameters()), asked=7).step == 7


def test_which_folders_are_such_states(tmp_path):
    state = folder(tmp_path / "state", {"w": torch.zeros(1)}, step=1)
    assert is_foreign(state)
    assert check_state(state) == []
    (state / "model.safetensors").unlink()
    (problem,) = check_state(state)
    assert "missing: model.safetensors" in problem.what
    (state / "manifest.json").write_text("{}")
    assert not is_foreign(state)
