"""Live skills in transformers models: the fine-tuned model's outputs bit for bit, and back."""

from __future__ import annotations

import copy
import threading
import warnings
from collections.abc import Callable
from pathlib import Path

import factories
import pytest
import torch
from hosts import contents, holds
from hotgraft import attach, diff, fingerprint
from safetensors.torch import load_file
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

TINY = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 61,
}


def llama(dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        **TINY, num_key_value_heads=2, bos_token_id=1, eos_token_id=2, pad_token_id=0
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


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.inference_mode():
        return model(torch.arange(1, 25).view(2, 12)).logits.clone()


def generated(model: PreTrainedModel) -> list[int]:
    out = model.generate(
        torch.tensor([[1, 5, 7]]), max_new_tokens=12, min_new_tokens=12, do_sample=False
    )
    tokens: list[int] = out[0].tolist()
    return tokens


@pytest.mark.parametrize("make", [llama, bert])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outputs_are_the_fine_tuned_models(
    make: Callable[[torch.dtype], PreTrainedModel], dtype: torch.dtype
) -> None:
    model = make(dtype)
    base, before = contents(model), logits(model)
    tuned = {name: fine_tuned(model, seed) for seed, name in enumerate(("sql", "french"), 1)}
    host = attach(model, base_id=fingerprint(model))
    for name, other in tuned.items():
        graft = diff(model, other)
        assert 0.03 < graft.density < 0.06
        host.load(graft, name=name)
    assert torch.equal(logits(model), before)
    for name in ("sql", "french", "sql"):
        with host.using(name):
            assert torch.equal(logits(model), logits(tuned[name]))
            assert not torch.equal(logits(model), before)
    assert torch.equal(logits(model), before)
    assert holds(model, base)
    assert fingerprint(model) == host.base_id


def test_a_sparse_graft_of_the_largest_differences() -> None:
    model = llama()
    base = contents(model)
    graft = diff(model, fine_tuned(model, 1), density=0.01, scope="encoder")
    assert not any("embed" in name or "lm_head" in name for name in graft.names)
    host = attach(model)
    host.load(graft, name="top")
    host.activate("top")
    assert holds(model, factories.grafted(base, graft))
    host.deactivate()
    assert holds(model, base)


def test_generation_inside_a_hold_uses_one_set_of_weights() -> None:
    model = llama()
    tuned = fine_tuned(model, 1)
    wanted = {"base": generated(model), "a": generated(tuned)}
    assert wanted["base"] != wanted["a"]
    host = attach(model)
    host.load(diff(model, tuned), name="a")
    stop = threading.Event()

    def switch() -> None:
        while not stop.wait(0.001):
            host.activate(*(() if host.active else ("a",)))

    thread = threading.Thread(target=switch)
    thread.start()
    seen = set()
    try:
        for _ in range(200):
            with host.hold():
                live = host.active or ("base",)
                assert generated(model) == wanted[live[0]]
            seen.add(live[0])
            if len(seen) == 2:
                break
            stop.wait(0.005)
    finally:
        stop.set()
        thread.join()
    assert seen == {"base", "a"}


def test_save_pretrained_while_live_writes_the_fine_tuned_model(tmp_path: Path) -> None:
    model = llama()
    tuned = fine_tuned(model, 1)
    host = attach(model)
    host.load(diff(model, tuned), name="a")
    with warnings.catch_warnings(), host.using("a"):
        warnings.simplefilter("ignore")
        model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert factories.same_bits(saved, contents(tuned))
    again = LlamaForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(again), logits(tuned))
    assert host.active == ()


def test_training_goes_on_after_a_skill_was_in() -> None:
    model = llama()
    host = attach(model)
    host.load(diff(model, fine_tuned(model, 1)), name="a")
    with host.using("a"):
        logits(model)
    loss = model(torch.arange(1, 13).view(1, 12), labels=torch.arange(1, 13).view(1, 12)).loss
    loss.backward()
    host.detach()
    before = contents(model)
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert not holds(model, before)
