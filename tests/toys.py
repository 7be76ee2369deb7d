"""Tiny transformers models with random weights, skills for them, and models to compare with."""

from __future__ import annotations

import copy
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Any

import factories
import torch
from hosts import contents, holds
from hotgraft import Graft, attach, diff, fingerprint
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

TINY = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 61,
}
PATIENCE = 30.0
SETS = ((), ("a",), ("b",), ("a", "b"))
"""What may be live. Two skills meet under `priority`: where both write, the last one's bits."""


def llama(dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        **TINY,
        num_key_value_heads=2,
        initializer_range=0.4,  # less, and it says the same word again and again
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).to(dtype).eval()


def bert(dtype: torch.dtype = torch.float32) -> BertForSequenceClassification:
    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(**TINY, num_labels=3)).to(dtype).eval()


def fine_tuned(model: PreTrainedModel, seed: int) -> PreTrainedModel:
    """A copy with some weights moved, as training would."""
    tuned = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in tuned.parameters():
            chosen = torch.rand(parameter.shape, generator=generator) < 0.05
            step = torch.randn(parameter.shape, generator=generator) * 0.3
            parameter.add_((step * chosen).to(parameter.dtype))
    return tuned


def generate(model: PreTrainedModel, **more: Any) -> Any:
    settings: dict[str, Any] = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    prompt = torch.tensor([[1, 5, 7]])
    return model.generate(prompt, attention_mask=torch.ones_like(prompt), **(settings | more))


def generated(model: PreTrainedModel, **more: Any) -> list[int]:
    tokens: list[int] = generate(model, **more)[0].tolist()
    return tokens


def words() -> PreTrainedTokenizerFast:
    """A tokenizer that has a word for each token, so equal texts are equal tokens."""
    model = WordLevel({f"w{i}": i for i in range(TINY["vocab_size"])}, unk_token="w3")
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="w0", bos_token="w1", eos_token="w2", unk_token="w3"
    )


class Toy:
    """A language model with the skills `a` and `b`, and plain models that hold what it may hold.

    As a context: the model must hold the base's bits when it is left.
    """

    def __init__(self, model: PreTrainedModel | None = None) -> None:
        self.model = llama() if model is None else model
        self.base = contents(self.model)
        grafts: dict[str, Graft] = {
            name: diff(self.model, fine_tuned(self.model, seed))
            for seed, name in enumerate(("a", "b"), 1)
        }
        self.plain = {names: self._holding([grafts[n] for n in names]) for names in SETS}
        self.host = attach(self.model, base_id=fingerprint(self.model))
        for name, graft in grafts.items():
            self.host.load(graft, name=name)
        self.other = ThreadPoolExecutor(1)
        """A thread that switches."""

    def _holding(self, grafts: list[Graft]) -> PreTrainedModel:
        """A copy of the model with grafts written by plain torch."""
        plain = copy.deepcopy(self.model)
        for graft in grafts:
            patched = factories.grafted(contents(plain), graft)
            # Of tied tensors a graft names one.
            plain.load_state_dict({name: patched[name] for name in graft.names}, strict=False)
        return plain

    def __enter__(self) -> Toy:
        return self

    def __exit__(self, *_: object) -> None:
        self.other.shutdown()
        self.host.verify()
        self.host.detach(force=True)
        assert holds(self.model, self.base)

    def using(self, names: tuple[str, ...]) -> AbstractContextManager[None]:
        return self.host.using(*names, policy="priority")

    def activate(self, names: tuple[str, ...]) -> None:
        self.host.activate(*names, policy="priority")

    def switch(self, *names: str) -> Future[None]:
        """Ask the other thread to make these skills live."""
        return self.other.submit(self.activate, names)

    def until_it_waits(self) -> None:
        """Return when the other thread's commit is at the gate."""
        end = time.monotonic() + PATIENCE
        while not self.host._gate._front.locked():
            assert time.monotonic() < end
            time.sleep(0.001)
