"""Small captioning models and taggers with made-up weights, and images for them."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

WORDS = [
    "a",
    "picture",
    "of",
    "the",
    "cat",
    "dog",
    "house",
    "tree",
    "red",
    "green",
    "blue",
    "on",
    "in",
    "with",
    "and",
    "small",
    "large",
    "old",
    "new",
    "sits",
    "stands",
    "runs",
]
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
BLIP_SIZE = 32
PLACES = 80
"""Tokens that the captioning model has places for."""
GIT_SIZE = 32
TAGGER_SIZE = 448
TAGS = [
    ("general", 9),
    ("sensitive", 9),
    ("questionable", 9),
    ("explicit", 9),
    ("1girl", 0),
    ("long_hair", 0),
    ("^_^", 0),
    ("red_sky", 0),
    ("tree", 0),
    ("hatsune_miku", 4),
    ("saber_(fate)", 4),
]
"""Names and categories of the tiny tagger: ratings, general tags, characters."""


def write_images(folder: Path, count: int, *, size: tuple[int, int] = (40, 30), seed: int = 0) -> list[Path]:
    """``count`` PNG files of noise over a colour, all different."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(seed)
    paths = []
    for index in range(count):
        base = generator.integers(0, 256, 3)
        noise = generator.integers(-40, 40, (size[1], size[0], 3))
        path = folder / f"{index:03d}.png"
        Image.fromarray(np.clip(base + noise, 0, 255).astype(np.uint8)).save(path)
        paths.append(path)
    return paths


def write_vocabulary(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(VOCABULARY) + "\n", encoding="utf-8")
    return path


def blip_model(seed: int = 0) -> Any:
    """A BLIP model whose captions depend on the image."""
    import torch
    from transformers import BlipConfig, BlipForConditionalGeneration

    torch.manual_seed(seed)
    text = {
        "vocab_size": len(VOCABULARY) + 2,
        "hidden_size": 64,
        "encoder_hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 1,
        "max_position_embeddings": PLACES,
        "bos_token_id": len(VOCABULARY),
        "eos_token_id": 3,
        "sep_token_id": 3,
        "pad_token_id": 0,
        "initializer_range": 0.4,
    }
    vision = {
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 1,
        "image_size": BLIP_SIZE,
        "patch_size": 16,
        "layer_norm_eps": 1e-6,
    }
    model = BlipForConditionalGeneration(BlipConfig(text_config=text, vision_config=vision)).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1:
                torch.nn.init.normal_(weight, std=0.3 if "embeddings" in name else 0.15)
    return model


def write_blip(folder: Path) -> Path:
    """A BLIP model as a folder of transformers."""
    from transformers import BertTokenizer

    blip_model().save_pretrained(folder)
    BertTokenizer(vocab=str(write_vocabulary(folder / "vocab.txt"))).save_pretrained(folder)
    return folder


def write_git(folder: Path) -> Path:
    """A GIT model as a folder of transformers."""
    import torch
    from transformers import BertTokenizer, CLIPImageProcessorPil, GitConfig, GitForCausalLM, GitProcessor

    torch.manual_seed(0)
    vision = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": GIT_SIZE,
        "patch_size": 16,
    }
    config = GitConfig(
        vision_config=vision,
        vocab_size=len(VOCABULARY),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        bos_token_id=2,
        eos_token_id=3,
        pad_token_id=0,
    )
    model = GitForCausalLM(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                torch.nn.init.normal_(weight, std=0.3)
    model.save_pretrained(folder)
    size = {"height": GIT_SIZE, "width": GIT_SIZE}
    processor = GitProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": GIT_SIZE}, crop_size=size),
        BertTokenizer(vocab=str(write_vocabulary(folder / "vocab.txt"))),
    )
    processor.save_pretrained(folder)
    return folder


def write_tagger(
    folder: Path, *, batch: int | str = "batch", size: int = TAGGER_SIZE, tags: list[tuple[str, int]] = TAGS
) -> Path:
    """A tagger in the usual layout: ``model.onnx`` (batch, height, width, BGR) and ``selected_tags.csv``."""
    folder.mkdir(parents=True, exist_ok=True)
    save_onnx(folder / "model.onnx", [batch, size, size, 3], axes=[1, 2], outputs=len(tags), ends_in_sigmoid=True)
    with (folder / "selected_tags.csv").open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["tag_id", "name", "category", "count"])
        rows.writerows([number, name, category, 1000 - number] for number, (name, category) in enumerate(tags))
    return folder


def write_mapped_tagger(folder: Path, tags: list[tuple[str, str]]) -> Path:
    """A tagger in the other layout: ``model_optimized.onnx`` (batch, BGR, height, width) and ``tag_mapping.json``."""
    folder.mkdir(parents=True, exist_ok=True)
    shape = ["batch", 3, TAGGER_SIZE, TAGGER_SIZE]
    save_onnx(folder / "model_optimized.onnx", shape, axes=[2, 3], outputs=len(tags), ends_in_sigmoid=False)
    mapping = {str(number): {"tag": name, "category": category} for number, (name, category) in enumerate(tags)}
    (folder / "tag_mapping.json").write_text(json.dumps(mapping), encoding="utf-8")
    return folder


def save_onnx(path: Path, shape: list[int | str], *, axes: list[int], outputs: int, ends_in_sigmoid: bool) -> None:
    """A network that makes tags of an image's mean colour."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    weights = np.random.default_rng(3).normal(size=(3, outputs)).astype(np.float32)
    middle, scale = (127.5, 40.0) if ends_in_sigmoid else (0.0, 0.3)
    nodes = [
        helper.make_node("ReduceMean", ["input_1:0", "axes"], ["mean"], keepdims=0),
        helper.make_node("Sub", ["mean", "middle"], ["centred"]),
        helper.make_node("Div", ["centred", "scale"], ["scaled"]),
        helper.make_node("MatMul", ["scaled", "weights"], ["logits" if ends_in_sigmoid else "output"]),
    ]
    if ends_in_sigmoid:
        nodes.append(helper.make_node("Sigmoid", ["logits"], ["output"]))
    constants = {
        "axes": np.array(axes, np.int64),
        "middle": np.array(middle, np.float32),
        "scale": np.array(scale, np.float32),
        "weights": weights,
    }
    graph = helper.make_graph(
        nodes,
        "tagger",
        [helper.make_tensor_value_info("input_1:0", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, [shape[0], outputs])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.save(model, str(path))
