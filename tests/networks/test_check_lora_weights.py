"""The table of what is in a LoRA file."""

import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.networks.tool_runs import CASES, LAYERS, PROJ, QUERY, TEXT, run


def table(text: str) -> list[list[str]]:
    return [re.split(r"\s{2,}", line.strip()) for line in text.splitlines() if re.search(r"\b(down|up)\b", line)]


def test_every_figure_is_right(folder, capsys):
    assert run("check_lora_weights", "a.safetensors") == 0
    out = capsys.readouterr().out
    assert "number of LoRA modules: 4" in out
    rows = iter(table(out))
    tensors = load_file(folder / "a.safetensors")
    for name in sorted(LAYERS):
        first, second = next(rows), next(rows)
        assert first[:4] == [name, "4", "4", "down"]
        for row, part in ((first[4:], "down"), (second[1:], "up")):
            tensor = tensors[f"{name}.lora_{part}.weight"].abs()
            assert row[0] == "x".join(map(str, tensor.shape))
            figures = [float(tensor.mean()), float(tensor.max()), float(tensor.min())]
            assert [float(value) for value in row[1:4]] == pytest.approx(figures, rel=1e-5)


def test_the_recorded_figures(folder, capsys):
    run("check_lora_weights", "a.safetensors")
    out = capsys.readouterr().out
    for line in CASES["check_lora_weights"]["stdout"][1:]:
        _, shape, mean, least = line.split(",")
        shown = shape.strip("()").replace("-", "x")
        assert re.search(rf"{shown}\s+{float(mean):.6g}\s+\S+\s+{float(least):.6g}", out), line


@pytest.mark.parametrize("flag", ["-s", "--show_all_keys"])
def test_other_keys_are_listed_on_request(flag, folder, capsys):
    run("check_lora_weights", "a.safetensors")
    assert f"{TEXT}.alpha" not in capsys.readouterr().out
    run("check_lora_weights", flag, "a.safetensors")
    out = capsys.readouterr().out
    assert "other keys: 4" in out
    assert f"{TEXT}.alpha  () float32 4" in out


def test_numbers_that_are_not_finite_end_with_1(folder, capsys):
    tensors = load_file("a.safetensors")
    tensors[f"{PROJ}.lora_up.weight"][0, :2] = float("nan")
    tensors[f"{QUERY}.lora_down.weight"].fill_(float("inf"))
    save_file(tensors, "bad.safetensors")
    assert run("check_lora_weights", "bad.safetensors") == 1
    out = capsys.readouterr().out
    assert "2 NaN" in out
    assert "28 Inf" in out
    assert "2 tensors are missing or hold values that are not finite" in out


def test_what_is_missing_is_shown(folder, capsys):
    tensors = load_file("a.safetensors")
    del tensors[f"{TEXT}.alpha"], tensors[f"{TEXT}.lora_up.weight"]
    torch.save(tensors, "odd.pt")
    assert run("check_lora_weights", "odd.pt") == 1
    rows = table(capsys.readouterr().out)
    assert rows[0][:4] == [TEXT, "4", "none", "down"]
    assert rows[1] == ["up", "missing", "incomplete"]
