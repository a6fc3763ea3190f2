"""Merging LoRA files with each other: the result is the sum, or the nearest of the files' rank."""

import json

import pytest
import torch
from safetensors.torch import save_file

from library.errors import UserError
from library.files import read_metadata, read_tensors, tensor_hashes
from tests.networks.tool_runs import (
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


def merge(*words):
    return run("merge_lora", "--save_to", "out.safetensors", *words)


def test_a_ratio_scales_the_change_linearly(folder):
    """The reference gives a quarter of the change for 0.5, and cross terms of two files."""
    for ratio in (0.5, -1.5, 2):
        merge("--models", "a.safetensors", "--ratios", ratio)
        assert_close(deltas(folder / "out.safetensors"), sums(folder, a=ratio))


def test_the_result_is_the_nearest_to_the_sum(folder, monkeypatch, capfd):
    out = run_case("merge a*0.5+b*0.5 (different alpha)", monkeypatch, folder)
    whole = sums(folder, a=0.5, b=0.5)
    nearest = {name: best(matrix, 4) for name, matrix in whole.items()}
    assert_close(deltas(out), nearest)
    kept = sum(matrix.square().sum() for matrix in nearest.values()) / sum(m.square().sum() for m in whole.values())
    assert f"{100 * kept.sqrt():.2f}% of the change is kept" in capfd.readouterr().err
    assert metadata_as_recorded(out, "merge a*0.5+b*0.5 (different alpha)") == {}


def test_without_ratios_each_file_counts_once(folder):
    merge("--models", "a.safetensors", "c.safetensors", "--concat")
    assert_close(deltas(folder / "out.safetensors"), sums(folder, a=1, c=1))


@pytest.mark.parametrize("shuffle", [False, True])
def test_concat_is_exact_and_as_strong(shuffle, folder, capfd):
    words = ["--models", "a.safetensors", "c.safetensors", "--ratios", 0.5, -0.7, "--concat"]
    merge(*words, *["--shuffle"] * shuffle)
    assert_close(deltas(folder / "out.safetensors"), sums(folder, a=0.5, c=-0.7))
    tensors = read_tensors(folder / "out.safetensors").tensors
    assert {tensors[f"{name}.lora_down.weight"].shape[0] for name in LAYERS} == {6}
    found = read_metadata(folder / "out.safetensors")
    assert (found["ss_network_dim"], found["ss_network_alpha"]) == ("6", "6.0")
    assert json.loads(found["ss_network_args"]) == {"conv_dim": 6, "conv_alpha": 6.0}
    assert "100.00% of the change is kept" in capfd.readouterr().err


def test_shuffling_changes_the_order_of_the_ranks_alone(folder):
    merge("--models", "a.safetensors", "--concat")
    before = read_tensors(folder / "out.safetensors").tensors
    merge("--models", "a.safetensors", "--concat", "--shuffle")
    after = read_tensors(folder / "out.safetensors").tensors
    down = f"{TEXT}.lora_down.weight"
    assert not torch.equal(before[down], after[down])
    assert sorted(before[down].tolist()) == sorted(after[down].tolist())
    assert_close(deltas(folder / "out.safetensors"), sums(folder, a=1))


def test_modules_of_one_file_alone_are_kept(folder):
    save_file({name: tensor for name, tensor in lora(4, 4.0, 5).items() if TEXT not in name}, "d.safetensors")
    merge("--models", "a.safetensors", "d.safetensors", "--ratios", 1, 0.5)
    expected = {name: best(matrix, 4) for name, matrix in sums(folder, a=1, d=0.5).items()}
    assert_close(deltas(folder / "out.safetensors"), expected)


def test_linear_layers_and_small_convolutions_stand_for_each_other(folder):
    """Networks of SD2 have either, depending on the file that they were trained from."""
    flat = {name: tensor.flatten(1) if "proj_in.lora" in name else tensor for name, tensor in lora(4, 4.0, 5).items()}
    save_file(flat, "d.safetensors")
    merge("--models", "a.safetensors", "d.safetensors", "--concat")
    assert_close(deltas(folder / "out.safetensors"), sums(folder, a=1, d=1))


@pytest.mark.parametrize("concat", [False, True])
def test_precision(concat, folder):
    label = "--concat" if concat else "--shuffle"
    merge("--models", "a.safetensors", "b.safetensors", label, "--save_precision", "fp16", "--no_metadata")
    tensors = read_tensors(folder / "out.safetensors").tensors
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    expected = sums(folder, a=1, b=1)
    if not concat:
        expected = {name: best(matrix, 4) for name, matrix in expected.items()}
    assert_close(deltas(folder / "out.safetensors"), expected, places=2e-2)
    merge("--models", "a.safetensors", "--concat", "--precision", "bf16", "--save_precision", "float")
    rounded = {name: tensor.bfloat16().float() for name, tensor in lora(4, 4.0, 1).items()}
    save_file(rounded, "d.safetensors")
    assert_close(deltas(folder / "out.safetensors"), sums(folder, d=1))
    merge("--models", "a.safetensors", "--concat", "--precision", "bf16")
    assert {tensor.dtype for tensor in read_tensors(folder / "out.safetensors").tensors.values()} == {torch.bfloat16}


def test_without_metadata_the_least_stays(folder, monkeypatch):
    out = run_case("merge fp16 no_metadata", monkeypatch, folder)
    assert metadata_as_recorded(out, "merge fp16 no_metadata") == {}
    found = read_metadata(out)
    assert not [name for name in found if name.startswith("modelspec")]
    assert found["sshs_model_hash"] == tensor_hashes(read_tensors(out).tensors, found)[0]


def test_metadata_names_the_sources_without_their_folders(folder):
    merge("--models", folder / "a.safetensors", folder / "b.safetensors")
    found = read_metadata(folder / "out.safetensors")
    assert found["modelspec.merged_from"] == "a, b"
    assert found["modelspec.title"] == "out"
    assert not [value for value in found.values() if str(folder) in value]


@pytest.mark.parametrize("suffix", [".pt", ".ckpt"])
def test_torch_files_are_read_and_written(suffix, folder):
    merge("--models", "a.safetensors", "--concat", f"--save_to=a{suffix}")
    merge("--models", f"a{suffix}", "c.safetensors", "--concat")
    assert_close(deltas(folder / "out.safetensors"), sums(folder, a=1, c=1))


def test_a_missing_alpha_is_the_rank(folder, capfd):
    save_file(lora(4, None, 1), "d.safetensors")
    merge("--models", "d.safetensors", "--concat")
    assert_close(deltas(folder / "out.safetensors"), sums(folder, a=1))
    assert "d.safetensors has no alpha for 4 of 4 modules" in capfd.readouterr().err


def test_the_result_may_take_the_place_of_a_source(folder, capfd):
    expected = sums(folder, a=1, c=2)
    merge("--models", "a.safetensors", "c.safetensors", "--ratios", 1, 2, "--concat", "--save_to=a.safetensors")
    assert_close(deltas(folder / "a.safetensors"), expected)
    assert "a.safetensors exists and is replaced" in capfd.readouterr().err


def test_different_ranks_are_refused_with_the_ways_out(folder):
    with pytest.raises(UserError, match="different ranks in 4 modules") as caught:
        merge("--models", "a.safetensors", "c.safetensors", "--ratios", 0.5, 0.5)
    assert "--concat" in str(caught.value)
    assert "svd_merge_lora" in str(caught.value)
    run("merge_lora", "--models", "c.safetensors", "--save_to", "c.pt")
    with pytest.raises(UserError, match="different ranks"):
        merge("--models", "a.safetensors", "c.pt")


def test_the_same_merge_gives_the_same_bytes(folder, monkeypatch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    words = ("--models", "a.safetensors", "b.safetensors", "--shuffle")
    merge(*words)
    first = (folder / "out.safetensors").read_bytes()
    merge(*words)
    assert (folder / "out.safetensors").read_bytes() == first


def test_small_strengths_survive_half_precision(folder):
    """A hundredth of a change of alpha 1 and rank 128: its factor alone is below what fp16 holds exactly."""
    save_file({n: t * (0.02 if "lora_" in n and t.ndim else 1) for n, t in lora(128, 1.0, 4).items()}, "d.safetensors")
    merge("--models", "d.safetensors", "--ratios", 0.01, "--concat", "--save_precision", "fp16")
    found, expected = deltas(folder / "out.safetensors"), sums(folder, d=0.01)
    for name in (TEXT, CONV):
        assert float((found[name] - expected[name]).norm() / expected[name].norm()) < 2e-3
