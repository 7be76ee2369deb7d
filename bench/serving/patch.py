"""A patch for a served model: hotgraft and vLLM's own sparse loader, on the same worker.

Run in vLLM's environment, from any folder but the repository's root:

    python .../bench/serving/patch.py --out .../bench/serving/results/DATE-patch.jsonl

Both change the same entries of the linear layers, in turns, and both are checked: after each, the
weights must be those of the checkpoint that the patch was made from. From size to size the models
grow tenfold, so that each has a patch of a hundred thousand entries.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hotgraft
import lab
import torch
from vllm import SamplingParams
from vllm.model_executor.model_loader.checkpoint_weight_patch import (
    CheckpointWeightPatch,
    load_checkpoint_weight_patches,
)

TOKENS = 32
MODELS = {
    "small": {
        "hidden_size": 256,
        "intermediate_size": 1024,
        "num_hidden_layers": 11,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
    },
    "middle": {},
    "large": {
        "hidden_size": 1536,
        "intermediate_size": 6144,
        "num_hidden_layers": 30,
        "num_attention_heads": 24,
        "num_key_value_heads": 8,
    },
}
"""How each differs from the lab's."""


def main() -> None:
    """Measure, and append rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", choices=MODELS, default="middle")
    parser.add_argument("--rounds", type=int, default=30)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        base = lab.checkpoint(folder / "base", **MODELS[given.model])
        llm = lab.Engine(
            folder / "base",
            dtype="bfloat16",
            max_model_len=256,
            worker_extension_cls="hotgraft.serve.vllm.worker.Grafts",
        ).llm
        rows = [measure(llm, base, folder, density, given.rounds) for density in (1e-4, 1e-3, 1e-2)]
    decode = {
        "case": "decode",
        "samples_ms": decode_steps(llm),
        "parameters": lab.parameters(base),
    }
    lab.append(given.out, [lab.environment(), *rows, decode])


def measure(llm: Any, base: lab.State, folder: Path, density: float, rounds: int) -> dict[str, Any]:
    """Each way there and back, in turns."""
    graft = lab.skill(base, density)
    path = folder / f"{density}.graft.safetensors"
    graft.save(path)
    ranks: dict[str, list[float]] = {}

    def inside(model: torch.nn.Module) -> dict[str, list[float]]:
        from hotgraft.serve.vllm.worker import rank_of

        rank = rank_of(model, llm.llm_engine.vllm_config)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        there, back = patches(graft, base, "new"), patches(graft, base, "old")
        samples = ranks
        for _ in range(rounds):
            timed(samples, "vllm", lambda: load_checkpoint_weight_patches(model, there))
            live = {name: p.detach().clone() for name, p in model.named_parameters()}
            timed(samples, "vllm", lambda: load_checkpoint_weight_patches(model, back))
            check(model, before)
            timed(samples, "load", lambda: load(rank, path))
            timed(samples, "switch", lambda: rank.host.activate("patch"))
            check(model, live)
            timed(samples, "switch", rank.host.deactivate)
            check(model, before)
            rank.host.unload("patch")
        return samples

    samples = llm.apply_model(inside)[0]
    return {
        "case": "patch",
        "density": density,
        "entries": graft.nnz,
        "tensors": len(graft.names),
        "parameters": lab.parameters(base),
        "samples_ms": samples,
    }


def load(rank: Any, path: Path) -> None:
    """From the file to a skill that can be switched."""
    rank.begin("patch", "bench", path)
    while rank.prepared("patch", "bench") is None:
        time.sleep(0.0002)
    rank.keep("patch", "bench")


def patches(graft: hotgraft.Graft, base: lab.State, which: str) -> list[CheckpointWeightPatch]:
    """The graft as vLLM's loader takes it."""
    found = []
    for name in graft.names:
        entries = graft[name]
        values = getattr(entries, which)
        shape, dtype = tuple(base[name].shape), base[name].dtype
        found.append(CheckpointWeightPatch(name, shape, dtype, values, entries.indices))
    return found


def timed(samples: dict[str, list[float]], name: str, call: Callable[[], object]) -> None:
    begin = time.perf_counter()
    call()
    samples.setdefault(name, []).append(1e3 * (time.perf_counter() - begin))


def check(model: torch.nn.Module, wanted: lab.State) -> None:
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, wanted[name]), name


def decode_steps(llm: Any) -> list[float]:
    """A decode step of one request, in ms."""
    found = []
    for _ in range(5):
        times = []
        for tokens in (1, 1 + TOKENS):
            sampling = SamplingParams(max_tokens=tokens, min_tokens=tokens, detokenize=False)
            begin = time.perf_counter()
            llm.generate([{"prompt_token_ids": [1, 2, 3]}], sampling, use_tqdm=False)
            times.append(time.perf_counter() - begin)
        found.append(1e3 * (times[1] - times[0]) / TOKENS)
    return found


if __name__ == "__main__":
    main()
