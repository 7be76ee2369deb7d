"""Ten thousand switches under load: every step's tokens, judged by servers that have one skill.

Run in vLLM's environment, from any folder but the repository's root:

    python .../bench/serving/soak.py --out .../bench/serving/results/DATE-soak.jsonl

Clients ask for skills and for the base at random, some go away, and prompts share beginnings. Turns
are one step long, memory is short and prompts come in chunks, so requests also lose their memory.
All steps that the scheduler plans are kept. Then for each skill an engine is started on the skill's
checkpoint, with vLLM's own scheduler and no skills, and is given the steps of the skill as they
were: the tokens of each must be the same. Greedy decoding itself depends on the batch, which is why
the steps are. Where the model does not depend on it, which is shown first, responses must also be
those of this engine with batches of its own.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import os
import pickle
import random
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # threads would take longer to wait for each other than a step

import hotgraft
import lab
import torch
from hotgraft.serve.vllm.worker import connect
from lab import State
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM
from vllm import SamplingParams
from vllm.v1.core.sched.output import SchedulerOutput

SIZES: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,
}
SKILLS = 8
CLIENTS = 24
OPTIONS: dict[str, Any] = {
    "worker_cls": lab.OURS["worker_cls"],  # the judges' as well: the same products of matrices
    "enable_prefix_caching": True,
    "max_model_len": 256,
    "block_size": 32,
    "seed": 0,
    "num_gpu_blocks_override": 28,
    "max_num_batched_tokens": 64,
    "long_prefill_token_threshold": 40,
}
TURNS: dict[str, Any] = {
    "scheduler_cls": lab.OURS["scheduler_cls"],
    "additional_config": {"hotgraft": {"quantum": 1}},
}
WEIGHTS = "model.safetensors"
EARLY = 2
"""Memory is looked at after one switch in so many, and at the end."""
GROWTH = 8
"""MiB by which it may grow, the clients' own books included."""


@dataclasses.dataclass(frozen=True)
class Wanted:
    """A request."""

    name: str
    skill: str | None
    prompt: list[int]
    count: int


@dataclasses.dataclass
class Run:
    """What a server under load did."""

    requests: dict[str, Wanted] = dataclasses.field(default_factory=dict)
    responses: dict[str, list[int]] = dataclasses.field(default_factory=dict)
    whole: set[str] = dataclasses.field(default_factory=set)
    """Those that were not aborted."""
    figures: dict[str, Any] = dataclasses.field(default_factory=dict)


def main() -> None:
    """Run, judge, and append rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--switches", type=int, default=10_000)
    given = parser.parse_args()
    rows = []
    for dtype in ("bfloat16", "float32"):
        with tempfile.TemporaryDirectory() as scratch:
            base = save_base(Path(scratch) / "base", dtype)
            rows.append(soak(base, SKILLS, given.switches, invariant=dtype == "float32"))
        print(rows[-1])
        early, late = rows[-1]["resident_anonymous_mib"].values()
        assert late - early < GROWTH, f"memory grew by {late - early} MiB"
    lab.append(given.out, [lab.environment(), *rows])


def save_base(folder: Path, dtype: str) -> Path:
    """Write a toy Llama."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES)).to(getattr(torch, dtype))
    model.save_pretrained(folder)
    return folder


def soak(base: Path, count: int, switches: int, *, invariant: bool) -> dict[str, Any]:
    """Serve until there were so many switches, and judge all of it.

    Args:
        base: a checkpoint of one file. Skills and steps are written beside it.
        count: of skills.
        switches: at least so many.
        invariant: whether the model must be one that gives the same tokens in any batch, and
            responses those of servers that never had another skill.

    Returns:
        What happened, as a row.

    Raises:
        AssertionError: something is not as it should be.
    """
    folders: dict[str | None, Path] = {None: base}
    for i in range(count):
        folders[f"skill{i}"] = save_skill(base, f"skill{i}", seed=i + 1)
    steps = base.parent / "steps"
    run = serve(base, [name for name in folders if name], switches, steps)
    check_responses(run, steps)
    own = 0
    for skill, folder in folders.items():
        llm = engine(folder).llm
        if invariant:
            check_invariant(llm, run, skill)
        own += count_own_batches(llm, run, skill)
        found = differences(llm, skill, steps)
        assert not found, f"{found} steps of {skill} have other tokens on its own server"
        if skill is None:  # what else should come out otherwise does: the judge is no rubber stamp
            wrong = differences(llm, "skill0", steps)
            assert wrong, "a skill's steps have the tokens of the base"
        end(llm)
    steps.unlink()
    assert not invariant or own == len(run.whole), f"only {own} of {len(run.whole)} are the same"
    judged = {"same_in_own_batches": own, "steps_of_a_skill_that_differ_on_the_base": wrong}
    return {"case": "soak", "skills": count, **run.figures, **judged}


def save_skill(base: Path, name: str, seed: int) -> Path:
    """Write a changed checkpoint, and the graft that leads to it."""
    state = load_file(base / WEIGHTS)
    generator = torch.Generator().manual_seed(seed)
    tuned = {
        name: torch.where(torch.rand(t.shape, generator=generator) < 0.05, t * 1.5 + 0.05, t)
        for name, t in state.items()
    }
    folder = base.parent / name
    folder.mkdir()
    for file in base.glob("*.json"):
        (folder / file.name).write_bytes(file.read_bytes())
    save_file(tuned, folder / WEIGHTS, {"format": "pt"})
    hotgraft.diff(state, tuned).save(folder.with_suffix(".graft.safetensors"))
    return folder


def engine(folder: Path, **more: Any) -> lab.Engine:
    """An engine for a checkpoint, in its own precision, which vLLM does not take by default."""
    dtype = next(iter(load_file(folder / WEIGHTS).values())).dtype
    return lab.Engine(folder, dtype=str(dtype).removeprefix("torch."), **OPTIONS, **more)


# ---- the server under load ----------------------------------------------------------------------


def serve(base: Path, skills: list[str], switches: int, steps: Path) -> Run:
    """Load skills, and answer clients until there were so many switches."""
    server = engine(base, **TURNS)
    llm, client, scheduler = server.llm, server.engine, server.scheduler
    before, ranks = parameters(llm), connect(llm)
    lab.load(server, base.parent)
    run, rng = Run(), random.Random(0)
    coming = requests(rng, [None, *skills])
    resident: dict[int, float] = {}
    started = time.perf_counter()
    with steps.open("wb") as file:
        record(scheduler, file)
        while scheduler.counters.switches < switches or client.has_unfinished_requests():
            more = scheduler.counters.switches < switches
            while more and client.get_num_unfinished_requests() < CLIENTS:
                add(client, run, next(coming))
            if rng.random() < 0.01:
                abort(client, run, rng)
            for output in client.step():
                run.responses[output.request_id] = list(output.outputs[0].token_ids)
            if not resident and scheduler.counters.switches >= switches // EARLY:
                resident[scheduler.counters.switches] = anonymous()
    counters = scheduler.counters
    resident[counters.switches] = anonymous()
    assert ranks.verify() > 0
    ranks.deactivate()
    assert ranks.verify() > 0
    check_base(before, parameters(llm), load_file(base / WEIGHTS))
    assert not counters.refusals
    for name in run.whole:
        assert len(run.responses[name]) == run.requests[name].count, name
    run.figures = {
        "dtype": str(next(iter(before.values())).dtype).removeprefix("torch."),
        "parameters": sum(tensor.numel() for tensor in before.values()),
        "switches": counters.switches,
        "steps": sum(counters.steps.values()),
        "requests": len(run.requests),
        "aborted": len(run.requests) - len(run.whole),
        "tokens": sum(map(len, run.responses.values())),
        "evictions": counters.evictions,
        "seconds": round(time.perf_counter() - started, 1),
        "resident_anonymous_mib": resident,
    }
    end(llm)
    return run


def requests(rng: random.Random, skills: list[str | None]) -> Iterator[Wanted]:
    """Requests without end; some begin alike, whatever their skill is."""
    beginnings = [[rng.randrange(300) for _ in range(length)] for length in (0, 32, 64)]
    for i in itertools.count():
        tail = [rng.randrange(300) for _ in range(rng.randrange(1, 40))]
        prompt = rng.choice(beginnings) + tail
        yield Wanted(f"r{i}", rng.choice(skills), prompt, rng.randrange(4, 40))


def sampling(wanted: Wanted, **more: Any) -> SamplingParams:
    return SamplingParams(
        max_tokens=wanted.count, temperature=0, ignore_eos=True, detokenize=False, **more
    )


def add(client: Any, run: Run, wanted: Wanted) -> None:
    """Send a request."""
    asked = {"hotgraft_skill": wanted.skill} if wanted.skill else None
    prompt = {"prompt_token_ids": wanted.prompt}
    client.add_request(wanted.name, prompt, sampling(wanted, extra_args=asked))
    run.requests[wanted.name] = wanted
    run.whole.add(wanted.name)
    run.responses[wanted.name] = []


def abort(client: Any, run: Run, rng: random.Random) -> None:
    """A client goes away."""
    open_ = [n for n in run.whole if len(run.responses[n]) < run.requests[n].count]
    if open_:
        name = rng.choice(sorted(open_))
        client.abort_request([name])
        run.whole.discard(name)


def record(scheduler: Any, file: Any) -> None:
    """Keep each step as it was planned, and what came of it."""
    plan, take = scheduler.schedule, scheduler.update_from_output

    def schedule(*args: Any, **kwargs: Any) -> Any:
        output = plan(*args, **kwargs)
        pickle.dump(output, file)
        return output

    def update_from_output(planned: Any, found: Any) -> Any:
        pickle.dump((list(found.req_ids), [list(ids) for ids in found.sampled_token_ids]), file)
        return take(planned, found)

    scheduler.schedule, scheduler.update_from_output = schedule, update_from_output


def parameters(llm: Any) -> State:
    """A copy of all of them."""

    def copy(model: torch.nn.Module) -> State:
        return {name: p.detach().clone() for name, p in model.named_parameters()}

    found: State = llm.apply_model(copy)[0]
    return found


def check_base(before: State, after: State, checkpoint: State) -> None:
    """The weights are those of before, byte for byte, and hold what the checkpoint does."""
    for name, tensor in before.items():
        assert torch.equal(tensor.view(torch.uint8), after[name].view(torch.uint8)), name
    norm = "model.norm.weight"
    assert torch.equal(before[norm], checkpoint[norm])
    assert before.keys() == after.keys()


def anonymous() -> float:
    """This process's resident memory in MiB, without what is mapped from files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return round(int(next(x.split()[1] for x in lines if x.startswith("RssAnon"))) / 1024, 1)


def end(llm: Any) -> None:
    llm.llm_engine.engine_core.shutdown()


# ---- the judges ---------------------------------------------------------------------------------


def check_responses(run: Run, steps: Path) -> None:
    """What clients got is what the steps gave, token for token."""
    said: dict[str, list[int]] = {}
    for _, (names, tokens) in recorded(steps):
        for name, ids in zip(names, tokens, strict=True):
            said.setdefault(name.rpartition("-")[0], []).extend(ids)
    for name, got in run.responses.items():
        assert said.get(name, [])[: len(got)] == got, name
        assert name not in run.whole or said[name] == got, name


def differences(llm: Any, skill: str | None, steps: Path) -> int:
    """Give an engine a skill's steps as they were, and in place of the others' steps empty ones.

    Returns:
        How many came out otherwise.
    """
    executor = llm.llm_engine.engine_core.engine_core.model_executor
    found = 0
    for planned, before in recorded(steps):
        named = vars(planned).pop("hotgraft_skill")  # this worker has none that it could switch to
        if not planned.total_num_scheduled_tokens or named != skill:
            idle = SchedulerOutput.make_empty()
            idle.finished_req_ids = planned.finished_req_ids
            executor.execute_model(idle)
            continue
        assert executor.execute_model(planned) is None
        output = executor.sample_tokens(None)
        after = (list(output.req_ids), [list(ids) for ids in output.sampled_token_ids])
        found += after != before
    return found


def recorded(steps: Path) -> Iterator[tuple[Any, Any]]:
    """Each step, and what came of it."""
    with steps.open("rb") as file:
        while True:
            try:
                planned = pickle.load(file)
            except EOFError:
                return
            yield planned, pickle.load(file)


def of_skill(run: Run, skill: str | None) -> list[Wanted]:
    """The whole requests of a skill."""
    return [
        each for name, each in run.requests.items() if each.skill == skill and name in run.whole
    ]


def answers(llm: Any, wanted: list[Wanted]) -> list[list[int]]:
    """What an engine says to requests that come all at once."""
    found = llm.generate(
        [{"prompt_token_ids": each.prompt} for each in wanted],
        [sampling(each) for each in wanted],
        use_tqdm=False,
    )
    return [list(answer.outputs[0].token_ids) for answer in found]


def check_invariant(llm: Any, run: Run, skill: str | None) -> None:
    """Some requests get alone what they get together."""
    some = of_skill(run, skill)[:20]
    together = answers(llm, some)
    assert together == [answers(llm, [each])[0] for each in some], "tokens depend on the batch"


def count_own_batches(llm: Any, run: Run, skill: str | None) -> int:
    """How many of a skill's responses are those of an engine with batches of its own."""
    wanted = of_skill(run, skill)
    found = answers(llm, wanted)
    return sum(run.responses[each.name] == got for each, got in zip(wanted, found, strict=True))


if __name__ == "__main__":
    main()
