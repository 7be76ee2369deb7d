"""Base-model traffic: plain vLLM, and vLLM with more and more of hotgraft, in turns.

Run in vLLM's environment, from any folder but the repository's root:

    python .../bench/serving/overhead.py --out .../bench/serving/results/DATE-overhead.jsonl

| variant | |
|---|---|
| plain | vLLM, and no plugin is loaded; in a process of its own |
| installed | the same with hotgraft's plugin, as wherever it is installed; in one of its own, too |
| live | plain vLLM whose weights are live, packed as hotgraft's worker packs them on a CPU |
| idle | hotgraft's scheduler and worker, no skill is loaded |
| loaded | the same with eight skills loaded |
"""

from __future__ import annotations

import argparse
import contextlib
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
CASES = {
    "decode, batch 1": (1, 16, 11),
    "decode, batch 16": (16, 16, 11),
    "prefill of 128": (1, 128, 1),
}
"""Requests, tokens of a prompt, steps: a prefill and decodes."""
LIVE = {"worker_extension_cls": "hotgraft.serve.vllm.worker.Grafts"}
LAYERS = ((1280, 768), (768, 768), (6144, 768), (768, 3072))
HEAD = (8192, 768)
ROWS = (1, 2, 4, 16, 128)
MANY = 16
Variant = tuple[Callable[..., None], Callable[[], tuple[float, float]]]


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
    """The same requests for all variants, which take turns after each step."""
    variants = start(folder, dtype)
    samples: dict[str, dict[str, list[float]]] = {}
    for number in range(-1, rounds):  # the first are slower
        for what, (batch, prompt, steps) in CASES.items():
            for ask, _ in variants.values():
                ask(number, batch, prompt, steps)
            for at in range(steps):
                names = [*variants]
                turn = (number + at) % len(names)
                for name in names[turn:] + names[:turn]:
                    times = variants[name][1]()
                    if number >= 0 and (at > 0 or steps == 1):  # not the decodes' own prefill
                        for kind, ms in zip((what, f"scheduling, {what}"), times, strict=True):
                            samples.setdefault(kind, {}).setdefault(name, []).append(ms)
    for what, found in samples.items():
        ordered = {name: found[name] for name in variants}
        print(f"{dtype} {what}:", report(ordered, "plain"))
        print(f"{dtype} {what}:", report(ordered, "live"))
    return [
        {"case": "base traffic", "dtype": dtype, "step": what, "variant": name, "samples_ms": found}
        for what, all_found in samples.items()
        for name, found in all_found.items()
    ]


def report(samples: dict[str, list[float]], beside: str) -> str:
    """Medians, and the medians of the ratios to one of them."""
    found = []
    for name, values in samples.items():
        ratio = statistics.median(a / b for a, b in zip(values, samples[beside], strict=True))
        found.append(f"{name} {statistics.median(values):.3f} ms ({ratio:.3f})")
    return ", ".join(found) + f"; ratios to {beside}"


def start(folder: Path, dtype: str) -> dict[str, Variant]:
    """For each variant how it is asked, and how it makes a step."""
    from hotgraft.serve.vllm.live import keep_weights_live, pack, packed_layers
    from vllm.model_executor.layers import utils

    os.environ["VLLM_PLUGINS"] = ""
    plain = apart(folder, dtype, plugin=False)
    del os.environ["VLLM_PLUGINS"]
    installed = apart(folder, dtype, plugin=True)
    dispatch = utils.dispatch_cpu_unquantized_gemm
    keep_weights_live()
    engines = {}
    for name, options in (("live", LIVE), ("idle", lab.OURS), ("loaded", lab.OURS)):
        engines[name] = lab.Engine(folder / "base", dtype=dtype, **options)
    utils.dispatch_cpu_unquantized_gemm = dispatch  # for the next data type
    pack(engines["live"].worker.get_model())  # the others have done so
    for name in ("live", "idle", "loaded"):
        assert not packed_layers(engines[name].worker.get_model())
    lab.load(engines["loaded"], folder)
    ours = {name: variant(engine) for name, engine in engines.items()}
    return {"plain": plain, "installed": installed, **ours}


def variant(engine: lab.Engine) -> Variant:
    """How an engine is asked for so many answers, and makes a step: in ms, and its planning's."""
    planning: list[float] = []
    engine.scheduler.schedule = lab.timing(engine.scheduler.schedule, planning)

    def ask(number: int, batch: int, prompt: int, tokens: int) -> None:
        assert not engine.engine.has_unfinished_requests()
        rng = random.Random(number)
        for i in range(batch):
            engine.add(f"{number}-{i}", lab.tokens(rng, prompt), tokens)

    def step() -> tuple[float, float]:
        return 1e3 * engine.step()[0], 1e3 * planning[-1]

    return ask, step


def apart(folder: Path, dtype: str, *, plugin: bool) -> Variant:
    """vLLM's own engine in a process of its own, with its plugins as the environment has them."""
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    args = (folder, dtype, plugin, theirs)
    spawn.Process(target=_serve, args=args, daemon=True).start()
    assert ours.recv() == "ready"

    def call(*command: Any) -> Any:
        ours.send(command)
        return ours.recv()

    return functools.partial(call, "ask"), functools.partial(call, "step")


def _serve(folder: Path, dtype: str, plugin: bool, pipe: Connection) -> None:
    from vllm.distributed.weight_transfer import WeightTransferEngineFactory as Factory

    ask, step = variant(lab.Engine(folder / "base", dtype=dtype))
    assert ("hotgraft" in Factory._registry) is plugin
    pipe.send("ready")
    with contextlib.suppress(EOFError):  # until the other end is closed
        while True:
            what, *args = pipe.recv()
            pipe.send({"ask": ask, "step": step}[what](*args))


def kernels(dtype: str) -> list[dict[str, Any]]:
    """The floor: all linears of the model by themselves, in turns."""
    from hotgraft.serve.vllm.live import Packed
    from vllm import _custom_ops as ops
    from vllm.platforms import current_platform

    current_platform.import_kernels()
    weights = [(torch.randn(s) * 0.02).to(getattr(torch, dtype)) for s in (*LAYERS * 12, HEAD)]
    packed = [ops.create_onednn_mm(weight.t(), 32) for weight in weights]
    live = [(Packed.of(weight), weight) for weight in weights]
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
