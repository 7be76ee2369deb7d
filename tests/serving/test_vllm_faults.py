"""`hotgraft serve` on two ranks, and what becomes of it when one of them fails or dies."""

import http.client
import itertools
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytest.importorskip("vllm")

import psutil
import served
import torch
from checkpoints import tuned
from safetensors.torch import load_file
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

SEEDS = {"sql": 1, "french": 2, "fatal": 3}
NAMES = ("toy", "sql", "french")
PROMPTS = [f"w{i} w{i + 40} w{7 * i}" for i in range(2, 6)]
COUNT = 8
FAULTY = "from hotgraft.serve.vllm import server\nserver.WORKER = 'faulty.Worker'\n"
ENVIRONMENT = {"PYTHONPATH": str(Path(__file__).parent)}
GONE = 40.0
"""Seconds in which a server has ended that lost a worker: vLLM looks for it every five, and gives
other workers some to end."""


class Setting:
    """A checkpoint, skills, and what is right."""

    def __init__(self, folder):
        self.folder = folder
        self.base = served.checkpoint(folder, "llama-wide")
        self.skills = folder / "skills"
        (self.skills / "later").mkdir(parents=True)
        for name, seed in SEEDS.items():
            served.graft(self.base, self.skills / f"{name}.graft.safetensors", seed)
        for name, density in (("large", 0.9), ("endless", 0.1)):
            path = self.skills / f"later/{name}.graft.safetensors"
            served.graft(self.base, path, 4, density)
        state = load_file(self.base / served.WEIGHTS)
        words = PreTrainedTokenizerFast.from_pretrained(self.base)
        model = LlamaForCausalLM.from_pretrained(self.base, dtype=torch.float32)
        self.wanted = {}
        for name in NAMES:
            model.load_state_dict(tuned(state, 0.1, SEEDS[name]) if name in SEEDS else state)
            for prompt in PROMPTS:
                self.wanted[name, prompt] = greedy(model, words, prompt)

    def server(self, ranks):
        options = ("--admin-key", served.ADMIN_KEY, "--quantum", "1")
        if ranks > 1:
            options += ("--tensor-parallel-size", str(ranks))
        return served.Server(
            self.folder, self.base, self.skills, *options,
            first=FAULTY, environment=ENVIRONMENT,
        )  # fmt: skip


def greedy(model, words, prompt):
    """What transformers answers, with a model whose best token is so beyond any rounding."""
    tokens = words(prompt).input_ids
    length = len(tokens)
    for _ in range(COUNT):
        (first, second), best = model(torch.tensor([tokens])).logits[0, -1].topk(2)
        assert first - second > 1e-5
        tokens.append(int(best[0]))
    return words.decode(tokens[length:], skip_special_tokens=True).split()


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    with torch.no_grad():
        return Setting(tmp_path_factory.mktemp("faults"))


@pytest.fixture(scope="module")
def pair(setting):
    """A server of two ranks. The last test of it is its end."""
    with setting.server(2) as running:
        yield running


def answer(server, request):
    return server.complete(*request, COUNT).split()


def load(server, name):
    body = {"name": name, "file": f"later/{name}.graft.safetensors"}
    return server.admin("POST", "/v1/skills", body)


class Traffic:
    """Clients that ask for all models in turn, as long as the block lasts."""

    def __init__(self, server, setting, clients=3):
        self.pool = ThreadPoolExecutor(clients)
        self.stop = threading.Event()
        self.done = [self.pool.submit(self.ask, server, setting, i) for i in range(clients)]

    def ask(self, server, setting, first):
        requests = itertools.cycle(setting.wanted)
        for request in itertools.islice(requests, 4 * first, None):
            if self.stop.is_set():
                return
            assert answer(server, request) == setting.wanted[request]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stop.set()
        for each in self.done:
            each.result()
        self.pool.shutdown()


def test_mixed_skills_on_two_ranks_get_the_tokens_of_their_own_models(pair, setting):
    requests = list(setting.wanted)
    with ThreadPoolExecutor(len(requests)) as pool:
        found = list(pool.map(lambda request: answer(pair, request), requests))
    assert found == list(setting.wanted.values())
    assert len({tuple(found[i]) for i in (0, 4, 8)}) == 3
    time.sleep(0.6)
    assert pair.metrics()["hotgraft_switches_total"] > len(NAMES)


def test_a_load_that_one_rank_has_no_memory_for_fails_alone(pair, setting):
    before = pair.metrics()["hotgraft_resident_bytes"]
    with Traffic(pair, setting):
        status, found, _ = load(pair, "large")
        assert (status, found["error"]["type"]) == (507, "MemoryError")
        assert found["error"]["message"].startswith("rank 1: ")
        assert pair.metrics()["hotgraft_resident_bytes"] == before
        assert "large" not in {card["id"] for card in pair.get("/v1/skills")[1]["data"]}
        status, card, _ = load(pair, "large")  # the other rank has nothing left of the first try
        assert (status, card["requests"]) == (201, 0)
    assert pair.metrics()["hotgraft_resident_bytes"] == before + card["resident_bytes"]
    assert pair.admin("DELETE", "/v1/skills/large")[0] == 200


def test_a_worker_that_dies_in_a_switch_ends_the_server_and_nobody_waits(pair):
    """As in vLLM: all clients are told, and the server ends, so that it can be started again."""
    processes = psutil.Process(pair.process.pid).children(recursive=True)
    assert len(processes) >= 3  # the engine's, and one a rank
    # One skill is loaded at a time, and the next one's load never ends.
    assert pair.admin("POST", "/v1/skills/fatal/pin")[0] == 200
    with ThreadPoolExecutor(1) as pool:
        endless = pool.submit(load, pair, "endless")
        while pair.admin("DELETE", "/v1/skills/endless")[0] != 409:  # until it is being loaded
            assert not endless.done()
        stream = pair.stream("sql", PROMPTS[0], 100)
        stream.readline()
        body = {"model": "fatal", "prompt": "w5", "max_tokens": 4}
        for status, found, _ in (
            pair.request("POST", "/v1/completions", body),
            endless.result(GONE),
        ):
            assert status == 500
            assert "EngineCore encountered an issue" in found["error"]["message"]
        assert b"EngineCore encountered an issue" in stream.read()
    pair.process.wait(GONE)
    assert psutil.wait_procs(processes, GONE)[1] == []
    assert "Worker proc VllmWorker-1 died unexpectedly" in pair.log.read_text()


def test_a_server_that_is_started_again_has_the_bases_weights_and_its_skills(setting):
    """And of one rank: it ends as well, when its worker is killed under load from outside."""
    with setting.server(1) as server:
        assert all(answer(server, request) == right for request, right in setting.wanted.items())
        found = psutil.Process(server.process.pid).children(recursive=True)
        (worker,) = [each for each in found if "Worker" in " ".join(each.cmdline())]
        with ThreadPoolExecutor(6) as pool:
            asked = [pool.submit(ask_until_it_ends, server, setting, i) for i in range(6)]
            time.sleep(1)
            worker.kill()
            assert all(each.result(GONE) for each in asked)
        server.process.wait(GONE)


def ask_until_it_ends(server, setting, first):
    """Say how the server ended for a client; what was answered before is right."""
    requests = itertools.islice(itertools.cycle(setting.wanted), first, None)
    for name, prompt in requests:
        body = {"model": name, "prompt": prompt, "max_tokens": COUNT, "temperature": 0}
        try:
            status, found, _ = server.request(
                "POST", "/v1/completions", {**body, "ignore_eos": True}
            )
        except (OSError, http.client.HTTPException) as error:
            return type(error).__name__
        if status != 200:
            return found["error"]["message"]
        assert found["choices"][0]["text"].split() == setting.wanted[name, prompt]
    return None
