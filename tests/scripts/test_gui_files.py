"""Configuration files as the common graphical front end writes them run unchanged; see ``gui_files/``.

Only paths and the number of steps are given on the command line, as the files name folders of their maker.
"""

import json
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from library.errors import UserError
from library.files import read_metadata, read_tensors
from library.options import parse_options
from library.textual_inversion_options import TextualInversionOptions
from tests.scripts.runs import Run, read_scalars, run_script, write_images
from tests.tiny import tiny_sd

FOLDER = Path(__file__).parent / "gui_files"
EVERYWHERE = ("noise_offset_type",)


@dataclass(frozen=True, kw_only=True)
class Case:
    """A file, and what a run of it must show.

    Attributes:
        file: Its name without suffix.
        ignored: What is named as ignored, besides what is in every file.
        rates: Learning rates of every step, by TensorBoard tag.
        recorded: Entries of the metadata of the trained file.
        result: The trained file or folder.
        script: The script that the front end starts.
    """

    file: str
    ignored: Sequence[str]
    rates: dict[str, list[float]]
    result: str
    recorded: dict[str, str] = field(default_factory=dict)
    script: str = "train_network"


LYCORIS = {"ss_network_module": "lycoris.kohya", "ss_network_dim": "8"}
CASES = [
    # Half of two steps is warm-up, and the cosine begins after it.
    Case(
        file="lora_v26",
        ignored=["epoch", "lowvram", "train_inpainting"],
        rates={"lr/textencoder": [0, 5e-5], "lr/unet": [0, 1e-4]},
        result="plain lora.safetensors",
        recorded={
            "ss_network_dim": "8",
            "ss_network_alpha": "1.0",
            "ss_learning_rate": "0.0002",
            "ss_text_encoder_lr": "5e-05",
            "ss_unet_lr": "0.0001",
            "ss_lr_scheduler": "cosine",
            "ss_clip_skip": "1",
            "ss_max_token_length": "None",
            "ss_huber_scale": "1.0",
            "ss_mixed_precision": "bf16",
            "modelspec.resolution": "128x128",
        },
    ),
    Case(
        file="lora_conv",
        ignored=["epoch"],
        rates={"lr/textencoder": [0, 1e-4], "lr/unet": [0, 1e-4]},
        result="conv.safetensors",
        recorded={"ss_network_dropout": "0.1", "ss_scale_weight_norms": "1.0"},
    ),
    Case(
        file="lora_block_weights",
        ignored=["epoch"],
        rates={},
        result="blocks.safetensors",
    ),
    Case(
        file="lora_plus",
        ignored=["epoch", "loraplus_lr_ratio", "loraplus_text_encoder_lr_ratio", "loraplus_unet_lr_ratio"],
        # What network_args say, not what the keys of the same names do.
        rates={
            "lr/textencoder": [0, 1e-4],
            "lr/textencoder plus": [0, 4e-4],
            "lr/unet": [0, 1e-4],
            "lr/unet plus": [0, 16e-4],
        },
        result="plus.safetensors",
    ),
    Case(
        file="lora_prodigy",
        ignored=["epoch"],
        rates={"lr/textencoder": [1, 1], "lr/unet": [1, 1]},
        result="prodigy.safetensors",
        recorded={"ss_min_snr_gamma": "5.0"},
    ),
    Case(
        file="lora_adafactor",
        ignored=["epoch"],
        rates={"lr/textencoder": [0, 2e-4], "lr/unet": [0, 2e-4]},
        result="adafactor.safetensors",
        recorded={"ss_caption_dropout_rate": "0.05", "ss_lr_scheduler": "constant_with_warmup"},
    ),
    Case(
        file="lycoris_loha",
        ignored=["epoch"],
        rates={"lr/textencoder": [0, 1e-4], "lr/unet": [0, 1e-4]},
        result="loha.safetensors",
        recorded=LYCORIS,
    ),
    Case(
        file="lycoris_lokr",
        ignored=["epoch"],
        rates={"lr/textencoder": [0, 1e-4], "lr/unet": [0, 1e-4]},
        result="lokr.safetensors",
        recorded=LYCORIS,
    ),
    Case(
        file="lora_v24",
        ignored=["epoch"],
        rates={"lr/textencoder": [0, 2.5e-5], "lr/unet": [0, 5e-5]},
        result="old.safetensors",
        recorded={"ss_noise_offset": "0.05", "ss_adaptive_noise_scale": "0.005", "ss_network_alpha": "4.0"},
    ),
    Case(
        file="dreambooth",
        script="train_db",
        ignored=[
            *("cache_text_encoder_outputs_to_disk", "epoch", "fused_optimizer_groups", "learning_rate_te1"),
            *("learning_rate_te2", "split_mode", "train_blocks", "train_inpainting"),
        ],
        rates={"lr/unet": [1e-5, 1e-5], "lr/text_encoder1": [5e-6, 5e-6]},
        result="dreambooth.safetensors",
    ),
    Case(
        file="fine_tune",
        script="fine_tune",
        ignored=["block_lr", "fused_optimizer_groups", "train_inpainting"],
        rates={"lr/unet": [1e-5, 1e-5], "lr/text_encoder1": [2e-6, 2e-6]},
        result="tuned",
    ),
    Case(
        file="textual_inversion_v26",
        script="train_textual_inversion",
        ignored=["caption_dropout_every_n_epochs", "epoch", "no_token_padding"],
        rates={"lr/embedding": [5e-3, 5e-3]},
        result="word.safetensors",
    ),
    Case(
        file="textual_inversion_v24",
        script="train_textual_inversion",
        ignored=["caption_dropout_every_n_epochs", "epoch", "no_token_padding", "weigts"],
        rates={"lr/embedding": [5e-3, 5e-3]},
        result="old word.pt",
    ),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_sd(tmp_path_factory.mktemp("models") / "sd1", layers_per_block=1)


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folders that the files name, all below one."""
    folder = tmp_path_factory.mktemp("train")
    write_images(folder / "img" / "2_zwx thing", 2)
    write_images(folder / "reg" / "1_thing", 2, seed=1)
    entries = {path.stem: {"caption": "a thing"} for path in (folder / "img" / "2_zwx thing").glob("*.png")}
    (folder / "meta_lat.json").write_text(json.dumps(entries), encoding="utf-8")
    (folder / "prompt.txt").write_text("a thing --w 64 --h 64 --s 2\n", encoding="utf-8")
    return folder


def run_file(case: Case, model: Path, train: Path, output: Path) -> Run:
    """Run the script of ``case`` for two steps with its file and the paths of this machine."""
    file = FOLDER / f"{case.file}.toml"
    images = train / "img"
    places = {
        "train_data_dir": images / "2_zwx thing" if case.script == "fine_tune" else images,
        "reg_data_dir": train / "reg",
        "in_json": train / "meta_lat.json",
        "sample_prompts": train / "prompt.txt",
    }
    used = tomllib.loads(file.read_text(encoding="utf-8"))
    paths = [f"--{name}={path}" for name, path in places.items() if name in used]
    given = [f"--config_file={file}", f"--pretrained_model_name_or_path={model}", "--max_train_steps=2", *paths]
    return run_script(case.script, output, *given)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.file)
def test_it_runs_unchanged(
    case: Case, model: Path, train: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_file(case, model, train, tmp_path)
    assert run.code == 0
    assert len(run.losses) == 2
    messages = [line.partition("WARNING ")[2] for line in capsys.readouterr().err.splitlines()]
    (notice,) = [text for text in messages if text.startswith("ignored, since they mean nothing here: ")]
    listed = {name for part in notice.partition(": ")[2].split("; ") for name in part.partition(" (")[0].split(", ")}
    assert listed == {*EVERYWHERE, *case.ignored}
    for tag, rates in case.rates.items():
        assert read_scalars(run.folder / "log", tag) == pytest.approx(rates), tag
    assert (run.folder / case.result).exists()
    if case.recorded:
        metadata = read_metadata(run.folder / case.result)
        assert {name: metadata.get(name) for name in case.recorded} == case.recorded
    if case.file == "fine_tune":
        assert len(list(train.rglob("*_sd.npz"))) == 2
    special = EXTRA.get(case.file)
    if special is not None:
        special(run, messages)


def _conv(run: Run, messages: list[str]) -> None:
    tensors = read_tensors(run.folder / "conv.safetensors").tensors
    downs = {name: tensor for name, tensor in tensors.items() if name.endswith("lora_down.weight")}
    assert {tensor.shape[0] for tensor in downs.values() if tensor.ndim == 4 and tensor.shape[2] == 3} == {4}
    assert {tensor.shape[0] for name, tensor in downs.items() if "attn" in name} == {8}
    assert {tensor.dtype for tensor in downs.values()} == {torch.bfloat16}
    assert any("conv_dim more than once" in text for text in messages)


def _blocks(run: Run, messages: list[str]) -> None:
    metadata = read_metadata(run.folder / "blocks.safetensors")
    assert "down_lr_weight" in metadata["ss_network_args"]
    tensors = read_tensors(run.folder / "blocks.safetensors").tensors
    assert not any(name.startswith("lora_te") for name in tensors)
    ranks = {name: tensor.shape[0] for name, tensor in tensors.items() if name.endswith("lora_down.weight")}
    assert {rank for name, rank in ranks.items() if "mid_block" in name} == {4}
    assert {rank for name, rank in ranks.items() if "mid_block" not in name} == {2}
    ups = {name: tensor for name, tensor in tensors.items() if name.endswith("lora_up.weight")}
    # The first half of the way down has rate 0, so its networks stay without effect.
    assert not any(tensor.any() for name, tensor in ups.items() if "down_blocks_0" in name)
    assert all(tensor.any() for name, tensor in ups.items() if "mid_block" in name and "proj_in" in name)


def _prodigy(run: Run, messages: list[str]) -> None:
    described = read_metadata(run.folder / "prodigy.safetensors")["ss_optimizer"]
    assert described.startswith("prodigyopt.")
    for argument in ("decouple=True", "weight_decay=0.01", "betas=(0.9, 0.99)", "safeguard_warmup=True", "d_coef=2"):
        assert argument in described


def _adafactor(run: Run, messages: list[str]) -> None:
    metadata = read_metadata(run.folder / "adafactor.safetensors")
    assert "relative_step=False" in metadata["ss_optimizer"]
    assert (metadata["ss_shuffle_caption"], metadata["ss_keep_tokens"]) == ("True", "1")


def _loha(run: Run, messages: list[str]) -> None:
    names = read_tensors(run.folder / "loha.safetensors").tensors
    assert any(name.endswith("hada_w1_a") for name in names)
    # The whole model, not its attention alone.
    assert any("time_embedding" in name for name in names)


def _lokr(run: Run, messages: list[str]) -> None:
    assert any("lokr_w" in name for name in read_tensors(run.folder / "lokr.safetensors").tensors)


def _dreambooth(run: Run, messages: list[str]) -> None:
    metadata = read_metadata(run.folder / "dreambooth.safetensors")
    assert metadata["modelspec.title"] == "dreambooth"
    assert any("wandb_run_name" in text for text in messages)


def _words(run: Run, messages: list[str]) -> None:
    rows = read_tensors(run.folder / "word.safetensors").tensors["emb_params"]
    assert rows.shape == (2, 64)
    assert rows.dtype == torch.bfloat16


def _folder(run: Run, messages: list[str]) -> None:
    assert (run.folder / "tuned" / "model_index.json").is_file()
    assert any("--masked_loss is given, but no masks" in text for text in messages)


EXTRA = {
    "lora_conv": _conv,
    "lora_block_weights": _blocks,
    "lora_prodigy": _prodigy,
    "lora_adafactor": _adafactor,
    "lycoris_loha": _loha,
    "lycoris_lokr": _lokr,
    "dreambooth": _dreambooth,
    "fine_tune": _folder,
    "textual_inversion_v26": _words,
}


def test_every_file_is_run() -> None:
    assert {path.stem for path in FOLDER.glob("*.toml")} == {case.file for case in CASES}
    assert len(CASES) >= 12


def test_as_flags_they_are_no_less_wrong(tmp_path: Path) -> None:
    """Who types a flag means it; who has a file made need not know of its keys."""
    for flag in ("--weigts=x.pt", "--no_token_padding"):
        with pytest.raises(UserError, match="there is no option"):
            parse_options(TextualInversionOptions, ["--token_string=zwx", flag], prog="x", description="")
    file = tmp_path / "typo.toml"
    file.write_text("token_string = 'zwx'\nweigths = 'x.pt'\n", encoding="utf-8")
    with pytest.raises(UserError, match="Did you mean weights"):
        parse_options(TextualInversionOptions, [f"--config_file={file}"], prog="x", description="")
