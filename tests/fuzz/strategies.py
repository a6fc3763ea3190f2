"""What files may look like that somebody wrote by mistake or on purpose: a strategy for each reader.

The files have the right structure, and wrong, huge, deep or misleading content.
"""

import io
import json
import math
import pickle
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from hypothesis import strategies as st
from PIL import Image

from library.data import cache_entry, schema
from tests.fuzz.readers import TEXT_CONFIG
from tests.fuzz.watch import Case

DEEP = 100_000

NASTY_TEXTS = (
    *(
        "",
        " ",
        "\0",
        "a\0b",
        "\n",
        "a\nwarning: all is well",
        "\x1b[2J\x1b[31mred",
        "\u202egnp.exe",
        "\ufeff",
        "\u2028",
    ),
    *("../../../etc/passwd", "/etc/passwd", "/", ".", "..", "~", "~nobody-of-this-name/x", "images/../images", "C:\\x"),
    *("images", "images/0.png", "0", "0.png", "a" * 300, "a/" * 3000, "<script>alert(1)</script>", "' \" ` $(x)"),
    *("{a|b}", "{" * 50, "((((a", "(a:1e9)", "a, b, c", "a|||b;;;c", "true", "nan", "1e999", "9" * 5000, "0x10"),
)
TEXTS = st.sampled_from(NASTY_TEXTS) | st.text(max_size=12)
NUMBERS = (
    st.sampled_from((0, 1, -1, 8, 64, 512, 2**31, 2**63, 2**64, 10**30, -(10**30), 0.5, 1e300, math.inf, math.nan))
    | st.integers(-10, 2000)
    | st.floats()
)
SCALARS = st.none() | st.booleans() | NUMBERS | TEXTS
_FLAT = SCALARS | st.lists(SCALARS, max_size=3) | st.dictionaries(TEXTS, SCALARS, max_size=2)
VALUES = _FLAT | st.lists(_FLAT, max_size=3) | st.dictionaries(TEXTS, _FLAT, max_size=2)


_ODDS = st.integers(0, 39)
"""Draws 0 where something is to go wrong: seldom, as a file with many mistakes shows little but the first."""


def _weighted(usual: st.SearchStrategy[Any], *rare: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """``usual`` most of the time."""
    seldom = st.one_of(*rare)
    return _ODDS.flatmap(lambda number: usual if number else seldom)


def _or_wrong(usual: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return _weighted(usual, VALUES)


def _named(name: str) -> Callable[[str | bytes], Case]:
    def case(content: str | bytes) -> Case:
        # JSON can write halves of characters, a file cannot.
        return Case(name, content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content)

    return case


# --- JSON and TOML


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


JSON_BOMBS = (
    *("[" * DEEP, '{"a":' * DEEP, "[" * 900 + "]" * 900, '{"a":' * 900 + "1" + "}" * 900, "9" * 100_000, "-" * 1000),
    *(
        '{"a": 1e999}',
        '{"a": NaN}',
        '{"a": "\\ud800"}',
        '{"a": "\\u0000"}',
        '{"a": 1, "a": 2}',
        "",
        " ",
        "\0",
        "\ufeff{}",
    ),
    *(
        "[" + "1," * DEEP + "1]",
        "{" + ",".join(f'"{n}": {n}' for n in range(5000)) + "}",
        '"' + "a" * DEEP,
        "nul",
        "{}",
    ),
)
TOML_BOMBS = (
    *("a = " + "[" * DEEP, "a = " + "{a = " * DEEP, "a." * DEEP + "a = 1", "[" + "a." * DEEP + "a]", "[[" * DEEP),
    *(
        "a = " + "[" * 300 + "]" * 300,
        "a = " + "9" * 5000,
        "a = 0x" + "f" * 50_000,
        "a = 1e999",
        "a = nan",
        'a = "\\u0000"',
    ),
    *(
        "a = 1\na = 2",
        'a = "\\ud800"',
        "",
        "\0",
        "\ufeffa = 1",
        'a = """' + "x\n" * DEEP,
        "a = 0000-00-00",
        "\n" * DEEP,
    ),
    *("\n".join(f"k{n} = {n}" for n in range(5000)), "a = [" + "1, " * DEEP + "]", "[a]\n" * 2, "[[a]]\n" * 5000),
    *("a = 'x\n", " = 1", "\r", "a = 1979-05-27T07:32:00.999999999999999999Z", "a" * DEEP + " = 1", "# " + "x" * DEEP),
)


HUGE_SETTINGS = (
    *("resolution = 1000000000000\nenable_bucket = true", "resolution = 64\nmax_bucket_reso = 9000000000000000000"),
    *("resolution = 64\nnum_repeats = 9000000000000000000", "resolution = 64\nbatch_size = 9000000000000000000"),
    *("resolution = 64\nbucket_reso_steps = 0", "train_batch_size = 9000000000000000000"),
)


def _toml_value(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return "nan" if math.isnan(value) else "inf" if value == math.inf else repr(value)
    if isinstance(value, int):
        return str(value)
    if isinstance(value, str):
        # What is left alone here makes the file invalid, which has to be refused, too.
        return json.dumps(value, ensure_ascii=len(value) % 2 == 0)
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{json.dumps(key)} = {_toml_value(inner)}" for key, inner in value.items()) + "}"
    return "[" + ", ".join(map(_toml_value, value)) + "]" if isinstance(value, list) else '""'


def _toml_lines(table: Mapping[str, object]) -> str:
    return "".join(
        f"{key if key.isidentifier() else json.dumps(key)} = {_toml_value(value)}\n" for key, value in table.items()
    )


KEYS = sorted(schema.KEYS)
_USUAL: Mapping[type, st.SearchStrategy[Any]] = {
    bool: st.booleans(),
    int: st.sampled_from((0, 1, 2, 8, 64, 128, 512)),
    str: st.sampled_from(("images", ",", ".txt", "0.png", "lanczos", "meta.json")),
}


_PATHS = st.sampled_from(("images", "images", "images", "images/0.txt", "nowhere"))
_BY_KIND: Mapping[schema.Kind, st.SearchStrategy[Any]] = {
    schema.BOOLEAN: st.booleans(),
    schema.TEXT: st.sampled_from(("", "a cat", "|||")),
    schema.PATH: _PATHS,
    schema.RATE: st.sampled_from((0, 0.5, 1)),
    schema.RESOLUTION: st.sampled_from((64, [64, 64], "64,128")),
    schema.RANGE: st.just([1.0, 2.0]),
    schema.INTERPOLATION: st.sampled_from(schema.RESIZE_INTERPOLATIONS),
    schema.EXTENSION: st.just(".txt"),
    schema.TABLE: st.just({"a": 1}),
}
_RIGHT = {name: _BY_KIND.get(key.kind, st.sampled_from((64, 8, 1, 2))) for name, key in schema.KEYS.items()}
_SCOPES: Mapping[str, list[str]] = {
    scope: sorted(name for name, key in schema.KEYS.items() if scope in key.scopes)
    for scope in ("general", "dataset", "subset")
}
_NAMES = {scope: st.sampled_from(names) for scope, names in _SCOPES.items()}
_COUNTS = st.integers(0, 3)
_LEAST: Mapping[str, dict[str, Any]] = {
    "general": {},
    "dataset": {"resolution": 64},
    "subset": {"image_dir": "images", "caption_extension": ".txt"},
}


def _section(draw: st.DrawFn, scope: str) -> Any:
    if draw(_ODDS) == 0:
        return draw(VALUES)
    table = dict(_LEAST[scope])
    for _ in range(draw(_COUNTS)):
        name = draw(TEXTS) if draw(_ODDS) == 0 else draw(_NAMES[scope])
        table[name] = draw(VALUES) if draw(_ODDS) < 3 else draw(_RIGHT.get(name, VALUES))
    return table


@st.composite
def dataset_tables(draw: st.DrawFn) -> dict[str, Any]:
    """General rules, data sets and subsets, most of their keys right."""
    table: dict[str, Any] = {"general": _section(draw, "general"), "datasets": []}
    for _ in range(draw(st.sampled_from((1, 1, 1, 2, 0)))):
        dataset = _section(draw, "dataset")
        if isinstance(dataset, dict):
            dataset["subsets"] = [_section(draw, "subset") for _ in range(draw(st.sampled_from((1, 1, 1, 2, 0))))]
        table["datasets"].append(dataset)
    return table


def _dataset_toml(table: dict[str, Any]) -> str:
    general = table["general"]
    text = "[general]\n" + _toml_lines(general) if isinstance(general, dict) else f"general = {_toml_value(general)}\n"
    for dataset in table["datasets"]:
        if not isinstance(dataset, dict):
            return text + f"datasets = {_toml_value(dataset)}\n"
        text += "[[datasets]]\n" + _toml_lines({k: v for k, v in dataset.items() if k != "subsets"})
        subsets = dataset.get("subsets")
        for subset in subsets if isinstance(subsets, list) else []:
            text += "[[datasets.subsets]]\n" + (
                _toml_lines(subset) if isinstance(subset, dict) else _toml_value(subset)
            )
    return text


DATASET_FILES = _weighted(
    dataset_tables().map(_dataset_toml).map(_named("data.toml")) | dataset_tables().map(_json).map(_named("data.json")),
    st.sampled_from(TOML_BOMBS).map(_named("data.toml")),
    st.sampled_from(JSON_BOMBS).map(_named("data.json")),
)

_ENTRY = st.fixed_dictionaries(
    {}, optional={
        "caption": _or_wrong(st.sampled_from(("a cat", "a\nb", "{x|y}", "(a:1.2)", *NASTY_TEXTS[2:8]))),
        "tags": _or_wrong(st.just("red, small")),
        "train_resolution": _or_wrong(st.just([64, 64])),
        "other": VALUES,
    },
)  # fmt: skip
_KEYS_OF_IMAGES = _weighted(st.sampled_from(("0", "1", "0.png", "1.png", "./0.png", "../images/1")), TEXTS)
_ENTRIES = st.dictionaries(_KEYS_OF_IMAGES, _or_wrong(_ENTRY), max_size=3)
_LINES = st.lists(st.tuples(_KEYS_OF_IMAGES, _or_wrong(_ENTRY)), max_size=3).map(
    lambda found: "\n".join(_json({"image_path": key, **one} if isinstance(one, dict) else one) for key, one in found)
)
METADATA_FILES = _weighted(
    _ENTRIES.map(_json).map(_named("meta.json")) | _LINES.map(_named("meta.jsonl")),
    VALUES.map(json.dumps).map(_named("meta.json")),
    st.sampled_from(JSON_BOMBS).map(_named("meta.json")) | st.sampled_from(JSON_BOMBS).map(_named("meta.jsonl")),
)
INFO_FILES = _weighted(
    st.dictionaries(
        TEXTS | st.just("images/0.png"), _or_wrong(st.fixed_dictionaries({"caption": TEXTS, "resolution": VALUES}))
    )
    .map(json.dumps)
    .map(_named("metadata_cache.json")),
    (VALUES.map(json.dumps) | st.sampled_from(JSON_BOMBS)).map(_named("metadata_cache.json")),
)


@cache
def _option_names() -> list[str]:
    from library.options import declarations
    from train_network import Options

    return sorted(declarations(Options))


_OPTION_VALUES = (
    SCALARS
    | st.lists(SCALARS, max_size=3)
    | st.sampled_from(("AdamW", "cosine", "fp16", "512,768", "a=1", "1e-4", 1, 1e-4, True))
)
_NUMBERS_GIVEN = st.sampled_from((1, 64, 512, 0.5, 1e-4, True, "512,768", "1e-4", "10%"))
_SECTIONS = st.lists(_weighted(st.sampled_from(("a", "b")), TEXTS), max_size=2, unique=True)


@st.composite
def option_files(draw: st.DrawFn) -> str:
    """Options, some of them in sections."""

    def table() -> str:
        found = {}
        for _ in range(draw(_COUNTS)):
            name = draw(TEXTS) if draw(_ODDS) == 0 else draw(st.sampled_from(_option_names()))
            found[name] = draw(_OPTION_VALUES) if draw(_ODDS) < 4 else draw(_NUMBERS_GIVEN)
        return _toml_lines(found)

    return table() + "".join(f"[{json.dumps(section)}]\n{table()}" for section in draw(_SECTIONS))


OPTION_FILES = _weighted(option_files(), st.sampled_from(TOML_BOMBS)).map(_named("options.toml"))

# --- prompts and captions

_SETTINGS: Mapping[str, st.SearchStrategy[Any]] = {
    "prompt": TEXTS,
    "negative_prompt": TEXTS,
    "width": st.sampled_from((64, 512, "512", 100)),
    "height": st.sampled_from((64, 512, "512", 100)),
    "sample_steps": st.integers(-1, 2000),
    "scale": st.floats(0, 20),
    "seed": st.sampled_from((0, 1, 2**63 - 1)),
    "sample_sampler": st.sampled_from(("ddim", "euler_a", "Euler")),
    "enum": VALUES,
}


@st.composite
def prompt_lines(draw: st.DrawFn) -> str:
    """A prompt with settings, one of them perhaps wrong."""
    line = draw(TEXTS) if draw(_ODDS) < 3 else "a (red:1.2) cat"
    for _ in range(draw(_COUNTS)):
        letters = draw(st.sampled_from(("w", "h", "n", "ss", "d", "s", "l", "g", "W")))
        value = {"n": "a bad picture", "ss": "euler_a", "s": "20", "l": "7.5", "d": "1"}.get(letters, "512")
        line += (
            f" --{draw(TEXTS) if draw(_ODDS) == 0 else letters} {draw(_TEXTS_OF_VALUES) if draw(_ODDS) == 0 else value}"
        )
    return line


@st.composite
def prompt_tables(draw: st.DrawFn) -> dict[str, Any]:
    """The settings of a prompt as a table."""
    table: dict[str, Any] = {"prompt": "a cat"}
    for _ in range(draw(_COUNTS)):
        name = draw(TEXTS) if draw(_ODDS) == 0 else draw(st.sampled_from(sorted(_SETTINGS)))
        table[name] = draw(VALUES) if draw(_ODDS) == 0 else draw(_SETTINGS.get(name, VALUES))
    return table


_TEXTS_OF_VALUES = TEXTS | NUMBERS.map(str)
PROMPT_LINES = prompt_lines()
_PROMPT_TABLES = prompt_tables()
PROMPT_BOMBS = ("a --" * 50_000, "a" * DEEP, "a --x" * 50_000, "--w 1\n" * 5000, "a --ss q\n" * 5000, "\r" * DEEP)
PROMPT_FILES = _weighted(
    st.lists(PROMPT_LINES, max_size=4).map("\n".join).map(_named("p.txt"))
    | st.lists(_PROMPT_TABLES | PROMPT_LINES, max_size=4).map(_json).map(_named("p.json"))
    | st.tuples(_PROMPT_TABLES, st.lists(_PROMPT_TABLES, max_size=3))
    .map(lambda found: "[prompt]\n" + _toml_lines(found[0])
         + "".join("[[prompt.subset]]\n" + _toml_lines(one) for one in found[1]))
    .map(_named("p.toml")),
    st.sampled_from(PROMPT_BOMBS).map(_named("p.txt")),
    (st.sampled_from(JSON_BOMBS) | VALUES.map(json.dumps)).map(_named("p.json")),
    st.sampled_from(TOML_BOMBS).map(_named("p.toml")),
)  # fmt: skip

CAPTION_BOMBS = (
    *("(" * 40_000, "(a" * 40_000, "[(a" * 40_000 + ")" * 40_000, "(a)" * 30_000, "\\(" * 40_000, "a," * 50_000),
    *(
        "{" * 50_000,
        "{a" * 40_000,
        "{a|" * 30_000,
        "{{" * 40_000,
        "{}" * 40_000,
        "{" + "a|" * 40_000 + "a}",
        "a\n" * 40_000,
    ),
    *("(a:" + "9" * 50_000 + ")", "x" * 100_000, "é" * 50_000, "," * 100_000, "|||" * 30_000, "a:1.2)" * 30_000),
    *("a" * 300_000, "\0", "\ufeffa", "\r" * 50_000, " " * 100_000, "👩‍👩‍👧" * 10_000, "\u0301" * 50_000),
)
_PIECES = st.sampled_from(
    (
        "(",
        ")",
        "[",
        "]",
        ":1.2)",
        ":",
        "\\",
        "{",
        "}",
        "{{",
        "}}",
        "|",
        ",",
        "a",
        " ",
        "\n",
        "|||",
        ";;;",
        "red",
        "👩",
        "\ue000",
    )
)
CAPTIONS = _weighted(st.lists(_PIECES, max_size=30).map("".join), TEXTS, st.sampled_from(CAPTION_BOMBS)).map(
    _named("0.txt")
)
ARGUMENTS = _weighted(
    st.tuples(st.sampled_from(("weight_decay", "betas", "x", "")), VALUES.map(repr) | TEXTS).map("=".join),
    st.sampled_from(
        (
            *("a=" + "-" * DEEP + "1", "a=" + "(" * DEEP, "a=" + "[" * 150 + "]" * 150, "a=" + "1+" * DEEP + "1j"),
            *("a=__import__('os').system('true')", "a=open('x','w')", "a=10**10", "a='x'*10**9", "a=" + "9" * DEEP),
            *("a=(lambda: 1)()", "a=f'{1}'"),
        )
    ),
).map(_named("argument.txt"))  # fmt: skip

# --- tensor files


def safetensors_file(header: bytes, data: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + data


_SIZES = st.sampled_from((0, 1, 2, 4, -1, 10**6, 2**40, 2**63))
_SHAPES = st.lists(_SIZES, max_size=3).map(tuple)
_TENSOR_NAMES = st.sampled_from(NASTY_TEXTS[1:16] + ("a.b", "c.d")) | st.sampled_from(
    (
        "emb_params",
        "a.lora_down.weight",
        "a.alpha",
        "model.diffusion_model.x",
        "cond_stage_model.transformer.y",
        "__metadata__",
    )
)


_KINDS = st.sampled_from((("F32", 4), ("F16", 2), ("I64", 8), ("BOOL", 1), ("F8_E4M3", 1), ("C64", 8), ("U16", 2)))
_METADATA = st.dictionaries(TEXTS, TEXTS, max_size=3)
_WRONG_FACTS = (
    st.lists(st.sampled_from((0, 1, 4, 2**31, 2**62, -1, 2**64, 1.5)), max_size=4)
    | VALUES
    | st.sampled_from(("F4", "F64"))
)


@st.composite
def safetensors_files(draw: st.DrawFn) -> bytes:
    """Mostly a header that is true, and then one thing wrong with it."""
    header: dict[str, Any] = {}
    end = 0
    for name in draw(st.lists(_TENSOR_NAMES, max_size=4, unique=True)):
        shape = draw(st.lists(st.integers(0, 3), max_size=3))
        kind, size = draw(_KINDS)
        start, end = end, end + math.prod(shape) * size
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [start, end]}
    header.pop("__metadata__", None)
    if draw(st.booleans()):
        header["__metadata__"] = draw(VALUES if draw(_ODDS) == 0 else _METADATA)
    if draw(_ODDS) < 8 and header:
        facts = header[draw(st.sampled_from(sorted(header)))]
        if isinstance(facts, dict):
            facts[draw(st.sampled_from(("dtype", "shape", "data_offsets", "x")))] = draw(_WRONG_FACTS)
    text = json.dumps(header)
    if draw(_ODDS) == 0:
        text = text.replace("}", draw(st.sampled_from((',"a":1}', "", "}}", ' "dtype": "F32"}'))), 1)
    data = bytes(draw(st.sampled_from((0, end + 1, max(end - 1, 0)))) if draw(_ODDS) == 0 else end)
    length = draw(st.sampled_from((0, 1, 2**63, 10**9, len(text) + 8))) if draw(_ODDS) == 0 else None
    return safetensors_file(text.encode("utf-8", "surrogatepass"), data, length)


SAFETENSORS = _weighted(
    safetensors_files(),
    st.sampled_from(JSON_BOMBS).map(lambda text: safetensors_file(text.encode(), b"")),
    st.sampled_from((b"", b"\0" * 7, b"\0" * 8, b"\xff" * 8, b"\xff" * 100)) | st.binary(max_size=40),
).map(_named("x.safetensors"))


@dataclass(frozen=True)
class Name:
    """A class or function in a pickle."""

    module: str
    name: str


@dataclass(frozen=True)
class Call:
    """A call in a pickle."""

    function: Name
    arguments: tuple[Any, ...]


@dataclass(frozen=True)
class _Stored:
    """The numbers of a tensor, which lie beside the pickle."""

    key: str
    count: int
    kind: str = "FloatStorage"


def pickled(value: Any) -> bytes:
    """A pickle of protocol 2 as torch writes them, which may call anything."""
    return b"\x80\x02" + _opcodes(value) + b"."


def _opcodes(value: Any) -> bytes:  # noqa: C901
    match value:
        case None | True | False:
            return {None: b"N", True: b"\x88", False: b"\x89"}[value]
        case int():
            digits = pickle.encode_long(value)
            return b"\x8a" + bytes([len(digits)]) + digits
        case float():
            return b"G" + struct.pack(">d", value)
        case str():
            text = value.encode("utf-8", "surrogatepass")
            return b"X" + struct.pack("<I", len(text)) + text
        case list():
            return b"](" + b"".join(map(_opcodes, value)) + b"e"
        case tuple():
            return b"(" + b"".join(map(_opcodes, value)) + b"t"
        case dict():
            return b"}(" + b"".join(_opcodes(key) + _opcodes(inner) for key, inner in value.items()) + b"u"
        case Name():
            return f"c{value.module}\n{value.name}\n".encode()
        case Call():
            return _opcodes(value.function) + _opcodes(value.arguments) + b"R"
        case _Stored():
            return _opcodes(("storage", Name("torch", value.kind), value.key, "cpu", value.count)) + b"Q"
    raise AssertionError(value)


def torch_file(
    content: Any, storages: Mapping[str, bytes], *, compressed: bool = False, twice: str | None = None
) -> bytes:
    """An archive as ``torch.save`` writes it, around the pickle of ``content``."""
    buffer = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED if compressed else 0) as archive:
        warnings.simplefilter("ignore")
        archive.writestr("x/data.pkl", content if isinstance(content, bytes) else pickled(content))
        archive.writestr("x/byteorder", "little")
        for key, numbers in storages.items():
            archive.writestr(f"x/data/{key}", numbers)
        archive.writestr("x/version", "3\n")
        if twice is not None:
            archive.writestr(twice, b"again")
    return buffer.getvalue()


def stored_tensor(key: str, count: int, shape: tuple[Any, ...], strides: tuple[Any, ...], offset: int = 0) -> Any:
    """A tensor over ``count`` numbers that lie under ``key``."""
    hooks = Call(Name("collections", "OrderedDict"), ())
    rebuild = Name("torch._utils", "_rebuild_tensor_v2")
    return Call(rebuild, (_Stored(key, count), offset, shape, strides, False, hooks))


EVIL_CALLS = (
    Call(Name("os", "system"), ("true",)),
    Call(Name("posix", "system"), ("true",)),
    Call(Name("subprocess", "Popen"), (["true"],)),
    Call(Name("builtins", "eval"), ("__import__('os').system('true')",)),
    Call(Name("builtins", "exec"), ("open('written', 'w')",)),
    Call(Name("builtins", "getattr"), (Name("os", "system"), "__call__")),
    Call(Name("builtins", "bytearray"), (10**13,)),
    Call(Name("torch", "zeros"), ((10**7, 10**7),)),
    Call(Name("torch", "Tensor"), (10**7, 10**7)),
    Call(Name("torch", "load"), ("/etc/passwd",)),
    Call(Name("torch.hub", "load_state_dict_from_url"), ("http://localhost/x",)),
    Call(
        Name("torch._utils", "_rebuild_meta_tensor_no_storage"),
        (Name("torch", "float32"), (10**6, 10**6), (1, 1), False),
    ),
    Call(Name("numpy", "load"), ("/etc/passwd",)),
    Call(Name("pathlib", "Path"), ("/etc/passwd",)),
    Name("pytorch_lightning.callbacks.model_checkpoint", "ModelCheckpoint"),
)


_TORCH_NAMES = _TENSOR_NAMES | st.sampled_from(("state_dict", "string_to_param", "epoch", "emb_params"))
_MEMBERS = st.sampled_from(("x/data.pkl", "x/data/0", "y/data.pkl", "../../up", "x/.format_version"))


@st.composite
def torch_files(draw: st.DrawFn) -> bytes:
    """Named tensors, most of them sound, in an archive that mostly is."""

    def now_and_then(wrong: st.SearchStrategy[Any], right: Any) -> Any:
        return draw(wrong) if draw(_ODDS) == 0 else right

    counts = [draw(st.integers(1, 4)) for _ in range(2)]
    storages = {str(number): bytes(4 * count) for number, count in enumerate(counts)}
    content: dict[str, Any] = {"emb_params": stored_tensor("0", counts[0], (1, counts[0]), (counts[0], 1))}
    for _ in range(draw(_COUNTS)):
        key = draw(st.integers(0, 1))
        count = now_and_then(_SIZES, counts[key])
        shape = now_and_then(_SHAPES, (count,))
        strides = now_and_then(_SHAPES, (1,) * len(shape))
        tensor = stored_tensor(now_and_then(TEXTS, str(key)), count, shape, strides, now_and_then(_SIZES, 0))
        wrong = draw(st.sampled_from(EVIL_CALLS)) if draw(_ODDS) < 3 else now_and_then(VALUES, tensor)
        content[draw(_TORCH_NAMES)] = now_and_then(st.just({"*": wrong}), wrong)
    if draw(st.booleans()):
        content.pop(draw(st.sampled_from(sorted(content))))
    whole = now_and_then(VALUES, content if draw(st.booleans()) else {"state_dict": content, "epoch": 1})
    made = torch_file(whole, storages, compressed=draw(_ODDS) == 0, twice=now_and_then(_MEMBERS, None))
    return bytes(now_and_then(st.binary(max_size=40) | st.just(pickled(whole)), made))


def _bomb(size: int) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data.pkl", pickled({"a": stored_tensor("0", size // 4, (size // 4,), (1,))}))
        archive.writestr("x/data/0", bytes(size))
    return buffer.getvalue()


TORCH_BOMBS = (
    _bomb(1 << 24),
    pickled([])[:-1] + b"]" * DEEP + b".",
    b"\x80\x02" + b"(" * DEEP + b"t" * DEEP + b".",
    b"\x80\x02" + b"]" + b"q\x00(h\x00h\x00e" * 30 + b".",
    torch_file({"a": stored_tensor("0", 1, (10**6, 10**6), (0, 0))}, {"0": b"1234"}),
    torch_file(b"\x80\x02" + b"}" * DEEP + b".", {}),
)
TORCH_FILES = _weighted(torch_files(), st.sampled_from(TORCH_BOMBS)).flatmap(
    lambda content: st.sampled_from(("x.pt", "x.ckpt", "x.bin", "x.pth")).map(lambda name: Case(name, content))
)

# --- latents


@st.composite
def latent_files(draw: st.DrawFn) -> bytes:
    """Arrays as a cache has them, one of them perhaps of a wrong kind or shape."""
    side = draw(st.integers(1, 9)) if draw(_ODDS) < 4 else 8
    arrays: dict[str, Any] = {
        "latents": np.zeros((4, side, side), np.float32),
        "original_size": np.array([8 * side, 8 * side]),
        "crop_ltrb": np.array([0, 0, 8 * side, 8 * side]),
    }
    kinds = st.sampled_from(("f4", "f8", "f2", "i8", "u1", "c8", "S3", "U3", "O", "M8[s]", "?"))
    shapes = st.lists(st.integers(0, 9), max_size=4)
    names = (*arrays, "latents_flipped", "alpha_mask", "arr_0", "cache_entry", "latents_std", "other")
    for name in draw(st.lists(st.sampled_from(names), max_size=2)) if draw(st.booleans()) else ():
        values = np.full(draw(shapes), draw(st.sampled_from((0, 1, 7))), dtype=object).astype(draw(kinds))
        arrays[name] = draw(st.sampled_from((values, np.array(draw(st.sampled_from((np.nan, np.inf, -1, 2**62, 0)))))))
    if draw(st.integers(0, 9)) == 0:
        arrays.pop(draw(st.sampled_from(sorted(arrays))))
    buffer = io.BytesIO()
    (np.savez_compressed if draw(st.integers(0, 4)) == 0 else np.savez)(buffer, **arrays)
    return buffer.getvalue()


@st.composite
def own_latent_files(draw: st.DrawFn) -> bytes:
    """Entries of our own kind, whose checksum is right whatever their description says."""
    facts: dict[str, Any] = {
        "settings": {
            "bucket": [8, 8],
            "resized": [8, 8],
            "origin": [0, 0],
            "interpolation": "none",
            "vae": "x",
            "version": 1,
        },
        "source": {"size": 1, "mtime_ns": 1, "content": "x"},
        "original_size": [8, 8],
        "arrays": {"latents": [0, [4, 1, 1]], "latents_std": [16, [4, 1, 1]]},
    }
    for _ in range(draw(st.integers(0, 2))):
        table = facts[draw(st.sampled_from(("settings", "source", "arrays")))] if draw(st.booleans()) else facts
        if isinstance(table, dict):
            wrong = (
                VALUES | st.tuples(NUMBERS, st.lists(NUMBERS, max_size=4)) | st.sampled_from(("latents", "alpha_mask"))
            )
            table[draw(st.sampled_from((*sorted(table), "alpha_mask", "latents_flipped")))] = draw(wrong)
    text = _weighted(st.just(json.dumps(facts)), st.sampled_from(JSON_BOMBS[:5]))
    return own_entry(bytes(draw(st.sampled_from((32, 64, 31, 0)))), draw(text).encode())


def own_entry(data: bytes, description: bytes) -> bytes:
    archive = data + description
    length = cache_entry._LENGTH_BYTES
    return archive + f"{cache_entry._checksum(archive)}{len(description):0{length}x}".encode() + cache_entry._MARK


def _large_latents() -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, latents=np.zeros((4, 5000, 5000), np.float32))
    return buffer.getvalue()


LATENTS = _weighted(latent_files(), own_latent_files(), st.binary(max_size=40)).map(_named("0.npz"))

# --- images

_SAVED = (
    *(("PNG", mode) for mode in ("RGB", "RGBA", "L", "P", "LA", "1", "I;16")),
    *(("JPEG", mode) for mode in ("RGB", "L", "CMYK")),
    *(("WEBP", "RGBA"), ("BMP", "RGB"), ("TIFF", "RGB"), ("TIFF", "L"), ("GIF", "P"), ("AVIF", "RGB")),
)
_SUFFIXES = {
    "PNG": ".png",
    "JPEG": ".jpg",
    "WEBP": ".webp",
    "BMP": ".bmp",
    "TIFF": ".tif",
    "GIF": ".png",
    "AVIF": ".avif",
}


@cache
def sound_images() -> tuple[Case, ...]:
    """A small image of each kind."""
    found = []
    for kind, mode in _SAVED:
        grey = Image.linear_gradient("L").resize((9, 7))
        image = (
            Image.fromarray(np.asarray(grey, np.uint16) * 256) if mode == "I;16" else grey.convert("RGB").convert(mode)
        )
        exif = Image.Exif()
        exif[0x0112] = 6
        buffer = io.BytesIO()
        image.save(buffer, kind, **({"exif": exif} if kind in ("PNG", "JPEG", "WEBP") else {}))
        found.append(Case("0" + _SUFFIXES[kind], buffer.getvalue()))
    return tuple(found)


def png(chunks: Sequence[tuple[bytes, bytes]]) -> bytes:
    """A PNG file of these chunks, with right check sums."""
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )


def png_head(width: int, height: int, depth: int = 8, colour: int = 2) -> tuple[bytes, bytes]:
    """The chunk that says how large an image is."""
    return b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)


_SIDES = st.sampled_from((0, 1, 64, 5000, 60_000, 2**31 - 1, 2**32 - 1))
_CHUNK_DATA = st.binary(max_size=30) | st.sampled_from(
    (b"", zlib.compress(bytes(2000)), b"x\0\0" + zlib.compress(bytes(1 << 22)), b"MM\0*\0\0\0\x08\0\1\1\x12")
)
_CHUNKS = st.lists(
    st.tuples(
        st.sampled_from(
            (b"iCCP", b"zTXt", b"iTXt", b"tEXt", b"eXIf", b"tRNS", b"PLTE", b"acTL", b"fcTL", b"fdAT", b"IDAT")
        ),
        _CHUNK_DATA,
    ),
    max_size=4,
)


@st.composite
def png_files(draw: st.DrawFn) -> bytes:
    """Chunks in some order, around pixels that may be others than the head says."""
    side = 9 if draw(_ODDS) > 3 else draw(_SIDES)
    depth, colour = (8, 2) if draw(_ODDS) > 3 else (draw(st.sampled_from((1, 2, 16, 3))), draw(st.integers(0, 7)))
    before, after = draw(_CHUNKS), draw(_CHUNKS)
    pixels = (b"IDAT", zlib.compress(bytes(9 * 28)))
    end = [(b"IEND", b"")] if draw(_ODDS) else []
    return png([png_head(side, 9, depth, colour), *before, pixels, *after, *end])


@st.composite
def patched_images(draw: st.DrawFn) -> Case:
    """Sound images with other numbers where their headers have some."""
    case = draw(st.sampled_from(sound_images()))
    content = bytearray(case.content)
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.integers(0, min(len(content), 200) - 1))
        patch = draw(
            st.sampled_from((b"\xff", b"\0", b"\xff\xff", b"\xff\xff\xff\x7f", b"\0\0\0\0", b"\x60\xea\0\0", b"%!PS"))
        )
        content[place : place + len(patch)] = patch
    suffix = draw(_weighted(st.just(case.name[1:]), st.sampled_from((".png", ".jpg", ".tif", ".webp"))))
    return Case("0" + suffix, bytes(content))


IMAGE_BOMBS = (
    png([png_head(60_000, 60_000), (b"IDAT", zlib.compress(bytes(1000))), (b"IEND", b"")]),
    png([png_head(2**31 - 1, 1), (b"IDAT", b""), (b"IEND", b"")]),
    b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(%pipe%true) (w) file\n",
    b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    b"P6 60000 60000 255\n",
    b"GIF89a\xff\xff\xff\xff\0\0\0,\0\0\0\0\xff\xff\xff\xff\0\x08\x01\0\0;",
    png([png_head(9, 9)] + [(b"tEXt", b"a\0b")] * 5000),
)
IMAGES = _weighted(
    patched_images() | png_files().map(_named("0.png")),
    st.sampled_from(IMAGE_BOMBS).map(_named("0.png")),
    st.sampled_from(sound_images()),
)

# --- model configurations

_CONFIG_KEYS = (
    *(*TEXT_CONFIG, "attn_implementation", "_attn_implementation", "auto_map", "text_config", "return_dict", "dtype"),
    *("quantization_config", "architectures", "model_type", "layers_per_block", "torch_dtype", "projection_dim"),
)


@st.composite
def model_configs(draw: st.DrawFn) -> str:
    """The small text encoder's configuration with something else in it."""
    config = {**TEXT_CONFIG, **draw(st.dictionaries(st.sampled_from(_CONFIG_KEYS), VALUES, max_size=2))}
    config.update(draw(st.dictionaries(st.sampled_from(("num_hidden_layers", "hidden_size")), NUMBERS, max_size=1)))
    return json.dumps(config)


MODEL_CONFIGS = _weighted(model_configs(), st.sampled_from(JSON_BOMBS)).map(_named("text_encoder/config.json"))

STRATEGIES: Mapping[str, st.SearchStrategy[Case]] = {
    "dataset file": DATASET_FILES,
    "option file": OPTION_FILES,
    "metadata file": METADATA_FILES,
    "prompt file": PROMPT_FILES,
    "caption": CAPTIONS,
    "arguments": ARGUMENTS,
    "safetensors": SAFETENSORS,
    "torch file": TORCH_FILES,
    "latents": LATENTS,
    "image": IMAGES,
    "info file": INFO_FILES,
    "model config": MODEL_CONFIGS,
}

BOMBS: Mapping[str, Sequence[Case]] = {
    "dataset file": [
        *map(_named("data.toml"), TOML_BOMBS),
        *map(_named("data.json"), JSON_BOMBS),
        *(_named("data.toml")(f"[[datasets]]\n{line}") for line in HUGE_SETTINGS),
    ],
    "option file": [*map(_named("options.toml"), (*TOML_BOMBS, *HUGE_SETTINGS))],
    "metadata file": [
        *map(_named("meta.json"), JSON_BOMBS),
        *map(_named("meta.jsonl"), JSON_BOMBS),
        Case("meta.json", json.dumps({f"{number}": number for number in range(50_000)}).encode()),
        Case("meta.json", json.dumps({"0": {"caption": "a" * (1 << 20)}}).encode()),
    ],
    "prompt file": [
        *map(_named("p.txt"), PROMPT_BOMBS),
        *map(_named("p.json"), JSON_BOMBS),
        *map(_named("p.toml"), TOML_BOMBS),
    ],
    "caption": [*map(_named("0.txt"), CAPTION_BOMBS)],
    "safetensors": [
        *(Case("x.safetensors", safetensors_file(text.encode(), b"")) for text in JSON_BOMBS),
        Case("x.safetensors", safetensors_file(b"{}", b"", 2**64 - 1)),
    ],
    "torch file": [*map(_named("x.pt"), TORCH_BOMBS)],
    "latents": [Case("0.npz", _large_latents()), Case("0.npz", own_entry(b"", ("[" * DEEP).encode()))],
    "image": [*map(_named("0.png"), IMAGE_BOMBS)],
    "info file": [*map(_named("metadata_cache.json"), JSON_BOMBS)],
    "model config": [*map(_named("text_encoder/config.json"), JSON_BOMBS)],
}
"""The worst for each reader."""
