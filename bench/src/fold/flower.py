"""Flower's side of the bench `fold`: answers each line on stdin with one line of JSON on stdout.

Arguments: directory with the updates `0.f32`, `1.f32`, ... and `shapes.json`; their number. The weight of update k is k + 1.
Commands: `inplace` and `aggregate`. Both take serialised Parameters, as they come from the wire, to a model in memory; what it
takes to serialise that model is reported apart.
"""

import json
import os
import sys
import time

for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[name] = "1"

import flwr
import numpy as np
from flwr.common import Code, FitRes, Status, ndarrays_to_parameters, parameters_to_ndarrays
from flwr.server.strategy.aggregate import aggregate, aggregate_inplace


def inplace(results):
    return aggregate_inplace([(None, result) for result in results])


def copying(results):
    return aggregate([(parameters_to_ndarrays(result.parameters), result.num_examples) for result in results])


def load(folder, clients):
    with open(f"{folder}/shapes.json") as file:
        shapes = json.load(file)
    bounds = np.cumsum([int(np.prod(shape)) for shape in shapes])[:-1]
    results = []
    for client in range(clients):
        flat = np.fromfile(f"{folder}/{client}.f32", dtype="<f4")
        layers = [layer.reshape(shape) for layer, shape in zip(np.split(flat, bounds), shapes, strict=True)]
        results.append(FitRes(Status(Code.OK, ""), ndarrays_to_parameters(layers), client + 1, {}))
    return results


def answer(**values):
    print(json.dumps(values), flush=True)


def main():
    folder, clients = sys.argv[1], int(sys.argv[2])
    results = load(folder, clients)
    answer(flwr=flwr.__version__, numpy=np.__version__)
    for line in sys.stdin:
        run = {"inplace": inplace, "aggregate": copying}[line.strip()]
        wall, cpu = time.perf_counter(), time.process_time()
        model = run(results)
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        out = time.process_time()
        ndarrays_to_parameters(model)
        out = time.process_time() - out
        np.concatenate([layer.ravel() for layer in model]).astype("<f4").tofile(f"{folder}/model.f32")
        answer(cpu=cpu, wall=wall, serialise=out)


main()
