"""safetensors to and from numpy, without a second copy of the model.

Written by hand rather than with the safetensors package for two reasons: that package builds the
whole file in memory before the first byte leaves, and its numpy side knows no bf16.

    file = u64 LE header length | JSON {name: {dtype, shape, data_offsets}} | tensors, little-endian

bf16: numpy has no such type. Models in bf16 are read as float32 (exact), and `dtype="bf16"` sends
float32 rounded to nearest even. Arrays of `ml_dtypes.bfloat16` are taken as they are.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from lifl_client.errors import ModelCorrupt

Array = npt.NDArray[Any]
Model = dict[str, Array]

HEADER_LIMIT = 1 << 20
"""The gateway's own limit; a ResNet-18 header has 12 KB."""
CHUNK = 256 << 10
"""Bytes given to the HTTP stack at once, copied for it: the one copy of an unconverted tensor."""

# Wire name -> numpy type as which it is read. BF16 is apart.
READ = {
    "BOOL": "?",
    "U8": "u1",
    "I8": "i1",
    "U16": "<u2",
    "I16": "<i2",
    "U32": "<u4",
    "I32": "<i4",
    "U64": "<u8",
    "I64": "<i8",
    "F16": "<f2",
    "F32": "<f4",
    "F64": "<f8",
}
WIRE = {np.dtype(code).newbyteorder("="): name for name, code in READ.items()}
ALIGNMENT = {"BF16": 2} | {name: np.dtype(code).itemsize for name, code in READ.items()}
FLOATS = {"F16": "f16", "BF16": "bf16", "F32": "f32"}
DTYPES = {"f16": "F16", "bf16": "BF16", "f32": "F32"}


class Encoded:
    """Tensors as a safetensors file that is produced while it is sent, as often as it is sent.

    Borrows the arrays: they must not change until the update is acknowledged, or a repeated
    attempt would carry other content under the same id.
    """

    def __init__(self, tensors: Mapping[str, Array], dtype: str | None = None) -> None:
        """Lay the file out; `dtype` (f32, f16, bf16) converts float tensors, None keeps them."""
        if dtype not in (None, "mixed", *DTYPES):
            raise ValueError(f"dtype is f32, f16, bf16, mixed or None, not {dtype!r}")
        target = DTYPES.get(dtype or "")
        parts = [(name, array, _wire_type(name, array, target)) for name, array in tensors.items()]
        floats = {FLOATS[wire] for _, _, wire in parts if wire in FLOATS}
        if not floats:
            raise ValueError("an update needs at least one float tensor")
        # Wide types first: then every tensor is aligned to its own size without gaps,
        # which the format forbids.
        self._parts = sorted(parts, key=lambda part: -ALIGNMENT[part[2]])
        self.dtype = floats.pop() if len(floats) == 1 else "mixed"
        """What `fldtype` says."""
        self._header, data = self._layout()
        self.length = len(self._header) + data
        """Bytes of the whole file."""

    def _layout(self) -> tuple[bytes, int]:
        entries: dict[str, object] = {}
        end = 0
        for name, array, wire in self._parts:
            begin, end = end, end + array.size * ALIGNMENT[wire]
            entries[name] = {
                "dtype": wire,
                "shape": list(array.shape),
                "data_offsets": [begin, end],
            }
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        if len(text) > HEADER_LIMIT:
            raise ValueError(f"header of {len(text)} bytes is beyond the gateway's {HEADER_LIMIT}")
        return struct.pack("<Q", len(text)) + text, end

    def __iter__(self) -> Iterator[bytes]:
        """The file in pieces; converted piece by piece, so that f16 costs no second model."""
        yield self._header
        for _, array, wire in self._parts:
            flat = array.reshape(-1)
            step = CHUNK // ALIGNMENT[wire]
            for at in range(0, flat.size, step):
                yield _little_endian(flat[at : at + step], wire).tobytes()


def _wire_type(name: str, array: Array, target: str | None) -> str:
    """Wire type of a tensor; `target` applies to floats alone."""
    if not isinstance(array, np.ndarray | np.generic):
        raise ValueError(f"tensor {name!r} is {type(array).__name__}, not a numpy array")
    bf16 = array.dtype.name == "bfloat16"
    wire = "BF16" if bf16 else WIRE.get(array.dtype.newbyteorder("="))
    if wire is None:
        raise ValueError(f"tensor {name!r} is {array.dtype}, which safetensors does not hold")
    if wire not in FLOATS and wire != "F64":
        return wire
    if target is None and wire == "F64":
        # Halving someone's precision in silence is theirs to ask for.
        raise ValueError(f"tensor {name!r} is float64, which jobs do not take: pass dtype='f32'")
    return target or wire


def _little_endian(flat: Array, wire: str) -> Array:
    """Elements in wire form; the same memory wherever that serves."""
    if wire != "BF16":
        return flat.astype(READ[wire], copy=False)
    if flat.dtype.name == "bfloat16":
        return flat.view(np.uint16).astype("<u2", copy=False)
    return _to_bf16(flat.astype(np.float32, copy=False))


def _to_bf16(array: Array) -> Array:
    """Upper halves of float32, to nearest even; NaN stays NaN, too large becomes infinite."""
    bits = array.view(np.uint32)
    rounded = (bits >> 16) & 1
    rounded += 0x7FFF
    # Wraps for NaNs only, which are overwritten.
    rounded += bits
    rounded >>= 16
    half = rounded.astype("<u2")
    half[np.isnan(array)] = 0x7FC0
    return half


def decode(file: bytearray) -> Model:
    """Tensors of a safetensors file, in its header's order, as writable views of `file`.

    The arrays share `file`'s memory: one kept tensor keeps the whole model. Only bf16 and tensors
    that a foreign writer left unaligned are copied.
    """
    entries, base = _header(file)
    model: Model = {}
    spans: list[tuple[int, int]] = []
    for name, entry in entries.items():
        if name == "__metadata__":
            continue
        wire, shape, begin, end = _entry(name, entry)
        size = ALIGNMENT[wire]
        count = math.prod(shape)
        if end - begin != count * size or base + end > len(file):
            raise ModelCorrupt(f"tensor {name!r} does not fit its offsets [{begin}, {end}]")
        spans.append((begin, end))
        raw = np.frombuffer(file, READ.get(wire, "<u2"), count, base + begin) if count else None
        model[name] = _read(raw, wire).reshape(shape)
    at = 0
    for begin, end in sorted(spans):
        if begin != at:
            raise ModelCorrupt(f"tensors overlap or leave a gap at byte {at}")
        at = end
    if base + at != len(file):
        raise ModelCorrupt(f"{len(file) - base} bytes of data, {at} in the header")
    return model


def _header(file: bytearray) -> tuple[dict[str, Any], int]:
    if len(file) < 8:
        raise ModelCorrupt(f"{len(file)} bytes are no safetensors file")
    (length,) = struct.unpack_from("<Q", file)
    if length > HEADER_LIMIT or 8 + length > len(file):
        raise ModelCorrupt(f"header length {length} in a file of {len(file)} bytes")
    try:
        entries = json.loads(bytes(memoryview(file)[8 : 8 + length]))
    except ValueError as cause:
        raise ModelCorrupt(f"header is not JSON: {cause}") from cause
    if not isinstance(entries, dict):
        raise ModelCorrupt("header is not a JSON object")
    return entries, 8 + length


def _entry(name: str, entry: object) -> tuple[str, list[int], int, int]:
    match entry:
        case {
            "dtype": str(wire),
            "shape": list(shape),
            "data_offsets": [int(begin), int(end)],
        } if wire in ALIGNMENT and all(isinstance(n, int) and n >= 0 for n in shape):
            if 0 <= begin <= end:
                return wire, shape, begin, end
    raise ModelCorrupt(f"tensor {name!r} has an entry that cannot be read: {entry!r}")


def _read(raw: Array | None, wire: str) -> Array:
    if raw is None:
        return np.empty(0, np.float32 if wire == "BF16" else READ[wire])
    if wire == "BF16":
        wide = raw.astype(np.uint32)
        wide <<= 16
        return wide.view(np.float32)
    return raw if raw.flags.aligned else raw.copy()
