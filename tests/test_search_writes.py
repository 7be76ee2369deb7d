"""Candidates: what others write meanwhile is found, and what no loss reached is named."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import searching
import torch
from hosts import holds
from hotgraft import diff
from hotgraft.errors import BaseMismatchError, HostChangedError
from hotgraft.search.candidates import Candidates
from searching import batches, loss, pair, tuned_for
from searching_models import Experts

pytestmark = pytest.mark.usefixtures("one_thread")

BATCH = batches(1)[0]


def half_way(candidates: Candidates, used: Any) -> None:
    """A step with all gates at 1/2."""
    candidates.write(torch.full((candidates.count,), 0.5))
    candidates.differentiate(used, BATCH, "step 3")


def rewritten(how: str, state: Any) -> Callable[[Any, Any], torch.Tensor]:
    """A loss that writes weights, in the forward or the backward pass."""

    def used(model: Any, batch: Any) -> torch.Tensor:
        if how == "load":
            model.load_state_dict(state)
        elif how == "hook":
            model.layers[0].weight.register_post_accumulate_grad_hook(step)
        return loss(model, batch)

    def step(weight: torch.Tensor) -> None:
        with torch.no_grad():
            weight.fill_(5)

    return used


@pytest.mark.parametrize("how", ["load", "hook"])
@pytest.mark.parametrize("writes", [False, True])
def test_a_loss_that_writes_weights(how: str, writes: bool) -> None:
    model, base, tuned, _ = pair()
    graft = diff(base, tuned, count=40)
    other = {name: torch.full_like(tensor, 5) for name, tensor in base.items()}
    wanted = dict(base) if how == "hook" else dict(other)
    wanted["layers.0.weight"] = other["layers.0.weight"]
    for name in graft.names:  # the candidates' cells get the base back, the others keep the write
        wanted[name] = wanted[name].clone()
        wanted[name].view(-1)[graft[name].indices] = graft[name].old
    versions = [p._version for p in model.parameters()]

    def attempt(candidates: Candidates) -> None:
        half_way(candidates, rewritten(how, other))
        if writes:
            candidates.write(torch.ones(candidates.count))
            pytest.fail("this write finds it")

    says = r"somebody wrote to '.*' .*what else was written stays.* Load the base again"
    with pytest.raises(HostChangedError, match=says), Candidates(model, graft) as candidates:
        attempt(candidates)
    assert holds(model, wanted)
    assert [p._version for p in model.parameters()] != versions


def test_weights_written_before_entering() -> None:
    model, base, _, graft = pair()
    candidates = Candidates(model, graft)
    with torch.no_grad():
        model.head.bias.add_(1)
    before = searching.snapshot(model)
    says = f"^{len(graft['head.bias'].indices)} of {graft.nnz} candidates do not hold the base's"
    with pytest.raises(BaseMismatchError, match=says):
        candidates.__enter__()
    assert searching.is_as_before(model, before)
    model.load_state_dict(base)
    with candidates:
        half_way(candidates, loss)
    assert holds(model, base)


def test_which_tensors_no_loss_reached() -> None:
    model = Experts()
    with Candidates(model, diff(model, tuned_for(model))) as candidates:
        assert candidates.unreached() == []
        candidates.differentiate(loss, BATCH, "here")
        left = candidates.unreached()
        assert left
        assert all(name.startswith(("experts.2", "layers.1")) for name in left)
        for name in left:  # reached once is reached
            p = model.get_parameter(name)
            p.grad = torch.zeros_like(p)
            candidates._take(p)
        candidates.differentiate(loss, BATCH, "here")
        assert candidates.unreached() == []
