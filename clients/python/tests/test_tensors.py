"""The codec, judged by the safetensors package and by ml_dtypes."""

from __future__ import annotations

import json
import struct
import tracemalloc
from collections.abc import Mapping

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy

from lifl_client import ModelCorrupt
from lifl_client.tensors import CHUNK, Array, Encoded, Model, decode


def encoded(tensors: Mapping[str, Array], dtype: str | None = None) -> bytearray:
    update = Encoded(tensors, dtype)
    file = bytearray(b"".join(update))
    assert len(file) == update.length
    return file


def judged(file: bytearray) -> dict[str, tuple[str, list[int], bytes]]:
    """What the reference reader makes of a file."""
    return {
        name: (view["dtype"], view["shape"], bytes(view["data"]))
        for name, view in safetensors.deserialize(bytes(file))  # type: ignore[no-untyped-call]
    }


MIXED: Model = {
    "flag": np.array([True, False, True]),
    "f32": np.arange(6, dtype=np.float32).reshape(2, 3),
    "f16": np.array([1.5, -2.0], np.float16),
    "i64": np.array([[1], [-(2**62)]]),
    "count": np.array(7, np.int64),
    "scale": np.array(0.25, np.float32),
    "u8": np.array([255], np.uint8),
    "none": np.zeros((0, 4), np.float32),
}


def test_round_trip_keeps_types_shapes_and_values() -> None:
    back = decode(encoded(MIXED))
    assert back.keys() == MIXED.keys()
    for name, array in MIXED.items():
        np.testing.assert_array_equal(back[name], array, strict=True)
        assert back[name].flags.writeable
        assert back[name].flags.aligned


def test_reference_reader_agrees() -> None:
    back = safetensors.numpy.load(bytes(encoded(MIXED)))
    for name, array in MIXED.items():
        np.testing.assert_array_equal(back[name], array, strict=True)


def test_every_tensor_is_aligned_to_its_own_size() -> None:
    file = encoded(MIXED)
    (length,) = struct.unpack_from("<Q", file)
    assert length % 8 == 0
    for name, entry in json.loads(file[8 : 8 + length]).items():
        assert entry["data_offsets"][0] % MIXED[name].itemsize == 0, name


def test_reads_the_reference_writer() -> None:
    file = bytearray(safetensors.numpy.save(dict(MIXED), metadata={"format": "pt"}))
    back = decode(file)
    assert back.keys() == MIXED.keys()
    for name, array in MIXED.items():
        np.testing.assert_array_equal(back[name], array, strict=True)


def test_dtype_converts_floats_alone() -> None:
    back = judged(encoded(MIXED, "f16"))
    assert {name: dtype for name, (dtype, _, _) in back.items()} == {
        "flag": "BOOL",
        "f32": "F16",
        "f16": "F16",
        "i64": "I64",
        "count": "I64",
        "scale": "F16",
        "u8": "U8",
        "none": "F16",
    }
    assert back["f32"][2] == np.arange(6).astype("<f2").tobytes()
    assert back["count"] == ("I64", [], struct.pack("<q", 7))


def test_bf16_rounds_as_ml_dtypes() -> None:
    random = np.random.default_rng(16)
    bits = random.integers(0, 2**32, 100_000, dtype=np.uint32)
    ties = np.array([0x3F808000, 0x3F818000, 0x7F7FFFFF, 0x00008000, 0xFF7FC000], np.uint32)
    special = np.array([0, -0.0, np.inf, -np.inf, np.nan], np.float32)
    values = np.concatenate([bits.view(np.float32), ties.view(np.float32), special])
    # A signalling NaN and an overflow to infinity are the point here.
    with np.errstate(all="ignore"):
        wanted = values.astype(ml_dtypes.bfloat16)
    ((dtype, shape, data),) = judged(encoded({"x": values}, "bf16")).values()
    assert (dtype, shape) == ("BF16", [len(values)])
    had = np.frombuffer(data, ml_dtypes.bfloat16)
    nan = np.isnan(values)
    np.testing.assert_array_equal(np.isnan(had), nan)
    np.testing.assert_array_equal(had[~nan].view(np.uint16), wanted[~nan].view(np.uint16))


def test_bf16_model_is_read_as_float32_and_sent_back_unchanged() -> None:
    values = np.array([[1.0, -3.140625], [0.0, 65536.0]], np.float32)
    narrow = values.astype(ml_dtypes.bfloat16)
    update = Encoded({"x": narrow, "s": narrow[0, 1].reshape(()), "n": np.array(3)})
    assert update.dtype == "bf16"
    file = bytearray(b"".join(update))
    assert judged(file)["x"] == ("BF16", [2, 2], narrow.tobytes())
    back = decode(file)
    np.testing.assert_array_equal(back["x"], values, strict=True)
    np.testing.assert_array_equal(back["s"], values[0, 1].reshape(()), strict=True)
    assert judged(encoded(back, "bf16")) == judged(file)


@pytest.mark.parametrize(
    ("tensors", "dtype", "said"),
    [
        ({"a": np.zeros(1, np.float32)}, None, "f32"),
        ({"a": np.zeros(1, np.float16), "n": np.array(1)}, None, "f16"),
        ({"a": np.zeros(1, np.float32), "b": np.zeros(1, np.float16)}, None, "mixed"),
        ({"a": np.zeros(1, np.float32), "b": np.zeros(1, np.float16)}, "bf16", "bf16"),
        ({"a": np.zeros(1, np.float64)}, "f32", "f32"),
    ],
)
def test_says_what_it_sends(tensors: Model, dtype: str | None, said: str) -> None:
    assert Encoded(tensors, dtype).dtype == said


def test_other_layouts_are_sent_in_row_order() -> None:
    base = np.arange(12, dtype=np.float32).reshape(3, 4)
    tensors = {
        "transposed": base.T,
        "strided": base[:, ::2],
        "big": base.astype(">f4"),
        "fortran": np.asfortranarray(base),
        "readonly": np.broadcast_to(np.float32(2), (2, 2)),
    }
    back = decode(encoded(tensors))
    for name, array in tensors.items():
        np.testing.assert_array_equal(back[name], array)


@pytest.mark.parametrize(
    ("tensors", "why"),
    [
        ({"a": np.zeros(2)}, "float64"),
        ({"a": np.zeros(2, np.complex64)}, "complex64"),
        ({"a": np.array(["x"])}, "<U1"),
        ({"a": [1.0]}, "not a numpy array"),
        ({"n": np.array(1)}, "float tensor"),
        ({}, "float tensor"),
    ],
)
def test_refuses_what_no_job_takes(tensors: Model, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        Encoded(tensors)


@pytest.mark.parametrize(("dtype", "size"), [(None, 4), ("f16", 2), ("bf16", 2)])
def test_large_tensors_are_not_copied_whole(dtype: str | None, size: int) -> None:
    update = Encoded({name: np.ones(4 << 20, np.float32) for name in "abc"}, dtype)
    tracemalloc.start()
    total = sum(len(piece) for piece in update)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert total == update.length > size * (12 << 20)
    # A chunk in several forms, where a tensor has 64 chunks or more.
    assert peak < 12 * CHUNK


def test_model_is_not_copied() -> None:
    file = encoded({"a": np.ones(4 << 20, np.float32)})
    tracemalloc.start()
    model = decode(file)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert model["a"].size == 4 << 20
    assert peak < 4 * CHUNK


def _file(header: object, data: bytes = b"", length: int | None = None) -> bytearray:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return bytearray(struct.pack("<Q", len(text) if length is None else length) + text + data)


def _entry(begin: int, end: int, shape: list[int], dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    "file",
    [
        bytearray(b"short"),
        _file({}, length=1 << 40),
        _file(b"not json"),
        _file([]),
        _file({"a": _entry(0, 4, [1])}),
        _file({"a": _entry(0, 4, [1])}, b"12345678"),
        _file({"a": _entry(0, 4, [2])}, b"1234"),
        _file({"a": _entry(4, 8, [1])}, b"12345678"),
        _file({"a": _entry(0, 4, [1]), "b": _entry(0, 4, [1])}, b"1234"),
        _file({"a": _entry(0, 4, [1], "F4")}, b"1234"),
        _file({"a": _entry(0, 4, [-1, -1])}, b"1234"),
        _file({"a": {"dtype": "F32"}}, b"1234"),
    ],
)
def test_damaged_files_are_refused(file: bytearray) -> None:
    with pytest.raises(ModelCorrupt):
        decode(file)


def test_unaligned_foreign_tensors_are_aligned() -> None:
    data = b"\x01" + struct.pack("<2f", 1.5, 2.5)
    file = _file({"flag": _entry(0, 1, [1], "BOOL"), "x": _entry(1, 9, [2])}, data)
    model = decode(file)
    assert model["x"].flags.aligned
    np.testing.assert_array_equal(model["x"], np.array([1.5, 2.5], np.float32), strict=True)
