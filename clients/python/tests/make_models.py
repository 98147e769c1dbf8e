"""Initial models of the live tests: `python tests/make_models.py DIR`.

Writes three.safetensors (job `three`) and resnet18.safetensors with the safetensors package itself,
so that the gateway meets the reference writer's order and padding. Deterministic.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from lifl_client.tensors import Model

STATE = Path(__file__).parent / "data" / "resnet18_state.json"


def three() -> Model:
    """A linear model of four inputs and three outputs."""
    return {"w": np.zeros((4, 3), np.float32), "b": np.zeros(3, np.float32)}


def resnet18() -> Model:
    """Every entry of a torchvision ResNet-18 state, as after some training.

    The batch counters differ from each other and from 0, so that a lost or averaged one shows.
    """
    random = np.random.default_rng(18)
    model: Model = {}
    for at, entry in enumerate(json.loads(STATE.read_text())):
        name, shape = entry["name"], tuple(entry["shape"])
        if entry["dtype"] == "I64":
            model[name] = np.array(1000 + at, np.int64)
        elif name.endswith("running_var"):
            model[name] = random.uniform(0.5, 1.5, shape).astype(np.float32)
        else:
            fan_in = math.prod(shape[1:]) or 1
            model[name] = (random.standard_normal(shape) * math.sqrt(2 / fan_in)).astype(np.float32)
    return model


def main(folder: Path) -> None:
    """Write both."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(three(), folder / "three.safetensors")
    save_file(resnet18(), folder / "resnet18.safetensors")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: make_models.py DIR")
    main(Path(sys.argv[1]))
