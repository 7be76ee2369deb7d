"""Pipelines and servers of transformers, over a live model."""

from __future__ import annotations

import itertools
import json
import threading
import time
import urllib.request
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from toys import PATIENCE, SETS, Toy, generate, llama, words
from transformers import (
    ContinuousBatchingConfig,
    GenerationConfig,
    PreTrainedModel,
    pipeline,
)


@pytest.fixture
def toy() -> Iterator[Toy]:
    with Toy() as made:
        yield made


def test_a_pipeline_gives_what_the_patched_models_pipeline_gives(toy: Toy) -> None:
    def writer(model: PreTrainedModel) -> Callable[[], list[list[int]]]:
        pipe = pipeline("text-generation", model=model, tokenizer=words())

        def write() -> list[list[int]]:
            found = pipe(
                ["w5 w7", "w9 w11 w13", "w20"],
                batch_size=2,
                max_new_tokens=12,
                min_new_tokens=12,
                do_sample=False,
                return_tensors=True,
            )
            return [answer["generated_token_ids"] for [answer] in found]

        return write

    write = writer(toy.model)
    for names in (*SETS, ()):
        wanted = writer(toy.plain[names])()
        with toy.using(names), toy.host.hold():
            assert write() == wanted


def test_continuous_batching_that_shares_no_blocks(toy: Toy) -> None:
    """Shared blocks are found by their tokens, whatever the weights were that filled them."""
    prompt = list(range(10, 45))
    settings = GenerationConfig(max_new_tokens=8, do_sample=False, eos_token_id=-1)
    blocks = ContinuousBatchingConfig(
        page_size=8, num_blocks=64, max_batch_tokens=128, allow_block_sharing=False
    )
    live = []
    with toy.model.continuous_batching_context_manager(
        generation_config=settings, continuous_batching_config=blocks
    ) as manager:
        for number, names in enumerate(SETS):
            toy.activate(names)  # no request is on its way now
            manager.add_request(prompt, request_id=str(number), max_new_tokens=8)
            while not (result := manager.get_result(timeout=PATIENCE)).is_finished():
                pass
            live.append(result.generated_tokens)
    for names, tokens in zip(SETS, live, strict=True):
        [wanted] = toy.plain[names].generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, 35), generation_config=settings
        )
        assert tokens == wanted[35:].tolist()
    assert len({tuple(tokens) for tokens in live}) == len(SETS)


class Client:
    """Asks a server on this machine."""

    def __init__(self, port: int) -> None:
        self.port = port

    def post(self, path: str, **body: Any) -> str:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}",
            json.dumps({"max_tokens": 12, **body}).encode(),
            {"content-type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=PATIENCE) as response:
            text: str = response.read().decode()
            return text

    def completion(self) -> list[str]:
        """The words that are generated after a prompt."""
        answer = json.loads(self.post("/v1/completions", prompt="w1 w5 w7"))
        words: list[str] = answer["choices"][0]["text"].split()
        return words

    def stream(self) -> list[str]:
        """The same in a chat, word by word."""
        lines = self.post(
            "/v1/chat/completions",
            messages=[{"role": "user", "content": "w1 w5 w7"}],
            stream=True,
        ).splitlines()
        chunks = [json.loads(line.removeprefix("data: ")) for line in lines if line]
        pieces = [chunk["choices"][0]["delta"].get("content", "") for chunk in chunks]
        return "".join(pieces).split()


class Running:
    """`transformers serve` with one model, on a free port of this machine."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        from transformers.cli.serve import Serve

        monkeypatch.setattr(Serve, "start_server", lambda _: None)  # it leaves its loop open
        self.serve = Serve(str(folder), device="cpu", host="127.0.0.1", port=0, non_blocking=True)
        manager = self.serve._model_manager
        self.model, _ = manager.load_model_and_processor(manager.process_model_name(str(folder)))
        self.thread = threading.Thread(target=self.serve.server.run, daemon=True)

    def __enter__(self) -> Running:
        self.thread.start()
        end = time.monotonic() + PATIENCE
        while not self.serve.server.started:
            assert self.thread.is_alive()
            assert time.monotonic() < end
            time.sleep(0.01)
        [listening] = self.serve.server.servers[0].sockets
        self.client = Client(listening.getsockname()[1])
        return self

    def __exit__(self, *_: object) -> None:
        self.serve.server.should_exit = True
        self.thread.join(PATIENCE)
        assert not self.thread.is_alive()


@pytest.fixture
def running(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Running]:
    for package in ("fastapi", "openai", "pydantic", "uvicorn"):
        pytest.importorskip(package, reason=f"pip install transformers[serving]: no {package}")
    tokenizer = words()
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    tokenizer.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        llama().save_pretrained(tmp_path)
    with Running(tmp_path, monkeypatch) as server:
        yield server


def wanted(toy: Toy) -> dict[tuple[str, ...], list[str]]:
    """What each patched model says, as words."""
    tokenizer, found = words(), {}
    for names, plain in toy.plain.items():
        [tokens] = generate(plain, min_new_tokens=0)
        found[names] = tokenizer.decode(tokens[3:], skip_special_tokens=True).split()
    assert len(set(map(tuple, found.values()))) == len(SETS)
    return found


def test_a_server_switches_between_requests(running: Running) -> None:
    with Toy(running.model) as toy:
        for names, answer in wanted(toy).items():
            with toy.using(names):
                assert running.client.completion() == answer
                assert running.client.stream() == answer
    with Toy(running.model) as toy:  # it was detached, and can be attached again
        assert running.client.completion() == wanted(toy)[()]


def test_a_server_that_holds_while_it_generates(running: Running) -> None:
    """Two threads switch all the time; each answer is of what was live when it began."""
    stop, live = threading.Event(), []
    with Toy(running.model) as toy:
        answers = wanted(toy)
        plain = running.model.generate

        def held(*args: Any, **more: Any) -> Any:
            with toy.host.hold():
                live.append(toy.host.active)
                return plain(*args, **more)

        def switches(first: int) -> None:
            for number in itertools.count(first):
                if stop.wait(0.003):
                    return
                toy.activate(SETS[number % len(SETS)])

        running.model.generate = held
        with ThreadPoolExecutor(2) as pool:
            switching = [pool.submit(switches, first) for first in (0, 2)]
            try:
                for number in range(200):
                    ask = running.client.stream if number % 2 else running.client.completion
                    answer = ask()
                    assert answer == answers[live[-1]]
                    if number > 20 and len(set(live)) == len(SETS):
                        break
            finally:
                stop.set()
            for future in switching:
                future.result(PATIENCE)
        assert len(set(live)) == len(SETS)
