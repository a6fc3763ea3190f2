"""What every tool for network files does with input that it cannot use; their flags; where they run from."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from library.errors import UserError
from library.files import read_metadata, read_tensors
from library.option_fields import declarations
from library.option_values import is_switch, is_variadic
from tests.networks.tool_runs import LAYERS, QUERY, TEXT, TOOLS, assert_close, deltas, lora, run
from tests.permissions import bound_by_permissions, read_only

ROOT = Path(__file__).parents[2]
FLAGS = json.loads((ROOT / "tests" / "golden" / "flags_network_tools.json").read_text())
WORDS = {
    "merge_lora": "--models FILE good.safetensors --save_to out.safetensors",
    "svd_merge_lora": "--models FILE good.safetensors --save_to out.safetensors",
    "resize_lora": "--model FILE --save_to out.safetensors",
    "extract_lora_from_dylora": "--model FILE --unit 2 --save_to out.safetensors",
    "check_lora_weights": "FILE",
}
"""A command for each tool that reads network files."""
WRITING = [tool for tool in WORDS if tool != "check_lora_weights"]
MERGING = ("merge_lora", "svd_merge_lora")


@pytest.fixture(autouse=True)
def good(folder):
    (folder / "a.safetensors").rename(folder / "good.safetensors")


def words(tool: str, file: object) -> list[str]:
    return WORDS[tool].replace("FILE", str(file)).split()


def refusal(tool: str, *given: object) -> str:
    """What the tool says that it refuses; every problem says where and what to do, and no file changes."""
    before = {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}
    with pytest.raises(UserError) as caught:
        run(tool, *given)
    assert {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()} == before
    assert all(problem.where and problem.remedy for problem in caught.value.problems)
    return str(caught.value)


@pytest.mark.parametrize("tool", WORDS)
def test_good_files(tool, folder):
    assert run(tool, *words(tool, "b.safetensors")) == 0


@pytest.mark.parametrize("tool", TOOLS)
def test_nothing_given(tool, folder):
    told = refusal(tool)
    required = {
        "check_lora_weights": "file",
        "extract_lora_from_models": "--model_tuned",
        "lora_interrogator": "--model",
    }
    assert f"{required.get(tool, '--save_to')} is missing" in told
    assert tool == "check_lora_weights" or "problems:" in told


@pytest.mark.parametrize("tool", WORDS)
def test_no_file(tool, folder):
    told = refusal(tool, *words(tool, "goof.safetensors"))
    assert "file not found: goof.safetensors" in told
    assert "Did you mean good.safetensors" in told
    (folder / "folder").mkdir()
    assert "folder is a folder" in refusal(tool, *words(tool, "folder"))


def embedding() -> dict[str, torch.Tensor]:
    return {"emb_params": torch.ones(1, 8)}


def renamed(old: str, new: str) -> dict[str, torch.Tensor]:
    return {name.replace(old, new): tensor for name, tensor in lora(4, 4.0, 1).items()}


KINDS = {
    "textual inversion embedding": embedding(),
    "a whole model": {"model.diffusion_model.input_blocks.0.0.weight": torch.ones(1)},
    "a LoHa network": renamed("lora_down.weight", "hada_w1_a"),
    "a LoKr network": renamed("lora_down.weight", "lokr_w1"),
    "an OFT network": {"oft_unet_mid_block_attentions_0.oft_blocks": torch.ones(2, 3, 3)},
    "a DoRA network": lora(4, 4.0, 1) | {f"{TEXT}.dora_scale": torch.ones(6)},
    "a LoRA for SDXL": renamed("lora_te_", "lora_te1_"),
    "a LoRA in the layout of PEFT": renamed(".lora_down.", ".lora_A."),
    "no network that is known here": {"x": torch.ones(2)},
}


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tool", WORDS)
def test_files_of_other_kinds(tool, kind, suffix, folder):
    if suffix == ".pt":
        torch.save(KINDS[kind], "other.pt")
    else:
        save_file(KINDS[kind], "other.safetensors")
    told = refusal(tool, *words(tool, f"other{suffix}"))
    assert f"the file is {kind}" in told.replace("the file is a textual", "the file is textual")
    assert f"other{suffix}" in told


@pytest.mark.parametrize("tool", WORDS)
@pytest.mark.parametrize("content", [b"", b"\x00" * 40, b"<html>not a model</html>"])
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_damaged_files(tool, content, suffix, folder):
    (folder / f"bad{suffix}").write_bytes(content)
    assert f"bad{suffix}" in refusal(tool, *words(tool, f"bad{suffix}"))


@pytest.mark.parametrize("tool", WORDS)
def test_a_file_cut_short(tool, folder):
    whole = (folder / "good.safetensors").read_bytes()
    (folder / "short.safetensors").write_bytes(whole[: len(whole) // 2])
    assert "damaged or incomplete" in refusal(tool, *words(tool, "short.safetensors"))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("tool", WRITING)
def test_numbers_that_are_not_finite(tool, value, folder):
    tensors = load_file("good.safetensors")
    tensors[f"{QUERY}.lora_down.weight"][0, 0] = value
    save_file(tensors, "bad.safetensors")
    told = refusal(tool, *words(tool, "bad.safetensors"))
    assert f"bad.safetensors hold values that are not finite, for instance {QUERY}.lora_down.weight" in told
    assert "check_lora_weights.py" in told


@pytest.mark.parametrize("tool", WRITING)
def test_parts_that_are_missing_or_belong_to_no_lora(tool, folder):
    tensors = load_file("good.safetensors")
    save_file(
        {name: tensor for name, tensor in tensors.items() if name != f"{QUERY}.lora_up.weight"}, "half.safetensors"
    )
    told = refusal(tool, *words(tool, "half.safetensors"))
    assert f"no counterpart of the same rank, for instance {QUERY}.lora_down.weight" in told
    tensors[f"{QUERY}.lora_up.weight"] = torch.ones(7, 3)
    save_file(tensors, "odd.safetensors")
    assert f"{QUERY}.lora_down.weight" in refusal(tool, *words(tool, "odd.safetensors"))
    save_file(load_file("good.safetensors") | {f"{QUERY}.diff_b": torch.ones(7)}, "more.safetensors")
    assert f"are no parts of a LoRA, for instance {QUERY}.diff_b" in refusal(tool, *words(tool, "more.safetensors"))


@pytest.mark.parametrize("tool", WRITING)
def test_networks_for_other_models_by_their_metadata(tool, folder):
    save_file(lora(4, 4.0, 1), "xl.safetensors", metadata={"ss_base_model_version": "sdxl_base_v1-0"})
    assert "made for another kind of model: sdxl_base_v1-0" in refusal(tool, *words(tool, "xl.safetensors"))


@pytest.mark.parametrize("tool", MERGING)
def test_networks_for_different_models(tool, folder):
    save_file(lora(4, 4.0, 1), "two.safetensors", metadata={"ss_base_model_version": "sd_v2_v"})
    told = refusal(tool, *words(tool, "two.safetensors"))
    assert "two.safetensors and good.safetensors are for different models: sd_v2_v and sd_v1" in told
    wide = {**LAYERS, QUERY: (7, 9, 0)}
    save_file(lora(4, 4.0, 1, wide), "wide.safetensors")
    told = refusal(tool, *words(tool, "wide.safetensors"))
    assert f"{QUERY}: 9 inputs and 7 outputs, 7 inputs and 7 outputs" in told


@pytest.mark.parametrize("tool", MERGING)
def test_widths_tell_the_model_where_metadata_does_not(tool, folder):
    layer = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"
    save_file(lora(4, 4.0, 1, {layer: (8, 768, 0)}), "one.safetensors")
    save_file(lora(4, 4.0, 1, {layer: (8, 1024, 0)}), "two.safetensors")
    told = refusal(tool, "--models", "one.safetensors", "two.safetensors", "--save_to", "out.safetensors")
    assert "different models: sd_v1 and sd_v2" in told
    run(tool, "--models", "two.safetensors", "--save_to", "out.safetensors")
    assert read_metadata(folder / "out.safetensors")["ss_base_model_version"] == "sd_v2"


def test_v2_of_networks(folder):
    told = refusal("merge_lora", *words("merge_lora", "b.safetensors"), "--v2")
    assert "b.safetensors was made for Stable Diffusion 1.x, but --v2 is given" in told
    assert "good.safetensors was made for" in told
    save_file(lora(4, 4.0, 1), "plain.safetensors")
    run("merge_lora", "--models", "plain.safetensors", "--v2", "--save_to", "out.safetensors")
    assert read_metadata(folder / "out.safetensors")["ss_v2"] == "True"


@pytest.mark.parametrize("tool", MERGING)
def test_all_mistakes_are_told_together(tool, folder):
    told = refusal(tool, "--models", "a", "b", "--ratios", 1, 2, 3, "--save_to", "out")
    assert "2 problems" in told
    assert "--ratios has 3 values, and --models 2" in told
    assert "out does not say which kind of file it is" in told
    told = refusal(tool, "--models", "no.safetensors", "nor.safetensors", "--save_to", "out.pt")
    assert "2 problems" in told


@pytest.mark.parametrize("tool", WRITING)
def test_places_that_cannot_be_written_to(tool, folder):
    (folder / "out.safetensors").mkdir()
    assert "out.safetensors is a folder" in refusal(tool, *words(tool, "good.safetensors"))
    (folder / "out.safetensors").rmdir()
    with read_only(folder):
        told = bound_by_permissions(lambda: refusal(tool, *words(tool, "good.safetensors")))
    assert "cannot write" in told or "write protection" in told


@pytest.mark.parametrize("tool", [tool for tool in WRITING if tool != "extract_lora_from_dylora"])
def test_numbers_too_large_for_the_format_are_not_written(tool, folder):
    save_file({name: tensor * 1e4 for name, tensor in lora(4, 4.0, 1).items()}, "large.safetensors")
    told = refusal(tool, *words(tool, "large.safetensors"), "--save_precision", "fp16")
    assert "refusing to save" in told


@pytest.mark.parametrize("tool", TOOLS)
def test_help_and_mistakes_need_nothing_heavy(tool, tmp_path):
    program = (
        "import sys\n"
        f"from networks.{tool} import main\n"
        "for words in (['--help'], [], ['--save_to=x.pt', '--models=no', '--model=no', 'no']):\n"
        "    try:\n"
        "        main(words)\n"
        "    except (SystemExit, Exception):\n"
        "        pass\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    reference = {row["name"] for row in FLAGS[f"networks/{tool}.py"]}
    assert all(f"--{name}" in done.stdout for name in reference)


def test_a_tool_runs_from_its_own_folder_and_from_any(folder):
    script = ROOT / "networks" / "merge_lora.py"
    given = ["--models", "good.safetensors", "--ratios", "2", "--save_to", "out.safetensors"]
    subprocess.run([sys.executable, str(script), *given], cwd=folder, check=True, timeout=120)
    doubled = {name: 2 * change for name, change in deltas(folder / "good.safetensors").items()}
    assert_close(deltas(folder / "out.safetensors"), doubled)
    given = [str(folder / "good.safetensors")]
    inside = [sys.executable, "check_lora_weights.py", *given]
    done = subprocess.run(inside, cwd=script.parent, capture_output=True, text=True, timeout=120)
    assert "number of LoRA modules: 4" in done.stdout
    wrong = subprocess.run([sys.executable, str(script)], cwd=folder, capture_output=True, text=True, timeout=120)
    assert wrong.returncode == 2
    assert "Traceback" not in wrong.stderr


@pytest.mark.parametrize("tool", TOOLS)
def test_flags_defaults_and_choices_are_those_of_the_reference(tool):
    declared = declarations(importlib.import_module(f"networks.{tool}").Options)
    reference = {row["name"]: row for row in FLAGS[f"networks/{tool}.py"]}
    assert declared.keys() == reference.keys()
    for name, row in reference.items():
        found = declared[name]
        # One flag has no default there: without it the prediction is guessed.
        assert found.default == (row["default"] if row["type"] != "flag" else bool(row["default"])), name
        assert is_switch(found) == (row["type"] == "flag"), name
        assert is_variadic(found.type) == row["many"], name
        assert set(found.facts.choices or ()) == {choice for choice in row["choices"] or () if choice is not None}, name
        if row["type"] in ("int", "float"):
            assert row["type"] in str(found.type), name


@pytest.mark.parametrize("tool", WRITING)
def test_the_files_are_read_by_the_training(tool, folder):
    """Names and shapes that ``networks.lora`` takes for a network."""
    from networks.lora_files import read_lora

    run(tool, *words(tool, "b.safetensors"))
    out = folder / ("out-0002.safetensors" if tool == "extract_lora_from_dylora" else "out.safetensors")
    assert read_lora(out).changes.keys() == LAYERS.keys()
    assert all(tensor.is_floating_point() for tensor in read_tensors(out).tensors.values())
