"""Another rank: as recorded for every way of choosing it."""

import json

import pytest
import torch
from safetensors.torch import save_file

from library.errors import UserError
from library.files import read_metadata, read_tensors
from tests.networks.tool_runs import (
    CASES,
    CONV,
    LAYERS,
    PROJ,
    TEXT,
    assert_as_recorded,
    assert_close,
    best,
    deltas,
    lora,
    metadata_as_recorded,
    run,
    run_case,
    sums,
)

LABELS = [label for label in CASES if label.startswith("resize")]


def resize(*words):
    return run("resize_lora", "--model", "a.safetensors", "--save_to", "o.safetensors", *words)


@pytest.mark.parametrize("label", LABELS)
def test_every_recorded_case(label, tmp_path, monkeypatch):
    out = run_case(label, monkeypatch, tmp_path)
    assert_as_recorded(out, label, places=2e-3 if "fp16" in label else 2e-4)
    assert metadata_as_recorded(out, label) == {}
    dtypes = {str(tensor.dtype).removeprefix("torch.") for tensor in read_tensors(out).tensors.values()}
    assert dtypes == {facts["dtype"] for facts in CASES[label]["output"]["tensors"].values()}


def test_it_is_the_nearest_of_that_rank(folder):
    resize("--new_rank", 3)
    assert_close(deltas(folder / "o.safetensors"), {name: best(m, 3) for name, m in sums(folder, a=1).items()})


def test_convolutions_of_every_size_have_their_own_rank(folder):
    resize("--new_rank", 3, "--new_conv_rank", 1)
    tensors = read_tensors(folder / "o.safetensors").tensors
    ranks = {name: tensors[f"{name}.lora_down.weight"].shape[0] for name in LAYERS}
    assert ranks == {name: 1 if name in (PROJ, CONV) else 3 for name in LAYERS}
    assert {name: float(tensors[f"{name}.alpha"]) for name in LAYERS} == ranks


def test_what_is_filled_up_can_be_trained(folder):
    """Rows of zeros in both matrices would never get a gradient."""
    resize("--new_rank", 5)
    tensors = read_tensors(folder / "o.safetensors").tensors
    down = tensors[f"{TEXT}.lora_down.weight"]
    torch.testing.assert_close(down @ down.T, torch.eye(5), atol=1e-5, rtol=0)
    assert_close(deltas(folder / "o.safetensors"), sums(folder, a=1))


def test_a_rank_that_no_memory_holds_is_cut_to_the_layers_own(folder):
    resize("--new_rank", 10**12)
    tensors = read_tensors(folder / "o.safetensors").tensors
    for name, (outputs, inputs, kernel) in LAYERS.items():
        assert tensors[f"{name}.lora_down.weight"].shape[0] == min(outputs, inputs * max(kernel, 1) ** 2)
    assert_close(deltas(folder / "o.safetensors"), sums(folder, a=1))


def test_an_untrained_layer_keeps_one_rank(folder):
    tensors = lora(4, 4.0, 1)
    tensors[f"{TEXT}.lora_up.weight"].zero_()
    save_file(tensors, "d.safetensors")
    run(
        "resize_lora",
        *["--model", "d.safetensors", "--save_to", "o.safetensors", "--dynamic_method", "sv_fro"],
        "--dynamic_param=.9",
    )
    found = read_tensors(folder / "o.safetensors").tensors
    assert found[f"{TEXT}.lora_down.weight"].shape[0] == 1
    assert float(deltas(folder / "o.safetensors")[TEXT].abs().max()) == 0


def test_verbose_says_what_every_layer_keeps(folder, capfd):
    resize("--new_rank", 2, "--verbose")
    values = torch.linalg.svdvals(sums(folder, a=1)[TEXT])
    share, norm = values[:2].sum() / values.sum(), (values[:2].square().sum() / values.square().sum()).sqrt()
    shown = (
        f"{TEXT}: rank 2, sum kept: {share:.1%}, norm kept: {norm:.1%}, largest/smallest: {values[0] / values[1]:.1f}"
    )
    said = capfd.readouterr().err
    assert shown in said
    assert all(f"{name}: rank 2" in said for name in LAYERS)
    resize("--new_rank", 2)
    assert f"{TEXT}: rank" not in capfd.readouterr().err


def test_metadata_keeps_what_is_still_true(folder):
    metadata = {"ss_tag_frequency": "{}", "ss_network_args": '{"conv_dim": "4", "conv_alpha": "4", "dropout": "0.1"}'}
    save_file(lora(4, 2.0, 1), "d.safetensors", metadata=metadata)
    run("resize_lora", "--model=d.safetensors", "--save_to=o.safetensors", "--new_rank=2", "--new_conv_rank=1")
    found = read_metadata(folder / "o.safetensors")
    assert found["ss_tag_frequency"] == "{}"
    assert found["ss_training_comment"] == "dimension is resized from 4 to 2"
    assert json.loads(found["ss_network_args"]) == {"conv_dim": "1", "conv_alpha": "0.5", "dropout": "0.1"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--dynamic_method sv_fro", "belong together"),
        ("--dynamic_param 0.9", "belong together"),
        ("--dynamic_method sv_fro --dynamic_param 90", "at most 1"),
        ("--dynamic_method sv_ratio --dynamic_param 0.5", "at least 1"),
        ("--dynamic_method sv_some --dynamic_param 0.5", "allows sv_ratio"),
        ("--new_rank 0", "at least 1"),
    ],
)
def test_targets_that_mean_nothing(words, message, folder):
    with pytest.raises(UserError, match=message):
        resize(*words.split())
    assert not (folder / "o.safetensors").exists()
