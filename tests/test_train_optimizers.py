"""The optimizers that localise: what they train, how they clip, and a pull that is exact."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import factories
import numpy as np
import pytest
import torch
from hosts import contents, holds
from hotgraft import diff, train
from hotgraft.errors import (
    BaseMismatchError,
    CoverageError,
    DataError,
    NonFiniteError,
    ParameterError,
)
from hotgraft.format import DTYPES
from hotgraft.graft import bits
from hotgraft.train.proximal import shrunk
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

pytestmark = pytest.mark.usefixtures("one_thread")


def blocks(model: nn.Module) -> dict[str, nn.Parameter]:
    return {n: p for n, p in model.named_parameters() if n.startswith("layers.")}


def give_gradients(model: nn.Module, seed: int, *, noise: float = 1.0) -> None:
    """The first row of each block's matrix has a steady gradient, all else noise about 0."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        p.grad = (torch.randn(p.shape, generator=generator) * noise).to(p.dtype)
        if name.endswith("1.weight") and p.ndim == 2:
            p.grad[0] = 1.0


def steady(model: nn.Module) -> dict[str, list[int]]:
    """The positions that `give_gradients` treats alike in each step."""
    return {n: list(range(p.shape[1])) for n, p in blocks(model).items() if p.ndim == 2}


# ---- what is trained ----------------------------------------------------------------------------


@pytest.mark.parametrize("make", [train.sgd, train.adamw])
def test_the_scope_is_that_of_grafts(make: Any) -> None:
    model = factories.TinyModel()
    chosen = make(model).param_groups[0]["params"]
    assert list(map(id, chosen)) == list(map(id, blocks(model).values()))
    assert len(make(model, scope="linear").param_groups[0]["params"]) == 2
    assert len(make(model, scope="all").param_groups[0]["params"]) == len(list(model.parameters()))
    only = make(model, scope=lambda name, shape: name.startswith("embed") and shape == (13, 8))
    assert only.param_groups[0]["params"] == [model.embed.weight]


@pytest.mark.parametrize("make", [train.sgd, train.adamw])
def test_scopes_that_hold_nothing(make: Any) -> None:
    with pytest.raises(CoverageError, match=r"'encoder' holds none of the 2 tensors"):
        make(nn.Linear(2, 2))
    with pytest.raises(CoverageError, match="unknown scope 'head'"):
        make(factories.TinyModel(), scope="head")


def test_integers_have_no_gradient() -> None:
    model = factories.TinyModel()
    packed = nn.Parameter(torch.zeros(8, 8, dtype=torch.int8), requires_grad=False)
    model.layers[0][1].weight = packed
    with pytest.raises(ParameterError, match=r"'layers\.0\.1\.weight' .* torch\.int8"):
        train.sgd(model)


# ---- clipping -----------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [0.001, 100.0])
def test_clipping_is_torchs(scale: float) -> None:
    model, other = factories.TinyModel(), factories.TinyModel()
    optimizer = train.sgd(model, lr=0.1, clip=0.5)
    plain = torch.optim.SGD(blocks(other).values(), lr=0.1, momentum=0.9)
    for seed in range(3):
        give_gradients(model, seed, noise=scale)
        give_gradients(other, seed, noise=scale)
        nn.utils.clip_grad_norm_(list(blocks(other).values()), 0.5)
        optimizer.step()
        plain.step()
    assert holds(model, contents(other))


def test_no_clipping_leaves_the_gradient() -> None:
    model = factories.TinyModel()
    optimizer = train.adamw(model, clip=None)
    give_gradients(model, 0, noise=100)
    before = {name: p.grad.clone() for name, p in blocks(model).items() if p.grad is not None}
    optimizer.step()
    assert all(torch.equal(p.grad, before[name]) for name, p in blocks(model).items())  # type: ignore[arg-type]


@pytest.mark.parametrize("make", [train.sgd, train.adamw])
@pytest.mark.parametrize("clip", [1.0, None])
@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_writes_nothing(make: Any, clip: Any, wrong: float) -> None:
    model = factories.TinyModel()
    optimizer = make(model, clip=clip)
    give_gradients(model, 0)
    optimizer.step()
    before, state = contents(model), copy.deepcopy(optimizer.state_dict())
    give_gradients(model, 1)
    model.layers[1][1].bias.grad[3] = wrong
    with pytest.raises(NonFiniteError, match=r"gradient's norm is (nan|inf): no step was taken"):
        optimizer.step()
    assert holds(model, before)
    after = optimizer.state_dict()["state"]
    assert all(
        torch.equal(torch.as_tensor(after[i][key]), torch.as_tensor(value))
        for i, entry in state["state"].items()
        for key, value in entry.items()
    )


@pytest.mark.parametrize("clip", [0.0, -1.0, float("nan")])
def test_lengths_to_clip_to(clip: float) -> None:
    with pytest.raises(DataError, match=r"clip .* above 0"):
        train.sgd(factories.TinyModel(), clip=clip)


# ---- the pull, exactly --------------------------------------------------------------------------


@given(st.integers(0, 2**32), st.sampled_from([0.0, 1e-9, 0.003, 0.5, 1e30]))
def test_shrinking_is_the_soft_threshold(seed: int, threshold: float) -> None:
    base = factories.tensor("F32", (60,), seed)
    theta = torch.where(torch.arange(60) % 3 == 0, base, factories.weights("F32", (60,), seed))
    found = shrunk(theta, base, threshold)
    difference = theta.numpy() - base.numpy()
    t = np.float32(threshold)
    near = np.abs(difference) <= t
    assert (bits(found)[near] == bits(base)[near]).all()
    wanted = theta.numpy() - np.copysign(t, difference)
    assert np.array_equal(found.numpy()[~near], wanted[~near])


def test_shrinking_keeps_the_sign_of_zero_and_lets_nan_through() -> None:
    base = torch.tensor([-0.0, 0.0, 1.0, 2.0])
    theta = torch.tensor([0.0, -0.0, float("nan"), float("inf")])
    found = shrunk(theta, base, 0.5)
    assert bits(found)[:2].tolist() == bits(base)[:2].tolist()
    assert found[2].isnan()
    assert found[3].isinf()


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_shrinking_in_half_precision_rounds_once(dtype: str) -> None:
    base, theta = factories.weights(dtype, (500,), 1), factories.weights(dtype, (500,), 2)
    threshold = 0.004
    found = shrunk(theta, base, threshold)
    assert found.dtype == DTYPES[dtype].torch
    wide, other = theta.float().numpy(), base.float().numpy()
    near = np.abs(wide - other) <= np.float32(threshold)
    assert 20 < near.sum() < 480
    assert (bits(found)[near] == bits(base)[near]).all()
    exact = torch.from_numpy(wide - np.copysign(np.float32(threshold), wide - other))
    assert (bits(found)[~near] == bits(exact.to(found.dtype))[~near]).all()


def test_a_sparse_difference() -> None:
    model = factories.TinyModel()
    base = contents(model)
    optimizer = train.adamw(model, lr=1e-3, l1=0.8, clip=None)
    for seed in range(20):
        give_gradients(model, seed)
        optimizer.step()
    graft = diff(base, model, scope="encoder")
    where = steady(model)
    for name, positions in where.items():
        assert set(positions) <= set(graft[name].indices.tolist())
    assert graft.nnz < 0.25 * graft.provenance.eligible
    # What differs is a graft; with it in, the base is the model, bit for bit.
    assert factories.same_bits(factories.grafted(base, graft), contents(model))


def test_without_the_pull_everything_moves() -> None:
    model = factories.TinyModel()
    base = contents(model)
    optimizer = train.adamw(model, lr=1e-3)
    for seed in range(3):
        give_gradients(model, seed)
        optimizer.step()
    assert diff(base, model, scope="encoder").density == 1


def test_a_pull_as_strong_as_the_step_lets_nothing_go() -> None:
    model = factories.TinyModel()
    base = contents(model)
    optimizer = train.adamw(model, lr=1e-3, l1=1.01)
    give_gradients(model, 0)
    optimizer.step()  # the first step is lr for every weight
    assert holds(model, base)


def test_under_sgd_it_is_the_proximal_gradient() -> None:
    """ISTA on 1/2 (theta - target)^2 + l1 |theta - base| ends at the soft threshold."""
    model = nn.Linear(5, 1, bias=False)
    base = torch.tensor([[0.0, 1.0, -1.0, 2.0, 0.5]])
    target = torch.tensor([[1.0, 1.05, -3.0, 2.0, 0.45]])
    with torch.no_grad():
        model.weight.copy_(base)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    train.pull(optimizer, model, 0.2)
    for _ in range(60):
        model.weight.grad = model.weight.detach() - target
        optimizer.step()
    wanted = torch.tensor([[0.8, 1.0, -2.8, 2.0, 0.5]])
    torch.testing.assert_close(model.weight.detach(), wanted)
    assert bits(model.weight)[[1, 3, 4]].tolist() == bits(base)[[1, 3, 4]].tolist()


def test_sgd_with_a_pull_is_sgd_and_a_pull() -> None:
    models = [factories.TinyModel() for _ in range(2)]
    base = contents(factories.TinyModel())
    pulled = train.sgd(models[0], lr=0.1, l1=0.003, base=base)
    plain = train.sgd(models[1], lr=0.1)
    train.pull(plain, models[1], 0.003, base=base)
    for model, optimizer in zip(models, (pulled, plain), strict=True):
        for seed in range(5):
            give_gradients(model, seed)
            optimizer.step()
    assert holds(models[0], contents(models[1]))
    changed = [(t != base[n]).double().mean().item() for n, t in blocks(models[0]).items()]
    assert 0 < sum(changed) / len(changed) < 1


def test_the_threshold_follows_each_groups_rate() -> None:
    model = nn.ModuleList([nn.Linear(3, 1, bias=False) for _ in range(2)])
    with torch.no_grad():
        for layer in model:
            layer.weight.fill_(1.0)
    zeros = {name: torch.zeros_like(t) for name, t in contents(model).items()}
    groups = [{"params": list(model[0].parameters()), "lr": 0.5}, {"params": [model[1].weight]}]
    optimizer = torch.optim.SGD(groups, lr=0.125)
    train.pull(optimizer, model, 1.0, base=zeros)
    schedule = torch.optim.lr_scheduler.MultiplicativeLR(optimizer, lambda _: 0.5)
    for layer in model:
        layer.weight.grad = torch.zeros(1, 3)
    optimizer.step()
    assert [layer.weight[0, 0].item() for layer in model] == [0.5, 0.875]
    schedule.step()
    optimizer.step()
    assert [layer.weight[0, 0].item() for layer in model] == [0.25, 0.8125]


def test_parameters_without_a_gradient_are_left_alone() -> None:
    model = factories.TinyModel()
    zeros = {name: torch.zeros_like(t) for name, t in contents(model).items()}
    before = contents(model)
    optimizer = train.adamw(model, l1=1.0, base=zeros)
    optimizer.step()
    assert holds(model, before)


def test_a_pull_ends_with_its_handle() -> None:
    model = factories.TinyModel()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with train.pull(optimizer, model, 2.0):
        base = contents(model)
        give_gradients(model, 0)
        optimizer.step()
        assert holds(model, base)
    optimizer.step()
    assert not holds(model, base)


def test_bf16_weights_keep_exact_zeros() -> None:
    model = factories.TinyModel().bfloat16()
    base = contents(model)
    optimizer = train.adamw(model, lr=1e-2, l1=0.8, clip=None)
    for seed in range(20):
        give_gradients(model, seed)
        optimizer.step()
    graft = diff(base, model, scope="encoder")
    for name, positions in steady(model).items():
        assert set(positions) <= set(graft[name].indices.tolist())
    assert graft.nnz < 0.3 * graft.provenance.eligible


def test_bf16_loses_a_pull_below_half_of_its_spacing() -> None:
    base = torch.ones(3, dtype=torch.bfloat16)
    theta = torch.tensor([1.0, 1.5, 1.5], dtype=torch.bfloat16)
    assert shrunk(theta, base, 2**-9).tolist() == [1.0, 1.5, 1.5]
    assert shrunk(theta, base, 2**-7).tolist() == [1.0, 1.4921875, 1.4921875]


# ---- the base -----------------------------------------------------------------------------------


def test_the_base_may_be_a_file(tmp_path: Path) -> None:
    base = contents(factories.TinyModel(seed=1))
    del base["head.weight"]  # tied: a file has it once
    save_file(base, tmp_path / "base.safetensors")
    by = {}
    for given_base in (tmp_path / "base.safetensors", factories.TinyModel(seed=1), base):
        model = factories.TinyModel()
        optimizer = train.adamw(model, lr=0.1, l1=1.5, base=given_base)
        for seed in range(5):
            give_gradients(model, seed)
            optimizer.step()
        by[type(given_base).__name__] = contents(model)
    found = list(by.values())
    assert all(factories.same_bits(found[0], other) for other in found)
    near = {n: (bits(found[0][n]) == bits(base[n])).mean() for n in blocks(model)}
    assert min(near.values()) > 0.5


def test_the_base_is_a_copy() -> None:
    model, other = factories.TinyModel(), factories.TinyModel()
    optimizer = train.adamw(model, l1=2.0, base=other)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(1)
    before = contents(model)
    give_gradients(model, 0)
    optimizer.step()
    assert holds(model, before)


def test_bases_that_do_not_fit() -> None:
    model = factories.TinyModel()
    state = contents(model)
    short = {name: t for name, t in state.items() if name != "layers.0.0.bias"}
    wrong = {**state, "layers.0.0.bias": torch.zeros(8, dtype=torch.bfloat16)}
    with pytest.raises(CoverageError, match=r"lacks 'layers\.0\.0\.bias', which the optimizer"):
        train.adamw(model, l1=0.1, base=short)
    with pytest.raises(BaseMismatchError, match=r"is F32 \[4\] in the base and F32 \[8\]"):
        train.adamw(model, l1=0.1, base={**state, "layers.0.0.bias": torch.zeros(4)})
    with pytest.raises(BaseMismatchError, match=r"is BF16 \[8\] in the base and F32 \[8\]"):
        train.adamw(model, l1=0.1, base=wrong)


@pytest.mark.parametrize("make", [train.sgd, train.adamw])
def test_a_base_without_a_pull(make: Any) -> None:
    with pytest.raises(DataError, match="l1 is 0"):
        make(factories.TinyModel(), base=factories.TinyModel())


@pytest.mark.parametrize("make", [train.sgd, train.adamw])
@pytest.mark.parametrize("l1", [-0.1, float("nan"), float("inf")])
def test_strengths(make: Any, l1: float) -> None:
    with pytest.raises(DataError, match=r"l1 .* above 0"):
        make(factories.TinyModel(), l1=l1)


def test_another_models_optimizer_is_not_pulled() -> None:
    optimizer = train.sgd(factories.TinyModel())
    with pytest.raises(CoverageError, match="made for another model"):
        train.pull(optimizer, factories.TinyModel(), 0.1)


def test_another_precision_is_an_error() -> None:
    model = factories.TinyModel()
    optimizer = train.adamw(model, l1=0.1)
    model.bfloat16()
    give_gradients(model, 0)
    with pytest.raises(BaseMismatchError, match=r"was torch\.float32 .* is torch\.bfloat16 now"):
        optimizer.step()


@pytest.mark.gpu
def test_the_base_follows_the_model_to_a_gpu() -> None:
    model = factories.TinyModel()
    optimizer = train.adamw(model, l1=2.0)
    before = contents(model)
    model.to("cuda")
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert holds(model, before)


# ---- going on -----------------------------------------------------------------------------------


def test_a_run_goes_on_from_its_state() -> None:
    def steps(model: nn.Module, optimizer: torch.optim.Optimizer, *seeds: int) -> None:
        for seed in seeds:
            give_gradients(model, seed)
            optimizer.step()

    base = contents(factories.TinyModel())
    through = factories.TinyModel()
    steps(through, train.adamw(through, lr=1e-2, l1=0.5), *range(8))

    first = factories.TinyModel()
    optimizer = train.adamw(first, lr=1e-2, l1=0.5)
    steps(first, optimizer, *range(4))
    weights, state = contents(first), copy.deepcopy(optimizer.state_dict())

    second = factories.TinyModel(seed=5)
    second.load_state_dict(weights)
    again = train.adamw(second, lr=1e-2, l1=0.5, base=base)
    again.load_state_dict(state)
    steps(second, again, *range(4, 8))
    assert holds(second, contents(through))
