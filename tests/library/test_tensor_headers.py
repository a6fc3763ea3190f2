import json
import math
import struct

import pytest
import torch
from safetensors.torch import save

from library.errors import UserError
from library.files import read_metadata, read_tensors
from library.tensor_headers import HeaderError, check_archive, check_tensors, safetensors_header


def file(tmp_path, header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def tensor(shape=(2,), start=0, end=None, dtype="F32"):
    end = start + 4 * math.prod(shape) if end is None else end
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


@pytest.mark.parametrize(
    ("header", "data", "length", "what"),
    [
        ({}, b"", 2**63, "longer than the file"),
        ({}, b"", 100_000_001, "longer than the file"),
        ({"a": tensor()}, bytes(4), None, "8 bytes, and the file has 4"),
        ({"a": tensor()}, bytes(12), None, "8 bytes, and the file has 12"),
        ({"a": tensor(), "b": tensor(start=4)}, bytes(12), None, "overlap"),
        ({"a": tensor(), "b": tensor(start=12)}, bytes(20), None, "gap"),
        ({"a": tensor((3,), end=8)}, bytes(8), None, "another size than its shape"),
        ({"a": tensor((2**40, 2**40), end=8)}, bytes(8), None, "another size than its shape"),
        ({"a": tensor((-2, -1), end=8)}, bytes(8), None, "no shape"),
        ({"a": tensor((2**62, 0), end=0)}, b"", None, "no shape"),
        ({"a": tensor((1,) * 20, end=4)}, bytes(4), None, "no shape"),
        ({"a": tensor(dtype="F4")}, bytes(8), None, "no dtype"),
        ({"a": [1, 2]}, b"", None, "no dtype"),
        ({"a": {**tensor(), "data_offsets": [0, True]}}, bytes(8), None, "no place"),
        ({"__metadata__": {"a": 1}}, b"", None, "no table of texts"),
        (b'{"a": 1, "a": 2}', b"", None, "twice"),
        (b"[" * 100_000, b"", None, "nested too deeply"),
        (b"[]", b"", None, "no table"),
    ],
)
def test_a_header_that_lies(tmp_path, header, data, length, what):
    path = file(tmp_path, header, data, length)
    with pytest.raises(HeaderError, match=what):
        safetensors_header(path)
    for read in (read_metadata, read_tensors):
        with pytest.raises(UserError, match="not a readable safetensors file"):
            read(path)


def test_the_library_and_the_check_agree(tmp_path):
    """Whatever is written by the format's own library passes, every dtype among it."""
    kinds = ("bool", "uint8", "int8", "int16", "int32", "int64", "float16", "bfloat16", "float32", "float64")
    tensors = {kind: torch.zeros(3, 2, dtype=getattr(torch, kind)) for kind in kinds} | {"empty": torch.zeros(0, 4)}
    (tmp_path / "x.safetensors").write_bytes(save(tensors, metadata={"a": "b"}))
    assert safetensors_header(tmp_path / "x.safetensors").keys() == {*tensors, "__metadata__"}
    assert read_tensors(tmp_path / "x.safetensors").tensors.keys() == tensors.keys()


def test_an_archive_that_grows(tmp_path):
    import zipfile

    with zipfile.ZipFile(tmp_path / "x.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data.pkl", bytes(1 << 20))
    with pytest.raises(HeaderError, match="grows"):
        check_archive(tmp_path / "x.pt")
    torch.save({"a": torch.zeros(100)}, tmp_path / "y.pt")
    check_archive(tmp_path / "y.pt")
    (tmp_path / "z.pt").write_bytes(b"no archive")
    check_archive(tmp_path / "z.pt")


@pytest.mark.parametrize(
    ("made", "what"),
    [
        (torch.zeros(1).expand(10**6, 10**6), "larger than what the file holds"),
        (torch.zeros(2, 2).to_sparse(), "no plain array"),
        (torch.zeros(2, device="meta"), "no plain array"),
    ],
)
def test_tensors_that_are_larger_than_their_file(made, what):
    with pytest.raises(HeaderError, match=what):
        check_tensors({"a": made}, 1000)


def test_tied_weights_are_no_bomb():
    shared = torch.zeros(100)
    check_tensors({"a": shared, "b": shared, "c": shared[10:20]}, 500)
    with pytest.raises(HeaderError):
        check_tensors({str(number): shared for number in range(100)}, 500)
