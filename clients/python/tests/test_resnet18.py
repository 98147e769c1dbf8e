"""The ResNet-18 key set as data: complete, and through our codec unharmed."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from make_models import STATE, main, resnet18, three
from safetensors.numpy import load_file

from lifl_client.tensors import Encoded, decode


def test_is_torchvisions_resnet18() -> None:
    entries = json.loads(STATE.read_text())
    names = [entry["name"] for entry in entries]
    assert len(entries) == len(set(names)) == 122
    buffers = ("running_mean", "running_var", "num_batches_tracked")
    parameters = [entry for entry in entries if not entry["name"].endswith(buffers)]
    assert len(parameters) == 62
    assert sum(math.prod(entry["shape"]) for entry in parameters) == 11_689_512
    counters = [entry for entry in entries if entry["name"].endswith("num_batches_tracked")]
    assert [(c["shape"], c["dtype"]) for c in counters] == [([], "I64")] * 20
    assert {entry["dtype"] for entry in entries} == {"F32", "I64"}
    assert [name for name in names if "downsample.0" in name] == [
        f"layer{n}.0.downsample.0.weight" for n in (2, 3, 4)
    ]


@pytest.mark.parametrize("dtype", ["f32", "f16"])
def test_encodes(dtype: str) -> None:
    state = resnet18()
    update = Encoded(state, dtype)
    file = bytearray(b"".join(update))
    assert len(file) == update.length
    assert update.dtype == dtype
    back = decode(file)
    assert back.keys() == state.keys()
    for name, array in state.items():
        wanted = array.astype(np.float16) if dtype == "f16" and array.dtype.kind == "f" else array
        assert back[name].dtype == wanted.dtype
        np.testing.assert_array_equal(back[name], wanted, err_msg=name)


def test_make_models_writes_what_the_live_tests_expect(tmp_path: Path) -> None:
    main(tmp_path)
    for stem, model in (("three", three()), ("resnet18", resnet18())):
        written = load_file(tmp_path / f"{stem}.safetensors")
        assert written.keys() == model.keys()
        for name, array in model.items():
            np.testing.assert_array_equal(written[name], array, strict=True)
