"""Matrices that a server rearranges after loading, and says so."""

import hotgraft
import numpy as np
import pytest
import torch
from hotgraft.errors import LayoutError
from hotgraft.host import Host
from hotgraft.placement import Order, trace
from hotgraft.weights import open_weights
from safetensors.torch import save_file

BLOCK = 4


def blocked(rows, columns):
    """Blocks of four rows, each of them column by column."""
    row = np.arange(rows)
    return Order(row // BLOCK * BLOCK * columns + row % BLOCK, np.arange(columns) * BLOCK)


def rearrange(parameter):
    order = blocked(*parameter.shape)
    plain = parameter.detach().clone()
    flat = torch.empty(plain.numel(), dtype=plain.dtype)
    flat[torch.from_numpy(order.positions(np.arange(plain.numel())))] = plain.reshape(-1)
    parameter.data.copy_(flat.view(plain.shape))
    return order, plain


class Server(torch.nn.Module):
    """One matrix for two of the checkpoint's."""

    def __init__(self):
        super().__init__()
        self.fused = torch.nn.Parameter(torch.zeros(12, 6), requires_grad=False)

    def load_weights(self, weights):
        for name, tensor in weights:
            rows = slice(0, 5) if name == "a" else slice(5, 12)
            self.fused.data[rows].copy_(tensor)


@pytest.fixture
def server(tmp_path):
    state = {"a": torch.randn(5, 6), "b": torch.randn(7, 6)}
    save_file(state, tmp_path / "model.safetensors")
    model = Server()
    model.load_weights(state.items())
    return model, state, tmp_path / "model.safetensors"


def test_grafts_find_their_places_in_a_rearranged_matrix(server):
    model, state, file = server
    order, plain = rearrange(model.fused)
    order.put_on(model.fused)
    assert not torch.equal(model.fused, plain)
    with open_weights(file) as weights:
        found = trace(model, model.load_weights, weights.specs)
        found.verify(weights)
    assert not found.refused
    tuned = {name: torch.where(torch.rand(t.shape) < 0.3, t * 2, t) for name, t in state.items()}
    placed, which = found.place(hotgraft.diff(state, tuned), model)
    assert which.all()
    with pytest.raises(LayoutError, match=r"'fused'.* another order"):
        hotgraft.attach(model)
    host = Host(model)
    host.load(placed, name="tuned")
    host.activate("tuned")
    assert torch.equal(order.plain(model.fused), torch.cat([tuned["a"], tuned["b"]]))
    host.deactivate()
    assert torch.equal(order.plain(model.fused), plain)


def test_an_order_that_is_not_the_matrixs_is_seen(server):
    model, state, file = server
    order, _ = rearrange(model.fused)
    order._replace(rows=order.rows[::-1].copy()).put_on(model.fused)
    with open_weights(file) as weights:
        found = trace(model, model.load_weights, weights.specs)
        found.verify(weights)
    with pytest.raises(LayoutError, match="holds other bits"):
        found.place(hotgraft.diff(state, {n: t + 1 for n, t in state.items()}), model)
