"""Tracing a loader: what it slices, packs, transposes and repeats, and what it computes instead."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import hotgraft
import pytest
import torch
from hotgraft.errors import (
    BaseMismatchError,
    CoverageError,
    GraftError,
    LayoutError,
)
from hotgraft.graft import Entries, Graft
from hotgraft.placement import Trace, trace
from hotgraft.weights import open_weights
from torch import Tensor, nn

Load = Callable[[Iterable[tuple[str, Tensor]]], Any]
State = dict[str, Tensor]


def weight(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.bfloat16)


class Server(nn.Module):
    """The layouts that servers use: packed, transposed, fused, padded, strided, tied."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Parameter(torch.zeros(12, 8, dtype=torch.bfloat16))
        self.turned = nn.Parameter(torch.zeros(8, 5, dtype=torch.bfloat16))
        self.experts = nn.Parameter(torch.zeros(3, 8, 4, dtype=torch.bfloat16))
        self.padded = nn.Parameter(torch.full((10, 4), 7, dtype=torch.bfloat16))
        self.strided = nn.Parameter(torch.zeros(6, 7, dtype=torch.bfloat16).t())
        self.scalar = nn.Parameter(torch.zeros((), dtype=torch.bfloat16))
        self.again = nn.Parameter(torch.zeros(2, 4, 4, dtype=torch.bfloat16))
        self.head = self.padded

    def load(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        rows = {"q": (0, 6), "k": (6, 3), "v": (9, 3)}
        for name, tensor in weights:
            if name in rows:
                self.qkv.data.narrow(0, *rows[name]).copy_(tensor)
            elif name == "turned":
                self.turned.data.copy_(tensor.t())
            elif name.startswith("expert"):
                self.experts.data[int(name[-1])].copy_(tensor.view(8, 4))
            elif name == "padded":
                self.padded.data[:9].copy_(tensor)
                self.padded.data[9:].fill_(0)
            elif name == "strided":
                self.strided.data.copy_(tensor)
            elif name == "scalar":
                self.scalar.data.copy_(tensor.reshape(()))
            elif name == "again":
                for copy in self.again.data:
                    copy.copy_(tensor)


def checkpoint() -> State:
    return {
        "q": weight(6, 8),
        "k": weight(3, 8),
        "v": weight(3, 8),
        "turned": weight(5, 8),
        **{f"expert{i}": weight(32) for i in range(3)},
        "padded": weight(9, 4),
        "strided": weight(7, 6),
        "scalar": weight(1),
        "again": weight(4, 4),
        "unused": weight(2, 2),
    }


def tuned(state: State) -> State:
    """Another checkpoint, which differs everywhere in a part of the entries."""
    chosen = {name: torch.rand(t.shape) < 0.4 for name, t in state.items()}
    for mask in chosen.values():
        mask.view(-1)[0] = True
    return {n: torch.where(chosen[n], t + 1, t) for n, t in state.items() if n != "unused"}


def traced(model: nn.Module, load: Load, state: State) -> Trace:
    with open_weights(state) as weights:
        found = trace(model, load, weights.specs)
        found.verify(weights)
    return found


def bits(model: nn.Module) -> State:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.fixture
def state() -> State:
    torch.manual_seed(0)
    return checkpoint()


@pytest.fixture
def server(state: State) -> Server:
    model = Server()
    model.load(state.items())
    return model


def test_a_placed_graft_is_what_the_loader_would_have_loaded(server: Server, state: State) -> None:
    before = bits(server)
    found = traced(server, server.load, state)
    assert not found.refused
    after = bits(server)
    assert all(torch.equal(before[name], after[name]) for name in before)  # nothing was loaded

    other = tuned(state)
    graft = hotgraft.diff({n: state[n] for n in other}, other)
    placed, which = found.place(graft, server)
    assert which.all()
    assert placed.nnz == graft.nnz + len(graft["again"].indices)  # that tensor lies there twice
    host = hotgraft.attach(server)
    host.load(placed, name="tuned")
    host.activate("tuned")
    live = bits(server)
    host.deactivate()
    assert all(torch.equal(before[name], p) for name, p in bits(server).items())
    server.load(other.items())
    assert all(torch.equal(live[name], p) for name, p in bits(server).items())


def test_a_shard_takes_its_part(state: State) -> None:
    class Shard(nn.Module):
        def __init__(self, rank: int) -> None:
            super().__init__()
            self.rank = rank
            self.columns = nn.Parameter(torch.zeros(6, 4, dtype=torch.bfloat16))

        def load(self, weights: Iterable[tuple[str, Tensor]]) -> None:
            for _, tensor in weights:
                self.columns.data.copy_(tensor.narrow(1, 4 * self.rank, 4))

    state = {"q": state["q"]}
    other = tuned(state)
    graft = hotgraft.diff(state, other)
    held = []
    for rank in range(2):
        model = Shard(rank)
        model.load(state.items())
        placed, which = traced(model, model.load, state).place(graft, model)
        held.append(which)
        host = hotgraft.attach(model)
        host.load(placed, name="tuned")
        host.activate("tuned")
        assert torch.equal(model.columns, other["q"][:, 4 * rank : 4 * rank + 4])
    assert (held[0] ^ held[1]).all()


def test_a_shard_may_hold_nothing_of_a_graft(state: State) -> None:
    model = nn.Linear(8, 2, bias=False, dtype=torch.bfloat16)

    def load(weights: Iterable[tuple[str, Tensor]]) -> None:
        for _, tensor in weights:
            model.weight.data.copy_(tensor[:2])

    load([("q", state["q"])])
    found = traced(model, load, {"q": state["q"]})
    last = torch.tensor([47])
    values = state["q"].view(-1)[last]
    graft = Graft.from_entries({"q": Entries(last, values + 1, values, (6, 8))})
    placed, which = found.place(graft, model)
    assert not which.any()
    assert placed.nnz == 0
    host = hotgraft.attach(model, base_id=hotgraft.fingerprint(model))
    host.load(placed, name="elsewhere")
    full = Graft.from_entries(
        {"q": Entries(torch.tensor([0]), values, state["q"].view(-1)[:1], (6, 8))}
    )
    host.load(found.place(full, model)[0], name="here")
    host.activate("elsewhere")
    assert host.active == ("elsewhere",)
    host.activate("elsewhere", "here")
    assert model.weight.view(-1)[0] == values[0]
    host.activate("elsewhere")
    host.verify()
    host.deactivate()
    assert torch.equal(model.weight, state["q"][:2])


# ---- what is no plain copy -----------------------------------------------------------------------


def scaled(target: Tensor, tensor: Tensor) -> None:
    target.copy_(tensor * 2)


def added(target: Tensor, tensor: Tensor) -> None:
    target.add_(tensor)


def joined(target: Tensor, tensor: Tensor) -> None:
    target.copy_(torch.cat([tensor[1:], tensor[:1]]))


def spread(target: Tensor, tensor: Tensor) -> None:
    target.copy_(tensor[:1])


def by_value(target: Tensor, tensor: Tensor) -> None:
    target.fill_(tensor.view(-1)[0].item())


def staged(target: Tensor, tensor: Tensor) -> None:
    stage = torch.zeros_like(target)
    stage.copy_(tensor)
    target.copy_(stage)


def many(target: Tensor, tensor: Tensor) -> None:
    torch._foreach_copy_([target], [tensor])


def into(target: Tensor, tensor: Tensor) -> None:
    torch.neg(tensor, out=target)


@pytest.mark.parametrize(
    ("way", "says"),
    [
        (many, "computed"),
        (into, "computed"),
        (scaled, "computed"),
        (added, "computed"),
        (joined, "computed"),
        (spread, "many places"),
        (by_value, "values decide"),
        (staged, "no parameter's"),
    ],
)
def test_what_is_computed_is_refused_by_name(
    way: Callable[[Tensor, Tensor], None], says: str
) -> None:
    model = nn.ParameterDict({"a": torch.zeros(3, 4), "b": torch.zeros(3, 4)})
    state = {"a": torch.randn(3, 4), "b": torch.randn(3, 4)}

    def load(weights: Iterable[tuple[str, Tensor]]) -> None:
        for name, tensor in weights:
            (way if name == "a" else Tensor.copy_)(model[name].data, tensor)

    load(state.items())
    before = bits(model)
    found = traced(model, load, state)
    assert set(found.refused) == {"a"}
    after = bits(model)
    assert all(torch.equal(before[name], after[name]) for name in before)
    placed, _ = found.place(hotgraft.diff({"b": state["b"]}, {"b": state["b"] + 1}), model)
    assert placed.nnz == 12
    with pytest.raises(LayoutError, match=rf"'a' cannot be grafted .*{says}"):
        found.place(hotgraft.diff({"a": state["a"]}, {"a": state["a"] + 1}), model)


def test_what_is_overwritten_is_refused() -> None:
    model = nn.ParameterDict({"a": torch.zeros(3, 4), "b": torch.zeros(3, 4)})

    def load(weights: Iterable[tuple[str, Tensor]]) -> None:
        every = dict(weights)
        model["a"].data.copy_(every["a"])
        model["a"].data.clamp_(-1, 1)
        model["b"].data[:2].copy_(every["b"][:2])
        model["b"].data[2:].fill_(0)  # of nobody

    state = {"a": torch.rand(3, 4), "b": torch.rand(3, 4)}
    load(state.items())
    assert set(traced(model, load, state).refused) == {"a"}


def test_a_checkpoint_that_is_changed_on_the_way_is_refused() -> None:
    model = nn.ParameterDict({"a": torch.zeros(3, 4)})

    def load(weights: Iterable[tuple[str, Tensor]]) -> None:
        for name, tensor in weights:
            tensor.clamp_(-1, 1)
            model[name].data.copy_(tensor)

    state = {"a": torch.rand(3, 4)}
    load([(n, t.clone()) for n, t in state.items()])
    assert "changed before" in traced(model, load, state).refused["a"]


def test_a_copy_beside_the_parameter_is_refused() -> None:
    model = nn.Linear(4, 3, bias=False)
    cache = torch.zeros(3, 4)

    def load(weights: Iterable[tuple[str, Tensor]]) -> None:
        for _, tensor in weights:
            model.weight.data.copy_(tensor)
            cache.copy_(tensor)

    state = {"w": torch.rand(3, 4)}
    load(state.items())
    assert "no parameter's" in traced(model, load, state).refused["w"]


def test_a_copy_as_other_elements_is_refused() -> None:
    model = nn.Linear(4, 3, bias=False)

    def load(weights: Iterable[tuple[str, Tensor]]) -> None:
        for _, tensor in weights:
            model.weight.data.view(torch.int64).copy_(tensor.view(torch.int64))

    state = {"w": torch.rand(3, 4)}
    load(state.items())
    assert "another size" in traced(model, load, state).refused["w"]


def test_a_parameter_that_is_replaced_comes_back() -> None:
    model = nn.Linear(4, 3, bias=False)
    weight = model.weight

    def load(weights: Iterable[tuple[str, Tensor]]) -> None:
        for _, tensor in weights:
            model.weight = nn.Parameter(tensor.clone())

    with open_weights({"w": torch.rand(3, 4)}) as weights:
        found = trace(model, load, weights.specs)
    assert model.weight is weight
    assert not found.regions


def test_constants_are_not_written_either() -> None:
    model = nn.ParameterDict({"a": torch.zeros(3, 4), "b": torch.ones(3, 4)})

    def load(weights: Iterable[tuple[str, Tensor]]) -> None:
        for name, tensor in weights:
            torch.full((3, 4), 7.0, out=model["b"].data)
            torch._foreach_add_([model["b"].data], 1.0)
            model["b"].data.random_()
            model[name].data.copy_(tensor)

    state = {"a": torch.randn(3, 4)}
    with open_weights(state) as weights:
        found = trace(model, load, weights.specs)
    assert torch.equal(model["b"], torch.ones(3, 4))
    assert set(found.regions) == {"a"}


def test_parts_of_one_parameter_in_two_precisions(server: Server, state: State) -> None:
    found = traced(server, server.load, state)
    zeros = {"q": torch.zeros(6, 8, dtype=torch.bfloat16), "k": torch.zeros(3, 8)}
    graft = hotgraft.diff(zeros, {name: tensor + 1 for name, tensor in zeros.items()})
    with pytest.raises(BaseMismatchError, match="'qkv' holds 'k', 'q' here"):
        found.place(graft, server)


def test_what_was_repacked_after_loading_is_refused(server: Server, state: State) -> None:
    with torch.no_grad():
        server.experts[1] = server.experts[1].flip(0)
    found = traced(server, server.load, state)
    assert set(found.refused) == {"expert1"}
    assert "repacked" in found.refused["expert1"]


def test_bits_are_compared_and_not_values(state: State) -> None:
    model = nn.Linear(8, 6, bias=False, dtype=torch.bfloat16)
    state = {"q": state["q"]}
    state["q"][0, 0], state["q"][0, 1] = float("nan"), 0.0

    def load(weights: Iterable[tuple[str, Tensor]]) -> None:
        for _, tensor in weights:
            model.weight.data.copy_(tensor)

    load(state.items())
    assert not traced(model, load, state).refused
    with torch.no_grad():
        model.weight[0, 1] = -0.0
    assert set(traced(model, load, state).refused) == {"q"}


def test_a_loader_that_replaces_storage_is_undone() -> None:
    model = nn.Linear(3, 2, bias=False)
    state = {"w": torch.randn(2, 3)}

    def load(weights: Iterable[tuple[str, Tensor]]) -> None:
        for _, tensor in weights:
            model.weight.data.copy_(tensor)
            model.weight.data = model.weight.data.clone()

    load(state.items())
    address = model.weight.data_ptr()
    with open_weights(state) as weights:
        found = trace(model, load, weights.specs)
    assert model.weight.data_ptr() == address
    assert "replaced" in found.refused["w"]


def test_a_loader_that_fails_is_named() -> None:
    model = nn.Linear(3, 2, bias=False)

    def load(weights: Iterable[tuple[str, Tensor]]) -> None:
        for name, tensor in weights:
            if name == "late":
                raise RuntimeError("no such parameter")
            model.weight.data.copy_(tensor)

    with (
        open_weights({"w": torch.zeros(2, 3), "late": torch.zeros(1)}) as weights,
        pytest.raises(LayoutError, match=r"Linear cannot be traced: at 'late' .*no such parameter"),
    ):
        trace(model, load, weights.specs)


def test_a_checkpoint_of_another_precision() -> None:
    model = nn.Linear(8, 6, bias=False, dtype=torch.bfloat16)
    wide = {"q": torch.randn(6, 8)}

    def load(weights: Iterable[tuple[str, Tensor]]) -> None:
        for _, tensor in weights:
            model.weight.data.copy_(tensor)

    load(wide.items())
    found = traced(model, load, wide)
    assert not found.refused
    placed, _ = found.place(hotgraft.diff(wide, {"q": wide["q"] + 1}), model)
    host = hotgraft.attach(model)
    with pytest.raises(BaseMismatchError, match="cast=True"):
        host.load(placed)
    host.load(placed, name="cast", cast=True)
    host.activate("cast")
    assert torch.equal(model.weight, (wide["q"] + 1).bfloat16())


# ---- bad input -----------------------------------------------------------------------------------


def test_a_graft_of_something_else(server: Server, state: State) -> None:
    found = traced(server, server.load, state)

    def graft(name: str, *shape: int) -> Graft:
        zeros = torch.zeros(shape, dtype=torch.bfloat16)
        return hotgraft.diff({name: zeros}, {name: zeros + 1})

    with pytest.raises(CoverageError, match="host lacks 'nobody'"):
        found.place(graft("nobody", 2, 2), server)
    with pytest.raises(BaseMismatchError, match=r"'q' has shape \[8, 6\] .* \[6, 8\]"):
        found.place(graft("q", 8, 6), server)
    with pytest.raises(LayoutError, match="'unused' is not loaded by this server"):
        found.place(graft("unused", 2, 2), server)
    with pytest.raises(
        GraftError, match=r"'q.safetensors' is no Graft; Graft.load\(path\) reads one"
    ):
        found.place("q.safetensors", server)  # type: ignore[arg-type]
    with pytest.raises(CoverageError, match="names 3: wanted a mapping"):
        found.place(graft("q", 6, 8), server, 3)  # type: ignore[arg-type]
    placed, which = found.place(graft("Q", 6, 8), server, {"Q": "q"})
    assert which.all()
    assert placed.names == ("qkv",)


def test_tied_tensors_have_to_agree() -> None:
    model = nn.Linear(4, 3, bias=False)
    state = {"embed": torch.randn(3, 4)}
    state["head"] = state["embed"].clone()

    def load(weights: Iterable[tuple[str, Tensor]]) -> None:
        for _, tensor in weights:
            model.weight.data.copy_(tensor)

    load(state.items())
    found = traced(model, load, state)
    both = {name: tensor + 1 for name, tensor in state.items()}
    placed, which = found.place(hotgraft.diff(state, both), model)
    assert which.all()
    assert placed.nnz == 12
    with pytest.raises(LayoutError, match="the place of 'embed' is taken by 'head'"):
        found.place(hotgraft.diff({"embed": state["embed"]}, {"embed": both["embed"]}), model)
    with pytest.raises(CoverageError, match="'embed' and 'head' share memory"):
        found.place(hotgraft.diff(state, {**both, "head": state["head"] + 2}), model)
