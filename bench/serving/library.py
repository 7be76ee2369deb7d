"""A library of thousands of skills behind a server: memory, and what a loaded skill costs.

Run in vLLM's environment, from any folder but the repository's root:

    python .../bench/serving/library.py --out .../bench/serving/results/DATE-library.jsonl

vLLM's engine with hotgraft's workers and scheduler in this process, and the server's own `Skills`
in front of it, over folders of 10, 500 and 5,000 files. The files are real ones: every one states
an id of its own, and each load is checked by it.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import itertools
import os
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import lab
import numpy as np
import torch
from hotgraft import Graft
from hotgraft.errors import HotgraftError
from hotgraft.format import Group
from hotgraft.serve.vllm import core
from hotgraft.serve.vllm.scheduler import ARGUMENT
from hotgraft.serve.vllm.skills import Skills
from hotgraft.serve.vllm.worker import connect
from vllm import LLM, SamplingParams

KNOWN = (10, 500, 5000)
ROOM = 16
"""Skills that there is memory for."""
DENSITY = 1e-4


def main() -> None:
    """Measure, and append rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--requests", type=int, default=600, help="for any of the known skills")
    parser.add_argument("--tokens", type=int, default=40, help="first tokens of loaded skills")
    parser.add_argument("--passes", type=int, default=2)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        folders = write(folder, lab.skill(lab.checkpoint(folder / "base"), DENSITY))
        llm = LLM(
            str(folder / "base"),
            skip_tokenizer_init=True,
            enforce_eager=True,
            dtype="bfloat16",
            max_model_len=256,
            worker_cls="hotgraft.serve.vllm.served.ServedWorker",
            scheduler_cls="hotgraft.serve.vllm.core.SkillScheduler",
        )
        bits = llm.apply_model(checksum)
        rows = [
            asyncio.run(measure(llm, folders[known], known, given))
            for _ in range(given.passes)
            for known in KNOWN
        ]
        assert llm.apply_model(checksum) == bits, "the weights are not the base's any more"
    lab.append(given.out, [lab.environment(), *rows])
    for row in rows:
        print({name: shown(value) for name, value in row.items()})


def write(folder: Path, one: Graft) -> dict[int, Path]:
    """Folders with so many different skills each, of the size of this one."""
    folders = {known: folder / str(known) for known in KNOWN}
    for path in folders.values():
        path.mkdir()
    for i in range(max(KNOWN)):
        groups = {
            kind: Group(group.positions, np.bitwise_xor(group.new, i % 128), group.old)
            for kind, group in one.groups.items()
        }
        groups["BF16"].new[:2] ^= np.array([i // 128, 0], groups["BF16"].new.dtype)
        name = f"s{i:04}.graft.safetensors"
        Graft(one.rows, groups, one.provenance).save(folders[max(KNOWN)] / name)
        for known in KNOWN[:-1]:
            if i < known:
                os.link(folders[max(KNOWN)] / name, folders[known] / name)
    return folders


async def measure(llm: Any, folder: Path, known: int, given: Any) -> dict[str, Any]:
    """Start with a folder, ask for its skills at random, and then for two that are loaded."""
    ranks, size = connect(llm), max(path.stat().st_size for path in folder.iterdir())
    resident: list[int] = []

    def report(event: str, **about: Any) -> None:
        if event == "load":
            resident.append(about["resident"])
        elif event == "refusal":
            raise AssertionError(about)

    before = memory()
    skills = Skills(
        ranks, scheduler_of(llm), folder, ROOM * size, lambda name: name == "base", report
    )
    scans = [await timed(skills.scan()) for _ in range(3)]
    assert len(skills) == known
    scanned = memory()
    chance = random.Random(known)
    waits: dict[bool, list[float]] = {True: [], False: []}
    for name in chance.choices(list(skills), k=given.requests):
        hit = skills[name].loaded
        waits[hit].append(await timed(use(skills, name)))
        held = sum(skill.nbytes for skill in ranks.skills.values())
        assert held == skills.resident.budget.nbytes <= skills.resident.budget.limit
    walked = memory()
    counts = dataclasses.asdict(skills.resident.counts)
    pair = [skill.name for skill in skills.resident.budget.all()[-2:]]
    tokens = await first_tokens(llm, skills, pair, given.tokens)
    for skill in list(skills.values()):
        if skill.loaded:
            await skills.unload(skill.name)
    assert not ranks.skills
    return {
        "case": "library",
        "known": known,
        "file_bytes": size,
        "limit_bytes": skills.resident.budget.limit,
        "most_resident_bytes": max(resident),
        "scan_s": scans[0],
        "look_again_s": scans[1:],
        "rss_for_names_bytes": scanned - before,
        "rss_after_requests_bytes": walked - before,
        "requests": given.requests,
        **{name: counts[name] for name in ("hits", "misses", "evictions")},
        "lease_loaded_ms": [1e3 * wait for wait in waits[True]],
        "lease_not_loaded_ms": [1e3 * wait for wait in waits[False]],
        **tokens,
    }


async def use(skills: Skills, name: str) -> None:
    """What a request does before the engine is asked."""
    with skills.lease(skills[name]) as lease:
        await lease.ready()


async def first_tokens(llm: Any, skills: Skills, pair: list[str], count: int) -> dict[str, Any]:
    """The first tokens of two loaded skills in turns: each needs a switch."""
    sampling = {"max_tokens": 1, "detokenize": False}
    found = []
    before = switches(llm)
    for i, name in zip(range(count), itertools.cycle(pair), strict=False):
        prompt = {"prompt_token_ids": [1 + i % 200, 2, 3]}
        params = SamplingParams(**sampling, extra_args={ARGUMENT: name})
        begin = time.perf_counter()
        with skills.lease(skills[name]) as lease:
            await lease.ready()
            (output,) = llm.generate([prompt], params, use_tqdm=False)
        found.append(1e3 * (time.perf_counter() - begin))
        assert output.outputs[0].finish_reason == "length"
    after = switches(llm)
    number = after[0] - before[0]
    assert number == count, "each token has a switch"
    return {"first_token_ms": found, "switch_mean_ms": 1e3 * (after[1] - before[1]) / number}


def switches(llm: Any) -> tuple[int, float]:
    """How many there were, and the seconds that they took."""
    (rank,) = llm.collective_rpc("hotgraft_switches")
    return sum(rank["counts"]), rank["seconds"]


def scheduler_of(llm: Any) -> Any:
    """As the server calls it, but in this process."""
    engine = llm.llm_engine.engine_core.engine_core

    async def call(method: str, *args: Any) -> Any:
        answer = core.call(engine, method, args)
        if "error" in answer:
            raise HotgraftError(str(answer["error"]))
        return answer["value"]

    return call


def checksum(model: torch.nn.Module) -> dict[str, int]:
    """Of each parameter's bits."""
    return {
        name: int(parameter.detach().view(torch.int16).long().sum())
        for name, parameter in model.named_parameters()
    }


def shown(value: Any) -> Any:
    """The median of samples; anything else as it is."""
    if isinstance(value, list):
        return round(statistics.median(value), 4) if value else None
    return value


async def timed(work: Any) -> float:
    begin = time.perf_counter()
    await work
    return time.perf_counter() - begin


def memory() -> int:
    """Bytes of anonymous resident memory of this process."""
    text = Path("/proc/self/status").read_text()
    return 1024 * int(text.partition("RssAnon:")[2].split()[0])


if __name__ == "__main__":
    main()
