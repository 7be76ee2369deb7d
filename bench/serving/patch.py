"""A patch for a served model: hotgraft and vLLM's own sparse loader, on the same worker.

Run in vLLM's environment, from any folder but the repository's root:

    python -P .../bench/serving/patch.py --out .../bench/serving/results/DATE-patch.jsonl

Both change the same entries of the linear layers, in turns, and both are checked: after each, the
weights must be those of the checkpoint that the patch was made from.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.update(
    HF_HUB_OFFLINE="1",
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_LOGGING_LEVEL="ERROR",
)

import hotgraft
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM
from vllm import LLM, SamplingParams
from vllm.model_executor.model_loader.checkpoint_weight_patch import (
    CheckpointWeightPatch,
    load_checkpoint_weight_patches,
)

SIZES = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "vocab_size": 8192,
    "max_position_embeddings": 512,
}
TOKENS = 32
State = dict[str, torch.Tensor]


def main() -> None:
    """Measure, and append rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=30)
    given = parser.parse_args()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        LlamaForCausalLM(LlamaConfig(**SIZES)).bfloat16().save_pretrained(folder / "base")
        base = load_file(folder / "base" / "model.safetensors")
        llm = LLM(
            str(folder / "base"),
            skip_tokenizer_init=True,
            enforce_eager=True,
            dtype="bfloat16",
            max_model_len=256,
            worker_extension_cls="hotgraft.serve.vllm.worker.Grafts",
        )
        rows = [measure(llm, base, folder, density, given.rounds) for density in (1e-4, 1e-3, 1e-2)]
    decode = {"case": "decode", "samples_ms": decode_steps(llm), "parameters": size(base)}
    with given.out.open("a") as file:
        for row in [{"kind": "environment", **environment()}, *rows, decode]:
            file.write(json.dumps(row) + "\n")
            if "samples_ms" in row and isinstance(row["samples_ms"], dict):
                medians = {k: statistics.median(v) for k, v in row["samples_ms"].items()}
                print(row["entries"], {k: f"{v:.3f} ms" for k, v in medians.items()})
                print(f"  {medians['vllm'] / medians['switch']:.0f} times as fast")
    print("a decode step:", f"{statistics.median(decode['samples_ms']):.1f} ms")


def measure(llm: Any, base: State, folder: Path, density: float, rounds: int) -> dict[str, Any]:
    """Each way there and back, in turns."""
    linear = [name for name in base if name.endswith("proj.weight")]
    chosen = {n: torch.rand(base[n].shape) < density for n in linear}
    tuned = {n: torch.where(chosen[n], base[n] * 1.5 + 0.01, base[n]) for n in linear}
    graft = hotgraft.diff({n: base[n] for n in linear}, tuned)
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
        "parameters": size(base),
        "samples_ms": samples,
    }


def load(rank: Any, path: Path) -> None:
    """From the file to a skill that can be switched."""
    rank.begin("patch", "bench", path)
    while rank.prepared("patch", "bench") is None:
        time.sleep(0.0002)
    rank.keep("patch", "bench")


def patches(graft: hotgraft.Graft, base: State, which: str) -> list[CheckpointWeightPatch]:
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


def check(model: torch.nn.Module, wanted: State) -> None:
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, wanted[name]), name


def size(base: State) -> int:
    return sum(tensor.numel() for tensor in base.values())


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


def environment() -> dict[str, Any]:
    """Where this was measured."""
    cpu = next(
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    )
    root = Path(__file__).resolve().parents[2]
    commit = subprocess.run(  # noqa: PLW1510 - an export has no history
        ["git", "rev-parse", "--short=12", "HEAD"], cwd=root, capture_output=True, text=True
    )
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "packages": {n: version(n) for n in ("hotgraft", "torch", "vllm-cpu", "transformers")},
        "commit": os.environ.get("HOTGRAFT_COMMIT", commit.stdout.strip()),
        "load_average": round(os.getloadavg()[0], 2),
    }


if __name__ == "__main__":
    main()
