"""Live skills in transformers models: the fine-tuned model's outputs bit for bit, and back."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import factories
import pytest
import torch
from hosts import contents, holds
from hotgraft import attach, diff, fingerprint
from safetensors.torch import load_file
from toys import bert, fine_tuned, llama
from transformers import LlamaForCausalLM, PreTrainedModel


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.inference_mode():
        return model(torch.arange(1, 25).view(2, 12)).logits.clone()


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
