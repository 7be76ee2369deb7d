"""Compiled models are gated, whichever came first, and stay one graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from hosts import Small, single
from hotgraft import attach
from hotgraft.errors import GateError
from hotgraft.gate import Gate


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def observed(gate: Gate, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Filled with the number of passes inside each time the gate is entered."""
    seen: list[int] = []
    enter = gate._enter

    def watched(token: object) -> None:
        enter(token)
        seen.append(gate.passes)

    monkeypatch.setattr(gate, "_enter", watched)
    return seen


@pytest.mark.parametrize("order", ["attach first", "compile first", "attach the compiled"])
@pytest.mark.parametrize("in_place", [False, True])
def test_compiled_models_are_gated(
    order: str, in_place: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Small()
    host = attach(model) if order == "attach first" else None
    if in_place:
        model.compile(backend="eager")
        compiled = model
    else:
        compiled = torch.compile(model, backend="eager")
    x = torch.ones(2)
    if order != "attach first":
        compiled(x)  # traced before there was a gate
        host = attach(compiled if order == "attach the compiled" else model)
    assert host is not None
    host.load(single("layer.weight", model.layer.weight, [0], [5.0]), name="a")
    seen = observed(host._gate, monkeypatch)
    for names in ((), ("a",), ()):
        host.activate(*names)
        before = len(seen)
        assert torch.equal(compiled(x), model.layer(x))
        assert len(seen) > before
        assert torch.equal(compiled(x), model.layer(x))
        assert len(seen) > before + 1
    assert host._gate.passes == 0
    before = len(seen)
    model(x)
    assert len(seen) > before
    host.detach()
    assert torch.equal(compiled(x), model.layer(x))


def test_a_compiled_model_stays_one_graph_under_the_gate() -> None:
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: object) -> Callable[..., object]:
        graphs.append(graph)
        return graph.forward

    model = Small()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    host = attach(compiled)
    for _ in range(3):
        compiled(torch.ones(2))
    assert len(graphs) == 1
    host.detach()


def test_a_refused_attach_leaves_no_gate() -> None:
    model = Small()
    compiled = torch.compile(model, backend="eager")
    host = attach(model)
    with pytest.raises(GateError, match="attached to this model already"):
        attach(compiled)
    host.detach()
    attach(compiled).detach()
