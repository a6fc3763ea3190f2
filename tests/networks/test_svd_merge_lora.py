"""Merging to a chosen rank."""

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
    TEXT,
    assert_close,
    best,
    deltas,
    lora,
    metadata_as_recorded,
    run,
    run_case,
    sums,
)

LABEL = "svd merge rank 4 conv 2"


def nearest(whole, rank, conv_rank):
    return {name: best(matrix, conv_rank if name == CONV else rank) for name, matrix in whole.items()}


def test_it_is_the_nearest_of_that_rank(folder, monkeypatch):
    """The reference limits the numbers to a quantile afterwards, which is not the nearest any more."""
    out = run_case(LABEL, monkeypatch, folder)
    assert_close(deltas(out), nearest(sums(folder, a=0.6, b=0.4), 4, 2))
    recorded = CASES[LABEL]["output"]["tensors"]
    shapes = {name: list(tensor.shape) for name, tensor in read_tensors(out).tensors.items()}
    assert shapes == {name: facts["shape"] for name, facts in recorded.items()}
    differing = metadata_as_recorded(out, LABEL)
    # Numbers with a point, as in every other file.
    assert differing.pop("ss_network_alpha") == ("4.0", "4")
    ours, theirs = differing.pop("ss_network_args")
    assert json.loads(ours or "") == json.loads(theirs)
    assert not differing


def test_ranks_may_differ(folder):
    words = ("--models", "a.safetensors", "c.safetensors", "--ratios", 1, -2, "--new_rank", 3, "--save_to", "o.pt")
    run("svd_merge_lora", *words)
    assert_close(deltas(folder / "o.pt"), nearest(sums(folder, a=1, c=-2), 3, 3))


def test_a_rank_above_that_of_the_sum_loses_nothing(folder):
    run("svd_merge_lora", *["--models", "c.safetensors", "--new_rank", "4", "--save_to", "o.safetensors"])
    assert_close(deltas(folder / "o.safetensors"), sums(folder, c=1))
    run("svd_merge_lora", *["--models", "c.safetensors", "--new_rank", "100", "--save_to", "o.safetensors"])
    assert_close(deltas(folder / "o.safetensors"), sums(folder, c=1))
    # A layer has no more ranks than outputs or inputs.
    shapes = {name: read_tensors(folder / "o.safetensors").tensors[f"{name}.lora_down.weight"].shape for name in LAYERS}
    assert {name: shape[0] for name, shape in shapes.items()} == {
        name: min(outputs, inputs * max(kernel, 1) ** 2) for name, (outputs, inputs, kernel) in LAYERS.items()
    }


def test_strengths_by_block(folder, monkeypatch):
    out = run_case("svd merge lbw 17", monkeypatch, folder)
    text, unet = sums(folder, a=1), sums(folder, b=1)
    assert_close(deltas(out), nearest({name: (text if name == TEXT else unet)[name] for name in LAYERS}, 4, 4))


def test_26_strengths_name_every_block(folder, capfd):
    weights = [round(0.1 * number, 1) for number in range(26)]
    words = ("--models", "a.safetensors", "--new_rank", 4, "--save_to", "o.safetensors", "--lbws", json.dumps(weights))
    run("svd_merge_lora", *words)
    # Text encoder; IN01 twice; OUT03, the 17th of the blocks.
    factor = dict(zip(LAYERS, (0.0, 0.2, 1.7, 0.2), strict=True))
    expected = {name: matrix * factor[name] for name, matrix in sums(folder, a=1).items()}
    assert_close(deltas(folder / "o.safetensors"), expected)
    assert "left out" not in capfd.readouterr().err


def test_17_strengths_say_what_they_do_not_name(folder, capfd):
    name = "lora_unet_down_blocks_0_downsamplers_0_conv"
    save_file(
        {f"{name}.lora_down.weight": torch.ones(1, 2, 3, 3), f"{name}.lora_up.weight": torch.ones(2, 1, 1, 1)},
        "d.pt.safetensors",
    )
    words = ("--models", "d.pt.safetensors", "--save_to", "o.safetensors", "--lbws", json.dumps([1] * 17))
    run("svd_merge_lora", *words)
    assert f"1 modules are in blocks that 17 weights do not name, and are left out, for instance {name}" in (
        capfd.readouterr().err
    )
    assert float(deltas(folder / "o.safetensors")[name].abs().max()) == 0


@pytest.mark.parametrize(
    ("lists", "message"),
    [
        (["[1,2]"], "has 2 weights; give 17"),
        ([json.dumps([1] * 12)], "those of SDXL"),
        (["1,2"], "expects a list of numbers"),
        (["{}"], "expects a list of numbers"),
        ([json.dumps(["a"] * 17)], "expects a list of numbers"),
        (["NaN"], "expects a list of numbers"),
        ([json.dumps([1] * 17)] * 2, "--lbws has 2 lists, and --models 1"),
    ],
)
def test_strengths_that_mean_nothing(lists, message, folder):
    with pytest.raises(UserError, match=message):
        run("svd_merge_lora", "--models", "a.safetensors", "--save_to", "o.pt", "--lbws", *lists)


def test_precision_and_metadata(folder):
    words = "--models a.safetensors b.safetensors --save_to o.safetensors --save_precision bf16 --no_metadata"
    run("svd_merge_lora", *words.split())
    dtypes = {str(tensor.dtype) for tensor in read_tensors(folder / "o.safetensors").tensors.values()}
    assert dtypes == {"torch.bfloat16"}
    assert not [name for name in read_metadata(folder / "o.safetensors") if name.startswith("modelspec")]
    run("svd_merge_lora", *words.replace("--save_precision bf16", "--precision fp16").split())
    dtypes = {str(tensor.dtype) for tensor in read_tensors(folder / "o.safetensors").tensors.values()}
    assert dtypes == {"torch.float16"}


def test_a_device_that_is_not_there(folder):
    with pytest.raises(UserError, match="cannot be used"):
        run("svd_merge_lora", *["--models", "a.safetensors", "--save_to", "o.pt", "--device", "nonsense"])
    run("svd_merge_lora", *["--models", "a.safetensors", "--save_to", "o.pt", "--device", "cpu"])


def test_strengths_by_block_need_the_blocks_of_sd(folder):
    layer = "lora_unet_down_blocks_7_attentions_0_proj_in"
    save_file(lora(2, 1.0, 0, {layer: (5, 5, 0)}), "d.safetensors")
    with pytest.raises(UserError, match="none of the 25 blocks") as caught:
        run("svd_merge_lora", "--models", "d.safetensors", "--save_to", "o.pt", "--lbws", json.dumps([1] * 26))
    assert "--lbws" in str(caught.value)
