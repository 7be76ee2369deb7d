"""The gate in the model: its `forward`, its copies, and what others put there."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Callable

import pytest
import torch
from hosts import Small, contents, holds, single
from hotgraft import attach
from hotgraft.errors import GateError
from hotgraft.gate import GatedForward
from torch import nn


def test_signature_name_and_docstring_are_kept() -> None:
    model = Small()
    plain = inspect.signature(model.forward)
    attach(model)
    assert inspect.signature(model.forward) == plain
    assert model.forward.__name__ == "forward"
    assert model.forward.__doc__ == "Say it once or twice."
    assert torch.equal(model(torch.ones(2), twice=True), 2 * model(torch.ones(2)))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_have_no_gate_and_live_by_themselves(copied: Callable[[Small], Small]) -> None:
    model = Small()
    host = attach(model)
    host.load(single("layer.weight", model.layer.weight, [0], [5.0]), name="a")
    host.activate("a")
    twin = copied(model)
    assert not isinstance(twin.forward, GatedForward)
    assert twin.forward.__self__ is twin
    with host.hold():
        held = contents(twin)
        other = attach(twin)
        other.load(single("layer.weight", twin.layer.weight, [1], [7.0]), name="b")
        other.activate("b")
        assert model.layer.weight[0, 1] != 7.0
        other.detach(force=True)
    host.deactivate()
    assert holds(twin, held)
    assert twin.layer.weight[0, 0] == 5.0
    again = copied(copied(twin))
    assert torch.equal(again(torch.ones(2)), twin(torch.ones(2)))


def test_a_copy_of_the_bound_forward_brings_its_own_model() -> None:
    model = Small()
    attach(model)
    forward = copy.deepcopy(model.forward)
    assert forward.__self__ is not model
    assert torch.equal(forward(torch.ones(2)), model(torch.ones(2)))


def test_a_forward_of_the_instance_is_gated_and_given_back() -> None:
    model = Small()
    plain, calls = model.forward, []

    def wrapped(x: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return plain(x)

    model.forward = wrapped
    host = attach(model)
    model(torch.ones(2))
    host.detach()
    assert model.forward is wrapped
    assert calls == [1]


def test_a_forward_wrapped_after_attach_stays_wrapped() -> None:
    model = Small()
    host = attach(model)
    gated = model.forward
    model.forward = lambda x: gated(x) + 1
    host.detach()
    out = model(torch.ones(2))
    assert torch.equal(out, model.layer(torch.ones(2)) + 1)
    again = attach(model)
    again.detach()
    assert torch.equal(model(torch.ones(2)), out)


def test_detach_gives_the_class_forward_back() -> None:
    model = Small()
    host = attach(model)
    assert isinstance(model.forward, GatedForward)
    host.detach()
    assert model.forward.__func__ is Small.forward
    attach(model).detach()


def test_torchscript_is_refused() -> None:
    class Script(torch.jit.ScriptModule):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2))

    model = Script()
    with pytest.raises(GateError, match="TorchScript"):
        attach(model)
