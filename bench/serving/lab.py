"""Lab: what the benches of serving share: the model, skills, an engine, and where this was run."""

from __future__ import annotations

import datetime
import json
import os
import random
import subprocess
import time
from collections.abc import Callable, Iterable
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

SIZES = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "vocab_size": 8192,
    "max_position_embeddings": 512,
}
OURS = {
    "scheduler_cls": "hotgraft.serve.vllm.scheduler.SkillScheduler",
    "worker_cls": "hotgraft.serve.vllm.worker.SkillWorker",
}
"""Options of an engine with skills."""

State = dict[str, torch.Tensor]


def checkpoint(folder: Path, dtype: str = "bfloat16", **sizes: int) -> State:
    """Write the model, or one of other sizes, into a folder; returns its tensors."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES | sizes)).to(getattr(torch, dtype))
    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def skill(base: State, density: float) -> hotgraft.Graft:
    """Changes of that share of the linear layers' entries, at random places."""
    linear = [name for name in base if name.endswith("proj.weight")]
    chosen = {n: torch.rand(base[n].shape) < density for n in linear}
    tuned = {n: torch.where(chosen[n], base[n] * 1.5 + 0.01, base[n]) for n in linear}
    return hotgraft.diff({n: base[n] for n in linear}, tuned)


def parameters(base: State) -> int:
    """How many the model has."""
    return sum(tensor.numel() for tensor in base.values())


class Engine:
    """A vLLM engine in this process, driven by hand: a call of `step` is a step.

    Args:
        folder: of the model.
        **options: vLLM's.
    """

    def __init__(self, folder: Path, **options: Any) -> None:
        usual = {"max_model_len": 512, "max_num_seqs": 32, "enable_prefix_caching": False}
        self.llm = LLM(
            str(folder), skip_tokenizer_init=True, enforce_eager=True, **(usual | options)
        )
        self.engine: Any = self.llm.llm_engine
        core: Any = self.engine.engine_core
        self.scheduler: Any = core.engine_core.scheduler
        self.worker: Any = core.engine_core.model_executor.driver_worker.worker

    def add(self, name: str, prompt: list[int], tokens: int, skill: str | None = None) -> None:
        """Ask for so many tokens."""
        sampling = SamplingParams(
            max_tokens=tokens,
            min_tokens=tokens,
            temperature=0,
            detokenize=False,
            extra_args={"hotgraft_skill": skill} if skill else None,
        )
        self.engine.add_request(name, {"prompt_token_ids": prompt}, sampling)

    def step(self) -> tuple[float, list[str]]:
        """Its seconds, and the requests that it finished."""
        begin = time.perf_counter()
        outputs = self.engine.step()
        seconds = time.perf_counter() - begin
        return seconds, [output.request_id for output in outputs if output.finished]


def load(engine: Engine, folder: Path) -> None:
    """Load the folder's skills, and let requests name them."""
    from hotgraft.serve.vllm.worker import connect

    ranks = connect(engine.llm)
    for path in sorted(folder.glob("*.graft.safetensors")):
        name = path.name.partition(".")[0]
        engine.scheduler.set_skill(name, ranks.load(name, path).id)


def tokens(rng: random.Random, count: int) -> list[int]:
    """A prompt."""
    return [rng.randrange(SIZES["vocab_size"]) for _ in range(count)]


def timing(call: Callable[..., Any], into: list[float]) -> Callable[..., Any]:
    """The same function; it writes down the seconds of each call."""

    def timed(*args: Any, **kwargs: Any) -> Any:
        begin = time.perf_counter()
        try:
            return call(*args, **kwargs)
        finally:
            into.append(time.perf_counter() - begin)

    return timed


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
        "kind": "environment",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "packages": {n: version(n) for n in ("hotgraft", "torch", "vllm-cpu", "transformers")},
        "commit": os.environ.get("HOTGRAFT_COMMIT", commit.stdout.strip()),
        "load_average": round(os.getloadavg()[0], 2),
    }


def append(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Add rows to a file, a JSON line each."""
    with path.open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
