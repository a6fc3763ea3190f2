"""BLIP's own checkpoints, its input, and what is said of models that cannot be used."""

import re

import numpy as np
import pytest
import torch
from PIL import Image

from finetune.blip import Search, download, load_blip, preprocess
from finetune.blip_weights import read_weights, structure_of, transformers_name
from library.errors import UserError
from tests.finetune.tiny_models import BLIP_SIZE, PLACES, VOCABULARY, blip_model, write_images, write_vocabulary

CPU = torch.device("cpu")
SEARCH = Search(beams=2, top_p=0.9, min_length=5, max_length=14, seed=42)

ORIGINAL = [
    (r"vision_model\.embeddings\.class_embedding", "visual_encoder.cls_token"),
    (r"vision_model\.embeddings\.position_embedding", "visual_encoder.pos_embed"),
    (r"vision_model\.embeddings\.patch_embedding\.", "visual_encoder.patch_embed.proj."),
    (r"vision_model\.post_layernorm\.", "visual_encoder.norm."),
    (r"vision_model\.encoder\.layers\.(\d+)\.layer_norm(\d)\.", r"visual_encoder.blocks.\1.norm\2."),
    (r"vision_model\.encoder\.layers\.(\d+)\.self_attn\.qkv\.", r"visual_encoder.blocks.\1.attn.qkv."),
    (r"vision_model\.encoder\.layers\.(\d+)\.self_attn\.projection\.", r"visual_encoder.blocks.\1.attn.proj."),
    (r"vision_model\.encoder\.layers\.(\d+)\.mlp\.", r"visual_encoder.blocks.\1.mlp."),
]
"""Names of BLIP's published checkpoints; all others are the same in both."""


def original_name(name):
    for pattern, replacement in ORIGINAL:
        if re.match(pattern, name):
            return re.sub(pattern, replacement, name)
    return name


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A checkpoint as BLIP's authors publish them, with things in it that captioning has no use for."""
    folder = tmp_path_factory.mktemp("original")
    weights = {original_name(name): tensor for name, tensor in blip_model().state_dict().items()}
    weights["text_decoder.bert.embeddings.position_ids"] = torch.arange(PLACES)[None]
    weights["text_encoder.embeddings.word_embeddings.weight"] = torch.zeros(2, 2)
    torch.save({"model": weights, "epoch": 5}, folder / "model_tiny_caption.pth")
    write_vocabulary(folder / "vocab.txt")
    return folder / "model_tiny_caption.pth"


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images"), 4)


def captions(model, images, search=SEARCH):
    return model.caption([path.name for path in images], [model.read(path) for path in images], search)


def test_the_checkpoint_has_every_tensor_of_the_transformers_model(checkpoint):
    weights, expected = read_weights(checkpoint), blip_model().state_dict()
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_the_structure_is_read_from_shapes(checkpoint):
    structure, config = structure_of(read_weights(checkpoint), sep_token_id=3), blip_model().config
    for part in ("vision_config", "text_config"):
        for name, value in structure[part].items():
            assert getattr(getattr(config, part), name) == value, name


@pytest.mark.parametrize("search", [SEARCH, Search(beams=None, top_p=0.9, min_length=5, max_length=14, seed=1)])
def test_both_layouts_give_the_same_captions(checkpoint, blip_folder, images, search):
    original = captions(load_blip(str(checkpoint), CPU), images, search)
    assert original == captions(load_blip(str(blip_folder), CPU), images, search)
    assert len(set(original)) > 1
    assert all(set(caption.split()) <= set(VOCABULARY) for caption in original)


def test_the_large_model_has_the_structure_its_authors_give():
    """1024 wide with 24 layers and 16 heads of attention; BERT's 12 layers and heads of 768."""
    shapes = {
        "vision_model.embeddings.patch_embedding.weight": (1024, 3, 16, 16),
        "vision_model.embeddings.position_embedding": (1, 577, 1024),
        "text_decoder.bert.embeddings.word_embeddings.weight": (30524, 768),
        "text_decoder.bert.embeddings.position_embeddings.weight": (512, 768),
        **{f"vision_model.encoder.layers.{n}.mlp.fc1.weight": (4096, 1024) for n in range(24)},
        **{f"text_decoder.bert.encoder.layer.{n}.intermediate.dense.weight": (3072, 768) for n in range(12)},
    }
    structure = structure_of(
        {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}, sep_token_id=102
    )
    vision, text = structure["vision_config"], structure["text_config"]
    assert (vision["num_hidden_layers"], vision["num_attention_heads"], vision["image_size"]) == (24, 16, 384)
    assert (text["num_hidden_layers"], text["num_attention_heads"], text["bos_token_id"]) == (12, 12, 30522)


def test_names_without_a_use_have_no_counterpart():
    assert transformers_name("text_encoder.embeddings.word_embeddings.weight") is None
    assert transformers_name("vision_proj.weight") is None
    assert transformers_name("visual_encoder.blocks.0.unknown.weight") is None


def test_the_input_is_stretched_and_normalised():
    grey = np.full((10, 30, 3), 51, np.uint8)
    pixels = preprocess(grey, BLIP_SIZE)
    assert pixels.shape == (3, BLIP_SIZE, BLIP_SIZE)
    assert pixels.dtype == np.float32
    expected = (0.2 - np.array([0.48145466, 0.4578275, 0.40821073])) / [0.26862954, 0.26130258, 0.27577711]
    np.testing.assert_allclose(pixels.mean((1, 2)), expected, rtol=1e-5)


def test_the_input_is_what_the_models_own_processor_makes(blip_folder):
    from transformers import BlipImageProcessorPil

    rgb = np.random.default_rng(0).integers(0, 256, (50, 70, 3)).astype(np.uint8)
    processor = BlipImageProcessorPil(size={"height": BLIP_SIZE, "width": BLIP_SIZE})
    expected = processor(Image.fromarray(rgb), return_tensors="np")["pixel_values"][0]
    np.testing.assert_allclose(preprocess(rgb, BLIP_SIZE), expected, atol=1e-5)


def test_transparency_and_turned_images_are_read_on_purpose(blip_folder, tmp_path):
    model = load_blip(str(blip_folder), CPU)
    Image.new("RGBA", (20, 20), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    white = preprocess(np.full((20, 20, 3), 255, np.uint8), BLIP_SIZE)
    assert np.array_equal(model.read(tmp_path / "clear.png"), white)


def test_a_pickle_that_runs_code_is_refused(tmp_path):
    torch.save({"model": re.compile("a")}, tmp_path / "model.pth")
    with pytest.raises(UserError, match="could run code"):
        load_blip(str(tmp_path / "model.pth"), CPU)


def test_other_files_are_refused(tmp_path, checkpoint):
    torch.save({"model": {"weight": torch.zeros(2)}}, tmp_path / "other.pth")
    with pytest.raises(UserError, match="no BLIP captioning model"):
        load_blip(str(tmp_path / "other.pth"), CPU)
    with pytest.raises(UserError, match="not found"):
        load_blip(str(tmp_path / "missing.pth"), CPU)
    (tmp_path / "broken.pth").write_bytes(checkpoint.read_bytes()[:5000])
    with pytest.raises(UserError, match="not a readable torch file"):
        load_blip(str(tmp_path / "broken.pth"), CPU)


def test_a_checkpoint_without_some_tensors_is_refused(tmp_path, checkpoint):
    content = torch.load(checkpoint, weights_only=True)
    del content["model"]["visual_encoder.blocks.1.norm1.weight"]
    torch.save(content, tmp_path / "model.pth")
    write_vocabulary(tmp_path / "vocab.txt")
    with pytest.raises(UserError, match="not all of a BLIP captioning model"):
        load_blip(str(tmp_path / "model.pth"), CPU)


def test_a_vocabulary_of_another_length_is_refused(tmp_path, checkpoint):
    (tmp_path / "model.pth").write_bytes(checkpoint.read_bytes())
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nword\n")
    with pytest.raises(UserError, match=f"the vocabulary has 6 words, the model {len(VOCABULARY)}"):
        load_blip(str(tmp_path / "model.pth"), CPU)


def test_a_folder_of_another_model_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="cannot read the BLIP model"):
        load_blip(str(tmp_path), CPU)


def test_an_address_is_fetched_once_into_the_cache_of_torch(tmp_path, monkeypatch, checkpoint):
    fetched = []

    def fetch(url, path):
        fetched.append(url)
        with open(path, "wb") as file:
            file.write(checkpoint.read_bytes())

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", fetch)
    first = download("https://example.org/models/tiny.pth")
    assert first == download("https://example.org/models/tiny.pth") == tmp_path / "checkpoints" / "tiny.pth"
    assert fetched == ["https://example.org/models/tiny.pth"]


def test_no_connection_says_what_else_can_be_given(tmp_path, monkeypatch):
    def fetch(url, path):
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", fetch)
    with pytest.raises(UserError, match="no route to host") as caught:
        load_blip("https://example.org/models/tiny.pth", CPU)
    assert "hub id" in str(caught.value)
