"""Writes and moves by others are found before a commit; others see the host's writes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable

import factories
import hotgraft
import pytest
import torch
from hosts import Workshop, contents, holds, single, versions
from hotgraft import attach
from hotgraft._native import first_replaced
from hotgraft.errors import HostChangedError
from hotgraft.placement import trace
from hotgraft.weights import open_weights
from torch import Tensor, nn


def optimiser_step(model: nn.Module) -> None:
    model.first.bias.grad = torch.ones(5)
    torch.optim.SGD([model.first.bias], lr=1.0).step()


def load_state_dict(model: nn.Module) -> None:
    model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()})


def in_place(model: nn.Module) -> None:
    with torch.no_grad():
        model.second.weight[0, 0] = 0


def buffer_in_place(model: nn.Module) -> None:
    model.step += 1


def data_swap(model: nn.Module) -> None:
    model.first.weight.data = model.first.weight.data.clone()


def new_parameter(model: nn.Module) -> None:
    model.first.weight = nn.Parameter(model.first.weight.detach().clone())


def removed(model: nn.Module) -> None:
    del model.first.weight


def new_module(model: nn.Module) -> None:
    model.first = copy.deepcopy(model.first)


def set_to_none(model: nn.Module) -> None:
    model.first.bias = None


def converted(model: nn.Module) -> None:
    model.double()


def converted_and_back(model: nn.Module) -> None:
    model.half()
    model.float()


def freed(model: nn.Module) -> None:
    model.first.weight.untyped_storage().resize_(0)


WRITES = [optimiser_step, load_state_dict, in_place, buffer_in_place]
MOVES = [
    data_swap,
    new_parameter,
    removed,
    new_module,
    set_to_none,
    converted,
    converted_and_back,
    freed,
]


@pytest.mark.parametrize("live", [(), ("a",)], ids=["base", "live"])
@pytest.mark.parametrize("change", WRITES + MOVES, ids=lambda change: change.__name__)
def test_detected_before_the_next_commit_with_nothing_written(
    change: Callable[[nn.Module], None], live: tuple[str, ...]
) -> None:
    shop = Workshop()
    shop.host.activate(*live)
    change(shop.model)
    held = shop.model.state_dict(keep_vars=True)
    before = {k: v.detach().clone() for k, v in held.items() if v.numel() and change is not freed}
    counters = versions(shop.model)
    pattern = "wrote to" if change in WRITES else "was replaced|was moved"
    for names in (("b",), ("a", "b"), live):
        if names:
            with pytest.raises(HostChangedError, match=pattern):
                shop.host.activate(*names, policy="priority")
    if live:
        with pytest.raises(HostChangedError, match=pattern):
            shop.host.deactivate()
    assert shop.host.active == live
    assert versions(shop.model) == counters
    after = shop.model.state_dict()
    assert factories.same_bits(before, {name: after[name] for name in before})
    shop.host.detach(force=True)


def test_messages_name_the_tensor_and_what_to_do() -> None:
    shop = Workshop()
    with torch.no_grad():
        shop.model.second.weight.add_(1)
    with pytest.raises(HostChangedError, match=r"'second.weight' \(its version went from \d+ to "):
        shop.host.activate("a")
    with pytest.raises(HostChangedError, match=r"host.verify\(\).*host.adopt\(\)"):
        shop.host.activate("a")
    data_swap(shop.model)
    with pytest.raises(HostChangedError, match=r"'first.weight' was moved .*attach again"):
        shop.host.activate("a")


def test_a_replaced_module_is_named() -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), nn.Linear(2, 2))
    host = attach(model)
    host.load(single("0.0.weight", model[0][0].weight, [1], [2.0]), name="deep")
    host.load(single("1.weight", model[1].weight, [1], [2.0]), name="flat")
    model[0][1] = nn.Tanh()  # holds nothing that is grafted
    host.activate("deep")
    model[0] = nn.Sequential(model[0][0])
    for call in (host.deactivate, host.verify):
        with pytest.raises(HostChangedError, match="the module '0' was replaced by another"):
            call()
    host.unload("flat")


def test_verify_lets_harmless_writes_pass() -> None:
    shop = Workshop()
    shop.host.activate("a")
    load_state_dict(shop.model)
    assert shop.host.verify()
    shop.host.activate("b")
    assert shop.is_b()
    shop.host.deactivate()
    assert shop.is_base()


def test_a_load_after_a_write_trusts_only_what_it_checked() -> None:
    shop = Workshop()
    load_state_dict(shop.model)
    shop.host.load(shop.a, name="c")
    with pytest.raises(HostChangedError):
        shop.host.activate("c")  # b was loaded before the write and is not checked anew
    shop.host.unload("a")
    shop.host.unload("b")
    shop.host.unload("c")
    shop.host.load(shop.a, name="c")  # now nobody relies on the time before
    shop.host.activate("c")
    assert shop.is_a()


def test_forced_detach_after_a_move_leaves_what_is_there() -> None:
    shop = Workshop()
    shop.host.activate("a")
    shop.model.double()
    moved = contents(shop.model)
    shop.host.detach(force=True)
    assert holds(shop.model, moved)
    assert "forward" not in vars(shop.model)


def test_using_reports_a_write_made_inside_and_the_host_goes_on() -> None:
    shop = Workshop()
    with pytest.raises(HostChangedError), shop.host.using("a"):
        load_state_dict(shop.model)
    assert shop.host.active == ("a",)
    shop.host.verify()
    shop.host.deactivate()
    assert shop.is_base()
    shop.host.unload("a")


def test_every_commit_moves_the_version_counters_of_what_it_writes() -> None:
    shop = Workshop()
    graft = single("first.bias", shop.base["first.bias"], [0], [4.0])
    shop.host.load(graft, name="c")
    before = versions(shop.model)
    shop.host.activate("c")
    after = versions(shop.model)
    assert after.pop("first.bias") > before.pop("first.bias")
    assert after == before


def test_an_autograd_graph_that_saved_the_weights_raises() -> None:
    shop = Workshop()
    loss = shop.model(torch.ones(6, requires_grad=True)).float().sum()
    shop.host.activate("a")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    assert all(p.requires_grad and p.is_leaf for p in shop.model.parameters())
    shop.host.deactivate()
    shop.model(torch.ones(6)).float().sum().backward()


def test_works_in_inference_and_no_grad_mode() -> None:
    for mode in (torch.inference_mode, torch.no_grad):
        shop = Workshop()
        with mode():
            shop.host.activate("a")
            assert shop.is_a()
            shop.host.load(factories.graft_on(shop.base, seed=9), name="c")
        shop.host.deactivate()
        assert shop.is_base()


def test_inference_tensors_have_no_counters_but_verify_sees() -> None:
    with torch.inference_mode():
        model = nn.Linear(3, 3)
        base = contents(model)
        assert model.weight.is_inference()
    host = attach(model)
    host.load(single("weight", base["weight"], [1, 4], [2.0, 3.0]), name="a")
    host.activate("a")
    assert model.weight[1, 1].item() == 3.0
    with torch.inference_mode():
        model.weight[1, 1] = 4.0
    with pytest.raises(HostChangedError, match="position 4"):
        host.verify()
    host.deactivate()
    assert holds(model, base)


def test_a_host_does_not_keep_a_dropped_model_alive() -> None:
    import gc
    import weakref

    shop = Workshop()
    gone = weakref.ref(shop.model)
    del shop
    gc.collect()
    assert gone() is None


def test_first_replaced_looks_at_objects_and_refuses_other_arguments() -> None:
    one, other = [0], [0]
    owners, keys = ({"a": one}, {"b": other}, {}), ("a", "b", "c")
    assert first_replaced(owners[:2], keys[:2], (one, other)) == -1
    assert first_replaced(owners[:2], keys[:2], (one, one)) == 1
    assert first_replaced(owners, keys, (one, other, None)) == 2
    with pytest.raises(ValueError, match="must be as many"):
        first_replaced(owners, keys, (one,))
    with pytest.raises(ValueError, match="owners must be dicts"):
        first_replaced(([],), ("a",), (one,))


@pytest.mark.parametrize("replaces", [False, True])
def test_a_host_goes_on_after_a_trace(replaces: bool) -> None:
    model = nn.Linear(4, 3, bias=False)
    state = {"w": torch.randn(3, 4)}
    model.weight.data.copy_(state["w"])
    host = hotgraft.attach(model)
    host.load(hotgraft.diff({"weight": state["w"]}, {"weight": state["w"] + 1}), name="up")
    host.activate("up")
    version = model.weight._version

    @torch.no_grad()
    def load(weights: Iterable[tuple[str, Tensor]]) -> None:
        for _, tensor in weights:
            model.weight.copy_(tensor)
            if replaces:
                model.weight.data = model.weight.data.clone()

    with open_weights(state) as weights:
        trace(model, load, weights.specs)
    assert model.weight._version == version
    host.deactivate()
    assert torch.equal(model.weight, state["w"])
    with torch.no_grad():
        model.weight.add_(1)  # a real write is seen as ever
    with pytest.raises(HostChangedError):
        host.activate("up")
