"""Sound files for each reader, and what becomes of them when bytes are changed."""

import io
import json
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from random import Random

import numpy as np

from tests.fuzz.readers import TEXT_CONFIG
from tests.fuzz.strategies import own_entry, safetensors_file, sound_images
from tests.fuzz.watch import Case

_SPECIAL_BYTES = (b"\0", b"\xff", b"\x7f", b"\xff\xff\xff\xff", b"\0\0\0\x80", b"\xff" * 8)
_SPECIAL_TEXTS = (
    b"[",
    b"{",
    b"]",
    b"}",
    b'"',
    b"'",
    b"\n",
    b"\\",
    b"e9",
    b"999",
    b"-",
    b".",
    b"=",
    b",",
    b"../",
    b"(",
    b"--",
)


def mutated(content: bytes, other: bytes, rng: Random) -> bytes:  # noqa: C901 - one kind of change a branch
    """``content`` with some bytes changed, put in, left out or doubled, or continued as ``other`` ends."""
    changed = bytearray(content)

    def junk(length: int) -> bytes:
        place = rng.randrange(len(other) + 1)
        # Pieces of a sound file get further than noise.
        return other[place : place + length] if rng.randrange(4) else rng.randbytes(length)

    for _ in range(rng.choice((1, 1, 1, 2, 4, 8))):
        place = rng.randrange(len(changed) + 1)
        length = rng.choice((1, 1, 2, 4, 8, 16, 64))
        match rng.randrange(8):
            case 0 if place < len(changed):
                changed[place] ^= 1 << rng.randrange(5)
            case 1:
                changed[place : place + length] = junk(length)
            case 2:
                changed[place:place] = junk(length)
            case 3:
                del changed[place : place + length]
            case 4:
                changed[place:place] = changed[place : place + length] * rng.choice((1, 2, 10, 100))
            case 5:
                special = rng.choice(_SPECIAL_BYTES if rng.randrange(4) == 0 else _SPECIAL_TEXTS)
                changed[place : place + len(special)] = special
            case 6:
                changed[place:] = other[rng.randrange(len(other) + 1) :]
            case 7 if not rng.randrange(8):
                del changed[place:]
    return bytes(changed)


@cache
def corpus(reader: str) -> tuple[Case, ...]:
    """Sound files for ``reader``."""
    return _CORPORA[reader]()


def _texts(name: str, *contents: str) -> list[Case]:
    return [Case(name, content.encode()) for content in contents]


def _latent_corpus() -> tuple[Case, ...]:
    buffer, old = io.BytesIO(), io.BytesIO()
    np.savez(
        buffer,
        latents=np.zeros((4, 8, 8), np.float32),
        original_size=np.array([64, 64]),
        crop_ltrb=np.array([0, 0, 64, 64]),
    )
    np.savez(old, np.ones((4, 8, 8), np.float32))
    facts = {
        "settings": {
            "bucket": [64, 64],
            "resized": [64, 64],
            "origin": [0, 0],
            "interpolation": "none",
            "vae": "x",
            "version": 1,
        },
        "source": {"size": 1, "mtime_ns": 1, "content": "x"},
        "original_size": [64, 64],
        "arrays": {"latents": [0, [4, 8, 8]], "latents_std": [1024, [4, 8, 8]]},
    }
    own = own_entry(bytes(2048), json.dumps(facts).encode())
    return tuple(Case("0.npz", content) for content in (buffer.getvalue(), old.getvalue(), own))


def _tensor_corpus() -> tuple[Case, ...]:
    header = {
        "a.lora_down.weight": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
        "a.alpha": {"dtype": "F16", "shape": [], "data_offsets": [16, 18]},
        "__metadata__": {"ss_network_dim": "2", "diffusers_config": '{"unet": {}}'},
    }
    return tuple(
        Case("x.safetensors", safetensors_file(json.dumps(one).encode(), bytes(size)))
        for one, size in (
            (header, 18),
            ({"emb_params": {"dtype": "F32", "shape": [1, 4], "data_offsets": [0, 16]}}, 16),
        )
    )


def _torch_corpus() -> tuple[Case, ...]:
    import torch

    found = []
    tensors = {"emb_params": torch.zeros(1, 4), "epoch": 3}
    for whole, new in (({"state_dict": tensors, "epoch": 1}, True), (tensors, True), (tensors, False)):
        buffer = io.BytesIO()
        torch.save(whole, buffer, _use_new_zipfile_serialization=new)
        found.append(Case("x.pt", buffer.getvalue()))
    return tuple(found)


_CORPORA: Mapping[str, Callable[[], Sequence[Case]]] = {
    "dataset file": lambda: (
        *_texts(
            "data.toml",
            "[general]\nshuffle_caption = true\n[[datasets]]\nresolution = [64, 64]\nbatch_size = 2\n"
            "enable_bucket = true\nmin_bucket_reso = 64\n  [[datasets.subsets]]\n  image_dir = 'images'\n"
            "  caption_extension = '.txt'\n  num_repeats = 2\n",
        ),
        *_texts(
            "data.json",
            '{"datasets": [{"resolution": 64, "subsets": [{"image_dir": "images", "caption_extension": ".txt"}]}]}',
        ),
    ),
    "option file": lambda: _texts(
        "options.toml",
        'learning_rate = 1e-4\n[a]\noptimizer_args = ["betas=0.9,0.99"]\nseed = 3\nresolution = "64,64"\n',
        '[wandb]\nname = "x"\n[tensorboard]\nflush_secs = 3\n',
    ),
    "metadata file": lambda: (
        *_texts(
            "meta.json", '{"0.png": {"caption": "a cat", "tags": "red, small", "train_resolution": [64, 64]}, "1": {}}'
        ),
        *_texts("meta.jsonl", '{"image_path": "0.png", "caption": "a"}\n{"image_path": "1.png", "tags": "b, c"}\n'),
    ),
    "prompt file": lambda: (
        *_texts("p.txt", "# one\na cat --n bad --w 512 --h 64 --d 1 --s 20 --l 7.5 --ss euler_a\n"),
        *_texts("p.toml", '[prompt]\nwidth = 512\n[[prompt.subset]]\nprompt = "a cat"\nseed = 3\n'),
        *_texts("p.json", '[{"prompt": "a cat", "scale": 7.5}, "a dog --w 64"]'),
    ),
    "caption": lambda: _texts(
        "0.txt", "a (red:1.3) cat, [small], {on|under} a \\(mat\\)\nand ((more)) |||tags;;;one, two"
    ),
    "arguments": lambda: _texts(
        "argument.txt", "betas=0.9,0.99", "weight_decay=1e-2", "x={'a': [1, (2, None)], 'b': True}"
    ),
    "safetensors": _tensor_corpus,
    "torch file": _torch_corpus,
    "latents": _latent_corpus,
    "image": sound_images,
    "info file": lambda: _texts(
        "metadata_cache.json", '{"images/0.png": {"caption": "a cat", "resolution": [64, 64]}}'
    ),
    "model config": lambda: _texts("text_encoder/config.json", json.dumps(TEXT_CONFIG)),
}
