"""`generate` on a live model: what the patched model generates, under threads too."""

from __future__ import annotations

import copy
import itertools
import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
import torch
from hosts import holds
from hotgraft import fingerprint
from toys import PATIENCE, SETS, Toy, generate, generated, words
from transformers import (
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
    TextIteratorStreamer,
)
from transformers.generation.streamers import BaseStreamer

WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "without a cache": {"use_cache": False},
    "static cache": {"cache_implementation": "static"},
    "beams": {"num_beams": 3},
    "sampling": {"do_sample": True, "temperature": 1.3, "top_k": 20},
}


@pytest.fixture
def toy() -> Iterator[Toy]:
    with Toy() as made:
        yield made


@pytest.mark.parametrize("way", WAYS)
def test_generate_gives_what_the_patched_model_gives(toy: Toy, way: str) -> None:
    settings = {**WAYS[way], "return_dict_in_generate": True, "output_logits": True}
    sequences = set()
    for names in (*SETS, ()):
        torch.manual_seed(7)
        wanted = generate(toy.plain[names], **settings)
        torch.manual_seed(7)
        with toy.using(names):
            live = generate(toy.model, **settings)
        assert torch.equal(live.sequences, wanted.sequences)
        assert torch.equal(torch.stack(live.logits), torch.stack(wanted.logits))
        sequences.add(tuple(live.sequences[0].tolist()))
    assert len(sequences) == len(SETS)


class Between(BaseStreamer):
    """Does something between the forward passes of a generation, before the one of that number."""

    def __init__(self, work: Callable[[int], object]) -> None:
        self.work, self.passes = work, 0

    def put(self, _: torch.Tensor) -> None:
        """Called with the prompt, then with each token."""
        self.work(self.passes)
        self.passes += 1

    def end(self) -> None:
        """Nothing to do."""


def test_a_switch_goes_in_between_two_forward_passes(toy: Toy) -> None:
    """Without a hold: the next token is the new skill's, from a cache that the base filled."""

    def work(number: int) -> None:
        if number == 4:
            toy.switch("a").result(PATIENCE)

    live = generated(toy.model, streamer=Between(work))
    begun = generate(
        toy.plain[()], max_new_tokens=4, min_new_tokens=4, return_dict_in_generate=True
    )
    wanted = toy.plain["a",].generate(
        begun.sequences,
        attention_mask=torch.ones_like(begun.sequences),
        past_key_values=begun.past_key_values,
        max_new_tokens=8,
        min_new_tokens=8,
        do_sample=False,
    )
    assert live == wanted[0].tolist()
    assert live not in [generated(plain) for plain in toy.plain.values()]


def test_a_hold_keeps_a_generation_on_one_set_of_weights(toy: Toy) -> None:
    asked: list[Future[None]] = []

    def work(number: int) -> None:
        if number == 4:
            asked.append(toy.switch("a"))
            toy.until_it_waits()
        if asked:
            assert toy.host.active == ()
            assert not asked[0].done()

    between = Between(work)
    with toy.host.hold():
        assert generated(toy.model, streamer=between) == generated(toy.plain[()])
    assert between.passes == 13
    asked[0].result(PATIENCE)
    assert toy.host.active == ("a",)
    assert generated(toy.model) == generated(toy.plain["a",])


def test_a_hold_keeps_a_stream_on_one_set_of_weights(toy: Toy) -> None:
    tokenizer = words()
    wanted = tokenizer.decode(generated(toy.plain["a",])[3:], skip_special_tokens=True)
    streamer = TextIteratorStreamer(
        tokenizer, skip_prompt=True, timeout=PATIENCE, skip_special_tokens=True
    )
    toy.host.activate("a")

    def produce() -> None:
        with toy.host.hold():
            generate(toy.model, streamer=streamer)

    with ThreadPoolExecutor(1) as pool:
        produced = pool.submit(produce)
        text = next(streamer)  # it generates
        switched = toy.switch("b")
        text += "".join(streamer)
        produced.result(PATIENCE)
    switched.result(PATIENCE)
    assert text.split() == wanted.split()
    assert toy.host.active == ("b",)


def test_a_prefix_cache_is_good_for_one_digest(toy: Toy) -> None:
    prefix = torch.tensor([[1, *range(10, 30)]])
    caches: dict[str, Any] = {}

    def continued(model: PreTrainedModel, cache: Any) -> list[int]:
        prompt = torch.cat([prefix, torch.tensor([[5, 7]])], dim=1)
        out = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            past_key_values=copy.deepcopy(cache),  # it is written to
            max_new_tokens=12,
            min_new_tokens=12,
            do_sample=False,
        )
        tokens: list[int] = out[0].tolist()
        return tokens

    def filled(model: PreTrainedModel) -> Any:
        with torch.inference_mode():
            return model(prefix, use_cache=True).past_key_values

    wanted = {names: continued(plain, filled(plain)) for names, plain in toy.plain.items()}
    for names in SETS * 2:
        with toy.using(names):
            key = toy.host.digest
            if key not in caches:
                caches[key] = filled(toy.model)
            assert continued(toy.model, caches[key]) == wanted[names]
    assert len(caches) == len(SETS)
    base = caches[toy.host.digest]
    with toy.using(("a",)):  # what an old cache would lead to
        assert continued(toy.model, base) != wanted["a",]


class Switchers:
    """Threads that make one set after another live, by `activate` and by `using`."""

    def __init__(self, toy: Toy, count: int) -> None:
        self.toy, self.stop = toy, threading.Event()
        self.pool = ThreadPoolExecutor(count)
        self.running = [self.pool.submit(self.run, random.Random(seed)) for seed in range(count)]

    def run(self, chosen: random.Random) -> int:
        for count in itertools.count():
            if self.stop.wait(0.002):
                return count
            if chosen.random() < 0.5:
                self.toy.activate(chosen.choice(SETS))
            else:
                with self.toy.using(chosen.choice(SETS)):
                    self.stop.wait(0.002)
        raise AssertionError

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        assert all(future.result(PATIENCE) > 0 for future in self.running)
        self.pool.shutdown()


def by_three_threads(work: Callable[[], tuple[str, ...]]) -> None:
    """Do some work again and again, until each set was what it saw, and a while longer."""
    seen: list[tuple[str, ...]] = []

    def again() -> None:
        for _ in range(400):
            seen.append(work())
            if len(set(seen)) == len(SETS) and len(seen) > 40:
                break

    with ThreadPoolExecutor(3) as pool:
        for future in [pool.submit(again) for _ in range(3)]:
            future.result(PATIENCE)
    assert set(seen) == set(SETS)


def test_many_threads_generate_while_many_switch(toy: Toy) -> None:
    wanted = {names: generated(plain) for names, plain in toy.plain.items()}

    def work() -> tuple[str, ...]:
        with toy.host.hold():
            live = toy.host.active
            assert generated(toy.model) == wanted[live]
        return live

    with Switchers(toy, 3):
        by_three_threads(work)
    toy.host.deactivate()
    assert holds(toy.model, toy.base)
    assert fingerprint(toy.model) == toy.host.base_id


def test_no_pass_is_a_mixture_while_many_switch(toy: Toy) -> None:
    """Without a hold, each forward pass is of one set still."""
    prompt = torch.tensor([[1, 5, 7, 9]])

    def logits(model: PreTrainedModel) -> torch.Tensor:
        with torch.inference_mode():
            return model(prompt).logits

    wanted = {names: logits(plain) for names, plain in toy.plain.items()}
    for layer in toy.model.model.layers:
        layer.register_forward_hook(lambda *_: time.sleep(0.002))  # time for a switch

    def work() -> tuple[str, ...]:
        found = logits(toy.model)
        [names] = [names for names, each in wanted.items() if torch.equal(found, each)]
        return names

    with Switchers(toy, 3):
        by_three_threads(work)


def test_an_encoder_is_called_past_the_gate() -> None:
    """So a hold goes around the whole `generate` of an encoder-decoder model."""
    torch.manual_seed(0)
    config = T5Config(
        d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=61,
        decoder_start_token_id=0, initializer_factor=3.0,
    )  # fmt: skip
    with Toy(T5ForConditionalGeneration(config).eval()) as toy:
        inside: list[int] = []
        toy.model.encoder.register_forward_hook(lambda *_: inside.append(toy.host._gate.passes))
        for names in SETS:
            with toy.using(names), toy.host.hold():
                assert generated(toy.model) == generated(toy.plain[names])
        generated(toy.model)
        assert inside == [1, 1, 1, 1, 0]
