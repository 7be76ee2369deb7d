"""Base-model traffic: plain vLLM, and vLLM with more and more of hotgraft, in turns.

Run in vLLM's environment, from any folder but the repository's root:

    python .../bench/serving/overhead.py --out .../bench/serving/results/DATE-traffic.jsonl

| variant | |
|---|---|
| plain | vLLM, and no plugin is loaded; in a process of its own |
| installed | the same with hotgraft's plugin, as wherever it is installed |
| live | plain vLLM whose weights are live, packed as hotgraft's worker packs them on a CPU |
| idle | hotgraft's scheduler and worker, no skill is loaded |
| loaded | the same with eight skills loaded |
"""

from __future__ import annotations

import argparse
import functools
import multiprocessing
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import lab
import torch
from torch.nn import functional

SKILLS = 8
DENSITY = 1e-3
PROMPT = 16
DECODES = 8
PREFILL = 128
BATCHES = (1, 16)
LIVE = {"worker_extension_cls": "hotgraft.serve.vllm.worker.Grafts"}
LAYERS = ((1280, 768), (768, 768), (6144, 768), (768, 3072))
HEAD = (8192, 768)
ROWS = (1, 2, 4, 16, 64, 256)
MANY = 16
Round = dict[str, list[float]]


def main() -> None:
    """Measure, print medians, and append rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    given = parser.parse_args()
    lab.append(given.out, [lab.environment()])
    for dtype in given.dtypes:
        lab.append(given.out, kernels(dtype))
    for dtype in given.dtypes:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            base = lab.checkpoint(folder / "base", dtype)
            for i in range(SKILLS):
                lab.skill(base, DENSITY).save(folder / f"s{i}.graft.safetensors")
            lab.append(given.out, measure(folder, dtype, given.rounds))


def measure(folder: Path, dtype: str, rounds: int) -> list[dict[str, Any]]:
    """Rounds of all variants, each variant's place in a round another each time."""
    variants = start(folder, dtype)
    samples: dict[str, list[Round]] = {name: [] for name in variants}
    for number in range(-1, rounds):
        names = [*variants]
        at = number % len(names)
        for name in names[at:] + names[:at]:
            found = variants[name](number)
            if number >= 0:
                samples[name].append(found)
    for what in samples["plain"][0]:
        medians = {n: [statistics.median(each[what]) for each in s] for n, s in samples.items()}
        print(f"{dtype} {what}:", report(medians, "plain"))
        print(f"{dtype} {what}:", report(medians, "live"))
    return [
        {"case": "base traffic", "dtype": dtype, "variant": name, "round": i, "samples_ms": found}
        for name, all_rounds in samples.items()
        for i, found in enumerate(all_rounds)
    ]


def report(samples: dict[str, list[float]], beside: str) -> str:
    """Medians, and the medians of the ratios to one of them."""
    found = []
    for name, values in samples.items():
        ratio = statistics.median(a / b for a, b in zip(values, samples[beside], strict=True))
        found.append(f"{name} {statistics.median(values):.3f} ms ({ratio:.3f})")
    return ", ".join(found) + f"; ratios to {beside}"


def start(folder: Path, dtype: str) -> dict[str, Callable[[int], Round]]:
    """For each variant what runs a round of it."""
    import vllm.model_executor.layers.utils as layers
    from hotgraft.serve.vllm.live import pack, packed_layers

    os.environ["VLLM_PLUGINS"] = ""
    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    child = multiprocessing.get_context("spawn").Process(
        target=_plain, args=(folder, dtype, theirs), daemon=True
    )
    child.start()
    del os.environ["VLLM_PLUGINS"]
    assert ours.recv() == "ready"

    def plain(number: int) -> Round:
        ours.send(number)
        found: Round = ours.recv()
        return found

    dispatch = layers.dispatch_cpu_unquantized_gemm
    engines = {"installed": lab.Engine(folder / "base", dtype=dtype)}
    assert packed_layers(engines["installed"].worker.get_model())
    for name, options in (("live", LIVE), ("idle", lab.OURS), ("loaded", lab.OURS)):
        engines[name] = lab.Engine(folder / "base", dtype=dtype, **options)
    pack(engines["live"].worker.get_model())  # the others have done so
    for name in ("live", "idle", "loaded"):
        assert not packed_layers(engines[name].worker.get_model())
    layers.dispatch_cpu_unquantized_gemm = dispatch  # for the next data type
    lab.load(engines["loaded"], folder)
    rounds = {name: functools.partial(one_round, engine) for name, engine in engines.items()}
    return {"plain": plain, **rounds}


def _plain(folder: Path, dtype: str, pipe: Connection) -> None:
    from vllm.distributed.weight_transfer import WeightTransferEngineFactory as Factory

    engine = lab.Engine(folder / "base", dtype=dtype)
    assert "hotgraft" not in Factory._registry
    pipe.send("ready")
    while True:
        pipe.send(one_round(engine, pipe.recv()))


def one_round(engine: lab.Engine, number: int) -> Round:
    """A prefill, and decode steps of a few batches; ms each. Every variant gets the same."""
    rng = random.Random(number)
    time.sleep(0.01)  # another engine's threads may still spin
    found: Round = {}
    plan: Any = engine.scheduler.schedule
    planning: list[float] = []
    engine.scheduler.schedule = lab.timing(plan, planning)
    for batch in BATCHES:
        for i in range(batch):
            engine.add(f"{batch}-{i}", lab.tokens(rng, PROMPT), DECODES + 1)
        steps = steps_of(engine)[1:]  # the first is the prefill
        assert len(steps) == DECODES, len(steps)
        found[f"decode, batch {batch}"] = steps
        found[f"schedule, batch {batch}"] = [1e3 * s for s in planning[-DECODES:]]
    engine.scheduler.schedule = plan
    engine.add("prefill", lab.tokens(rng, PREFILL), 1)
    found[f"prefill of {PREFILL}"] = steps_of(engine)
    return found


def steps_of(engine: lab.Engine) -> list[float]:
    """The steps until all is done, in ms."""
    found = []
    while engine.engine.has_unfinished_requests():
        found.append(1e3 * engine.step()[0])
    return found


def kernels(dtype: str) -> list[dict[str, Any]]:
    """The floor: all linears of the model by themselves, in turns."""
    from hotgraft.serve.vllm.live import Packed
    from vllm import _custom_ops as ops
    from vllm.platforms import current_platform

    current_platform.import_kernels()
    weights = [(torch.randn(s) * 0.02).to(getattr(torch, dtype)) for s in (*LAYERS * 12, HEAD)]
    packed = [ops.create_onednn_mm(weight.t(), 32) for weight in weights]
    live = [(Packed(weight), weight) for weight in weights]
    rows = []
    for count in ROWS:
        x = {k: torch.randn(count, k).to(weights[0].dtype) for k in (768, 3072)}
        ways: dict[str, Callable[[], object]] = {
            "packed": lambda x=x: [ops.onednn_mm(p, x[p.k], None) for p in packed],
            "torch": lambda x=x: [functional.linear(x[w.shape[1]], w) for w in weights],
            "live": lambda x=x: [p(x[w.shape[1]], w, None) for p, w in live],
        }
        samples: dict[str, list[float]] = {name: [] for name in ways}
        for number in range(-1, 9 if count <= MANY else 3):
            for name, way in ways.items():
                begin = time.perf_counter()
                way()
                if number >= 0:
                    samples[name].append(1e3 * (time.perf_counter() - begin))
        rows.append({"case": "linears", "dtype": dtype, "rows": count, "samples_ms": samples})
        print(f"{dtype} linears, {count} rows:", report(samples, "packed"))
    return rows


if __name__ == "__main__":
    main()
