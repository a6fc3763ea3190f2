"""``train_textual_inversion_XTI.py`` end to end, on small random models."""

from pathlib import Path

import numpy as np
import pytest
import torch

from library.errors import UserError
from library.files import read_metadata, read_tensors
from library.models.embedding_files import LAYERS
from tests.scripts.runs import Run, run_script
from tests.scripts.test_textual_inversion import ASSETS, FLAGS, arguments, dataset, trained_rows
from tests.tiny import Kind, tiny_sd

SCRIPT = "train_textual_inversion_XTI"
FILE = "zwx.safetensors"
AS_SAFETENSORS = "--save_model_as=safetensors"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {kind: tiny_sd(folder / kind, kind) for kind in FLAGS}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def plain(models: dict[str, Path], data: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The run that others are compared with."""
    given = arguments(models["sd1"], dataset(data), AS_SAFETENSORS)
    return run_script(SCRIPT, tmp_path_factory.mktemp("plain"), *given)


@pytest.mark.parametrize("kind", FLAGS)
def test_losses_are_the_stored_ones(kind: Kind, models: dict[str, Path], data: Path, tmp_path: Path) -> None:
    run = run_script(SCRIPT, tmp_path, *arguments(models[kind], dataset(data), kind=kind))
    stored = [float(line) for line in (ASSETS / f"{SCRIPT}-{kind}.txt").read_text().split()]
    assert run.code == 0
    assert run.losses == pytest.approx(stored, rel=1e-4)
    assert run.files - {path for path in run.files if path.startswith("log/")} == {
        *("zwx.pt", "zwx-report.html", "zwx.run.json")
    }


def test_the_first_loss_is_that_of_textual_inversion(
    plain: Run, models: dict[str, Path], data: Path, tmp_path: Path
) -> None:
    """All layers begin with the same word; the next step's differ."""
    run = run_script("train_textual_inversion", tmp_path, *arguments(models["sd1"], dataset(data), steps=2))
    assert plain.losses[0] == pytest.approx(run.losses[0], rel=1e-5)
    assert plain.losses[1] != pytest.approx(run.losses[1], rel=1e-7)


def test_the_file_has_a_tensor_for_each_layer_and_all_are_trained(plain: Run, models: dict[str, Path]) -> None:
    tensors = read_tensors(plain.folder / FILE).tensors
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {name: (2, 64) for name in LAYERS}
    table = read_tensors(models["sd1"] / "text_encoder" / "model.safetensors").tensors
    dog = table["text_model.embeddings.token_embedding.weight"][1929]
    assert not any(torch.isclose(row, dog).all() for tensor in tensors.values() for row in tensor)
    assert len({tensor[0].numpy().tobytes() for tensor in tensors.values()}) == 16
    assert read_metadata(plain.folder / FILE)["modelspec.architecture"] == "stable-diffusion-v1/textual-inversion"


def test_training_moves_the_new_rows_and_nothing_else(
    models: dict[str, Path], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = [AS_SAFETENSORS, "--optimizer_type=AdamW", "--optimizer_args", "weight_decay=0.5"]
    rows, run = trained_rows(SCRIPT, tmp_path, monkeypatch, *arguments(models["sd1"], dataset(data), *more))
    tensors = read_tensors(run.folder / FILE).tensors
    assert torch.equal(torch.cat([tensors[layer] for layer in LAYERS]), rows)


@pytest.mark.parametrize("max_token_length", [None, 150])
def test_each_block_reads_the_caption_with_its_own_words(max_token_length: int | None, models: dict[str, Path]) -> None:
    """Against 16 texts, each with its layer's names, by a text encoder whose table transformers made longer."""
    from transformers import AddedToken

    from library.data.dataset import Batch
    from library.layered_conditioning import LayeredConditioning, give_layers_their_text
    from library.models.embedding_options import EmbeddingOptions
    from library.models.new_tokens import token_table
    from library.models.options import ModelOptions, PromptOptions
    from library.models.prompts import CaptionTokenizer, encode_tokens
    from library.models.stable_diffusion import load_stable_diffusion
    from library.textual_inversion import teach

    options = ModelOptions(pretrained_model_name_or_path=str(models["sd1"]))
    prompts = PromptOptions(max_token_length=max_token_length, clip_skip=2)
    model, other = load_stable_diffusion(options, prompts), load_stable_diffusion(options, prompts)
    learnt = teach(model, EmbeddingOptions(token_string="zwx", num_vectors_per_token=2), seed=1, layers=16)
    text = LayeredConditioning.of(model, prompts, learnt)
    caption = "a zwx zwx1 thing, " * 12

    names = [f"{name}_{layer}" for layer in LAYERS for name in ("zwx", "zwx1")]
    other.tokenizer.add_tokens([AddedToken(name, single_word=True) for name in names])
    other.text_encoder.resize_token_embeddings(49408 + 32, mean_resizing=False)
    token_table(other.text_encoder).weight.data[49408:] = learnt.rows.weight.data
    tokenize = CaptionTokenizer(other.tokenizer, max_token_length=max_token_length)
    expected = []
    for layer in LAYERS:
        ids = tokenize(caption.replace("zwx1", f"zwx1_{layer}").replace("zwx ", f"zwx_{layer} ")).ids[None]
        expected.append(encode_tokens(other.text_encoder, ids, clip_skip=2))

    seen = []
    give_layers_their_text(model.unet)
    for level in [*model.unet.down_blocks, model.unet.mid_block, *model.unet.up_blocks]:
        for block in getattr(level, "attentions", []):
            attention = block.transformer_blocks[0].attn2
            attention.register_forward_pre_hook(lambda _, given, named: seen.append((given, named)), with_kwargs=True)
    batch = Batch(
        epoch=1,
        step=0,
        examples=(0,),
        input_ids=text.tokenize(caption).ids[None],
        captions=(caption,),
        loss_weight=torch.ones(1),
    )
    with torch.no_grad():
        context = text.encode(batch)
        model.unet(torch.zeros(1, 4, 8, 8), torch.tensor([5]), context)
    assert len(seen) == 16
    for number, (_, named) in enumerate(seen):
        assert torch.allclose(named["encoder_hidden_states"], expected[number], atol=1e-5), LAYERS[number]
    assert not torch.allclose(expected[0], expected[1], atol=1e-3)


def test_a_resumed_run_equals_the_uninterrupted_one(models: dict[str, Path], data: Path, tmp_path: Path) -> None:
    given = arguments(
        models["sd1"], dataset(data), AS_SAFETENSORS, "--lr_scheduler=cosine", "--gradient_accumulation_steps=2"
    )
    whole = run_script(SCRIPT, tmp_path / "whole", *given, "--save_state", "--save_every_n_steps=3")
    state = whole.folder / "zwx-step00000003-state"
    resumed = run_script(SCRIPT, tmp_path / "resumed", *given, f"--resume={state}")
    assert resumed.losses == whole.losses[3:]
    assert resumed.tensor_hash(FILE) == whole.tensor_hash(FILE)


def test_a_file_is_gone_on_from(plain: Run, models: dict[str, Path], data: Path, tmp_path: Path) -> None:
    given = [f"--weights={plain.folder / FILE}", "--learning_rate=1e-30", AS_SAFETENSORS]
    run = run_script(SCRIPT, tmp_path, *arguments(models["sd1"], dataset(data), *given, steps=1))
    assert run.tensor_hash(FILE) == plain.tensor_hash(FILE)


def test_bf16_checkpointing_and_caching_train(plain: Run, models: dict[str, Path], data: Path, tmp_path: Path) -> None:
    given = arguments(models["sd1"], dataset(data), "--gradient_checkpointing", "--cache_latents", AS_SAFETENSORS)
    same = run_script(SCRIPT, tmp_path / "fp32", *given)
    assert same.losses == pytest.approx(plain.losses, rel=1e-4)
    assert _close(same, plain)
    half = run_script(SCRIPT, tmp_path / "bf16", *given, "--mixed_precision=bf16")
    assert half.losses == pytest.approx(plain.losses, rel=0.05)


def _close(one: Run, other: Run) -> bool:
    found, expected = (read_tensors(run.folder / FILE).tensors for run in (one, other))
    return all(torch.allclose(tensor, expected[name], atol=1e-4) for name, tensor in found.items())


def test_previews_change_nothing_and_know_the_word(
    plain: Run, models: dict[str, Path], data: Path, tmp_path: Path
) -> None:
    from PIL import Image

    prompts = tmp_path / "prompts.txt"
    lines = ["a (zwx:1.3) thing --n bad", "a thing --n bad"]
    prompts.write_text("".join(f"{line} --w 64 --h 64 --s 2 --d 3\n" for line in lines), encoding="utf-8")
    more = ["--sample_every_n_steps=4", "--sample_at_first", f"--sample_prompts={prompts}", AS_SAFETENSORS]
    run = run_script(SCRIPT, tmp_path / "out", *arguments(models["sd1"], dataset(data), *more))
    assert run.tensor_hash(FILE) == plain.tensor_hash(FILE)
    paths = sorted((run.folder / "sample").glob("zwx_*_0?_*.png"))
    after, without, before, _ = (np.asarray(Image.open(path)) for path in paths)
    assert not np.array_equal(before, after)
    assert not np.array_equal(after, without)


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--weighted_captions"], "--weighted_captions is not available"),
        (["--save_model_as=bin"], "a .bin file holds one embedding"),
        (["--token_string=zwy"], "no caption contains the new word"),
        (["--num_vectors_per_token=3", "--weights={plain}"], "2 vectors, the new word 3"),
    ],
)
def test_wrong_use_is_refused(
    more: list[str], told: str, plain: Run, models: dict[str, Path], data: Path, tmp_path: Path
) -> None:
    more = [word.format(plain=plain.folder / FILE) for word in more]
    with pytest.raises(UserError) as error:
        run_script(SCRIPT, tmp_path / "out", *arguments(models["sd1"], dataset(data), *more))
    assert told in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_file_of_layers_is_refused_by_textual_inversion(
    plain: Run, models: dict[str, Path], data: Path, tmp_path: Path
) -> None:
    given = arguments(models["sd1"], dataset(data), f"--weights={plain.folder / FILE}")
    with pytest.raises(UserError, match="16 layers"):
        run_script("train_textual_inversion", tmp_path, *given)


def test_a_unet_with_other_blocks_is_refused(data: Path, tmp_path: Path) -> None:
    model = tiny_sd(tmp_path / "model", "sd1", layers_per_block=1)
    with pytest.raises(UserError, match="the U-Net has 10 blocks with cross-attention"):
        run_script(SCRIPT, tmp_path / "out", *arguments(model, dataset(data)))
