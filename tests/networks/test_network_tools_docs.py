"""``docs/network_tools.md``: its commands run in their order and say what it shows, and its tables are complete."""

import importlib
import re
import shlex

import pytest
import torch

from library.option_fields import declarations
from networks import dylora
from tests.finetune.runs import ROOT
from tests.networks.test_lora_network import trained
from tests.networks.tool_runs import TOOLS
from tests.tiny import tiny_ldm, tiny_parts
from tools.option_tables import row

PAGE = (ROOT / "docs" / "network_tools.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("tool", TOOLS)
def test_every_option_has_its_row(tool):
    section = next(
        part for part in PAGE.split("\n## ") if f"python networks/{tool}.py" in part and "| option |" in part
    )
    rows = [row(declared) for declared in declarations(importlib.import_module(f"networks.{tool}").Options).values()]
    assert re.findall(r"^\| `--.*$", section, re.MULTILINE) == rows


def write_inputs(folder):
    tiny_ldm(folder, "sd1", layers_per_block=1).rename(folder / "model.safetensors")
    for name, dim, seed in (("cat", 8, 1), ("style", 8, 2), ("place", 4, 3)):
        network = trained(tiny_parts("sd1", layers_per_block=1), dim=dim, alpha=dim / 2, seed=seed)
        network.save_weights(str(folder / f"{name}.safetensors"), None, {"ss_base_model_version": "sd_v1"})
    parts = tiny_parts("sd1", layers_per_block=1)
    network = dylora.create_network(1.0, 16, 8.0, None, parts.text_encoder, parts.unet, unit="4")
    network.save_weights(str(folder / "dylora.safetensors"), None, {})


def test_the_commands_say_what_the_page_shows(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    write_inputs(tmp_path)
    commands = 0
    for number, (kind, text) in enumerate(BLOCKS):
        if kind != "bash":
            continue
        words = shlex.split(text.replace("\\\n", " "))
        assert words[0] == "python"
        capfd.readouterr()
        with torch.no_grad():
            assert importlib.import_module(words[1].removesuffix(".py").replace("/", ".")).main(words[2:]) == 0
        said = capfd.readouterr()
        commands += 1
        lines = iter(line for line in (said.out + said.err).splitlines())
        if number + 1 < len(BLOCKS) and BLOCKS[number + 1][0] == "":
            for shown in BLOCKS[number + 1][1].splitlines():
                assert any(line.endswith(shown) for line in lines), shown
    assert commands == PAGE.count("```bash")
