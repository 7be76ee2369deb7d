"""Candidates: gates written and slopes read as a dense judge has them, and nothing left behind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import factories
import pytest
import searching
import simulated
import torch
from hosts import contents, holds
from hotgraft import diff, kernels
from hotgraft.errors import (
    BaseMismatchError,
    CoverageError,
    DataError,
    HostChangedError,
    NonFiniteError,
    ParameterError,
)
from hotgraft.search.candidates import Candidates
from searching import Net, batches, loss, pair, tuned_for
from searching_models import MODELS, Experts, Mixed, Spoken, Tied, Turned
from torch import nn

pytestmark = pytest.mark.usefixtures("one_thread")

BATCH = batches(1)[0]


def half_way(candidates: Candidates, used: Any) -> None:
    """A step with all gates at 1/2."""
    candidates.write(torch.full((candidates.count,), 0.5))
    candidates.differentiate(used, BATCH, "step 3")


# ---- gates and slopes ----------------------------------------------------------------------------


@pytest.fixture(params=["cpu", "device"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine's own, or one that holds tables and values as a GPU's does."""
    if request.param == "device":
        device = simulated.Simulated()
        monkeypatch.setattr(kernels, "resolve", lambda *_args, **_how: device)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("kind", MODELS)
def test_gates_and_slopes_are_the_dense_ones(kind: str) -> None:
    model = MODELS[kind]()
    base, tuned, batch = contents(model), tuned_for(model), BATCH
    graft = diff(model, tuned)
    dense = {name: torch.rand(base[name].shape) for name in graft.names}
    before = searching.snapshot(model)
    with Candidates(model, graft) as candidates:
        for gates in (None, dense, {n: g * 0 for n, g in dense.items()}):
            if gates is not None:
                candidates.write(searching.gathered(graft, gates))
            soft = searching.between(base, tuned, gates or {})
            for name in graft.names:
                assert torch.equal(model.get_parameter(name), soft[name]), name
            value = candidates.differentiate(loss, batch, "here")
            assert value == loss(model, batch).item()
            wanted = searching.dense_slopes(model, base, tuned, contents(model), loss, batch)
            wanted = {n: wanted[n] for n in graft.names}
            slopes = searching.gathered(graft, wanted)
            torch.testing.assert_close(candidates.slopes, slopes, rtol=1e-5, atol=1e-8)
            assert candidates.slopes.count_nonzero() > len(slopes) / 3
        assert candidates.count == graft.nnz
        assert torch.equal(candidates.changes(), searching.changes(graft))
    assert searching.is_as_before(model, before)
    if isinstance(model, Turned):
        assert (model.room[1::2] == 7).all()  # what lies between the strides
        assert (model.room[:, 1::2] == 7).all()


def test_all_gates_open_hold_the_fine_tuned_bits() -> None:
    model = Mixed()
    tuned = tuned_for(model)
    with Candidates(model, diff(model, tuned)) as candidates:
        candidates.write(torch.ones(candidates.count))
        assert holds(model, tuned)


def test_zeros_of_either_sign_come_back() -> None:
    model = nn.Linear(4, 1, bias=False)
    model.weight.data = torch.tensor([[-0.0, 0.0, -0.0, 1.0]])
    tuned = {"weight": torch.tensor([[1.0, -0.0, -1.0, -0.0]])}
    before = contents(model)
    with Candidates(model, diff(model, tuned)) as candidates:
        assert candidates.count == 4
        candidates.write(torch.ones(4))
        assert torch.equal(model.weight, tuned["weight"])
        candidates.write(torch.zeros(4))
        assert torch.equal(model.weight, before["weight"])
    assert holds(model, before)


def test_a_part_of_the_entries_moves_alone() -> None:
    model, base, tuned, _ = pair()
    graft = diff(base, tuned, count=9)
    with Candidates(model, graft) as candidates:
        candidates.write(torch.ones(9))
        assert holds(model, searching.grafted(base, graft))
    assert holds(model, base)


def test_slopes_are_those_of_a_finite_difference() -> None:
    model, _, _, graft = pair(dtype=torch.float64)
    batch = batches(1)[0]
    batch = (batch[0].double(), batch[1].double())

    def exact(model: nn.Module, batch: Any) -> torch.Tensor:
        return (model(batch[0]) - batch[1]).square().mean()

    with Candidates(model, graft) as candidates:
        gates = torch.full((candidates.count,), 0.5)
        candidates.write(gates)
        candidates.differentiate(exact, batch, "here")
        slopes = candidates.slopes.clone()
        for at in range(0, candidates.count, 7):
            ends = []
            for step in (2**-10, -(2**-10)):
                moved = gates.clone()
                moved[at] += step
                candidates.write(moved)
                ends.append(candidates.measure(exact, batch, "here"))
            assert (ends[0] - ends[1]) / 2**-9 == pytest.approx(float(slopes[at]), abs=1e-6)


def test_sparse_gradients() -> None:
    model = Spoken()
    base, tuned = contents(model), tuned_for(model)
    tokens = torch.tensor([[1, 2, 2], [2, 4, 10]])

    def sentence(model: Any, batch: torch.Tensor) -> torch.Tensor:
        return model(batch).square().mean()

    graft = diff(model, tuned, scope="all")
    with Candidates(model, graft) as candidates:
        candidates.differentiate(sentence, tokens, "here")
        slopes = candidates.slopes.clone()
    wanted = searching.dense_slopes(model, base, tuned, base, sentence, tokens)
    torch.testing.assert_close(slopes, searching.gathered(graft, wanted))
    assert slopes.count_nonzero() > 10


def test_a_parameter_without_a_gradient_has_slopes_of_zero() -> None:
    model = Experts()
    tuned = tuned_for(model)
    graft = diff(model, tuned)
    with Candidates(model, graft) as candidates:
        for _ in range(2):  # what an earlier batch left is gone
            candidates.differentiate(loss, BATCH, "here")
        where = {n: torch.full(shape, "experts.2" in n) for n, shape in graft.shapes.items()}
        unused = searching.gathered(graft, where).bool()
        assert unused.any()
        assert not candidates.slopes[unused].any()
        assert candidates.slopes[~unused].any()


def test_a_compiled_model() -> None:
    torch._dynamo.reset()
    model, base, tuned, graft = pair()
    compiled = torch.compile(model, backend="eager")
    batch = BATCH
    modes = [module.training for module in compiled.modules()]
    with Candidates(compiled, diff(compiled, tuned)) as candidates:
        for gate in (0.5, 1.0):
            candidates.write(torch.full((candidates.count,), gate))
            candidates.differentiate(loss, batch, "here")
            now = contents(model)
            wanted = searching.dense_slopes(Net(), base, tuned, now, loss, batch)
            torch.testing.assert_close(candidates.slopes, searching.gathered(graft, wanted))
    assert holds(model, base)
    assert [module.training for module in compiled.modules()] == modes


# ---- autocast ------------------------------------------------------------------------------------


def low(model: Any, batch: Any) -> torch.Tensor:
    """A loss in bf16."""
    with torch.autocast("cpu", torch.bfloat16):
        return loss(model, batch)


@pytest.mark.parametrize("outside", [False, True])
def test_autocast_sees_the_weights_as_they_are(outside: bool) -> None:
    model, base, tuned, graft = pair()
    batch = BATCH
    used = loss if outside else low
    found = []
    with torch.autocast("cpu", torch.bfloat16, enabled=outside), Candidates(model, graft) as c:
        with torch.no_grad():
            loss(model, batch)  # autocast keeps casts, which have no gradient
        for gate in (None, 1.0, 0.5):
            if gate is not None:
                c.write(torch.full((c.count,), gate))
            value = c.measure(used, batch, "here")
            assert c.differentiate(used, batch, "here") == value
            found.append((contents(model), value, c.slopes.clone()))
    assert len({value for _, value, _ in found}) == 3
    for state, value, slopes in found:
        plain = Net()
        plain.load_state_dict(state)
        assert low(plain, batch).item() == value
        wanted = searching.dense_slopes(plain, base, tuned, state, low, batch)
        torch.testing.assert_close(slopes, searching.gathered(graft, wanted))


def test_autocast_sees_the_base_afterwards() -> None:
    model, _, _, graft = pair()
    batch = BATCH
    with torch.autocast("cpu", torch.bfloat16):
        before = loss(model, batch).item()
        with Candidates(model, graft) as candidates:
            candidates.write(torch.ones(candidates.count))
            assert loss(model, batch).item() != before
        assert loss(model, batch).item() == before


# ---- what is left behind -------------------------------------------------------------------------


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_everything_is_as_before(error: type[BaseException] | None) -> None:
    model, _, _, graft = pair()
    model.train()
    model.layers[0].eval()
    model.head.weight.grad = torch.ones(3, 6)
    model.layers[0].weight.grad = torch.ones(8, 6)
    before = searching.snapshot(model)

    def used(model: Any, batch: Any) -> torch.Tensor:
        assert not any(module.training for module in model.modules())
        assert all(p.requires_grad and p.grad is None for p in model.parameters())
        if error is not None:
            raise error
        return loss(model, batch)

    def run() -> None:
        with Candidates(model, graft) as candidates:
            half_way(candidates, used)
            assert all(p.grad is None for p in model.parameters())

    if error is None:
        run()
    else:
        with pytest.raises(error):
            run()
    assert searching.is_as_before(model, before)


def test_an_interrupt_in_the_backward_pass() -> None:
    model, _, _, graft = pair()
    before = searching.snapshot(model)

    def interrupt(_gradient: torch.Tensor) -> None:
        raise KeyboardInterrupt

    def used(model: Any, batch: Any) -> torch.Tensor:
        out = model.layers[0](batch[0])
        out.register_hook(interrupt)
        return loss(lambda _: model.head(model.layers[1](out)), batch)

    with pytest.raises(KeyboardInterrupt), Candidates(model, graft) as candidates:
        half_way(candidates, used)
    assert searching.is_as_before(model, before)


def test_only_what_has_candidates_requires_a_gradient() -> None:
    model, base, tuned, _ = pair()
    graft = diff(base, tuned, scope="encoder")
    seen = []

    def used(model: Any, batch: Any) -> torch.Tensor:
        seen.append({name for name, p in model.named_parameters() if p.requires_grad})
        return loss(model, batch)

    before = searching.snapshot(model)
    with Candidates(model, graft) as candidates:
        candidates.differentiate(used, BATCH, "here")
    assert seen == [set(graft.names)]
    assert searching.is_as_before(model, before)


def test_a_modules_own_hooks_stay() -> None:
    model, _, _, graft = pair()
    seen: list[int] = []
    model.head.weight.register_hook(lambda _: seen.append(1))
    with Candidates(model, graft) as candidates:
        candidates.differentiate(loss, BATCH, "here")
    loss(model, BATCH).backward()
    assert seen == [1, 1]
    assert model.head.weight.grad is not None


# ---- what is refused -----------------------------------------------------------------------------


def frozen() -> nn.Module:
    model = Net()
    model.layers[0].bias.requires_grad_(False)
    return model


def buffered() -> nn.Module:
    model = Net()
    model.layers[0].register_buffer("scale", torch.ones(3))
    return model


def twin() -> nn.Module:
    """Two parameters on one memory, one of which is frozen."""
    model = Tied(2)
    model.layers[1].weight.requires_grad_(False)
    return model


def crossed() -> nn.Module:
    """Two parameters on one memory, one of them transposed."""
    model = Tied(1)
    model.layers[1].weight = nn.Parameter(model.layers[0].weight.detach().t())
    return model


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (frozen, r"'layers.0.bias' is frozen \(requires_grad is False\), so .* choose a scope"),
        (buffered, "'layers.0.scale' is a buffer, so the search has no gradient there"),
        (twin, "'layers.0.weight' is frozen"),
        (crossed, "'layers.0.weight' and 'layers.1.weight' share memory as different views"),
    ],
)
def test_what_has_no_gradient(make: Callable[[], nn.Module], says: str) -> None:
    model = make()
    tuned = {name: tensor + 1 for name, tensor in contents(model).items()}
    if make is crossed:
        tuned["layers.1.weight"] = tuned["layers.0.weight"].t()
    before = searching.snapshot(model)
    with pytest.raises(ParameterError, match=says):
        Candidates(model, diff(model, tuned))
    assert searching.is_as_before(model, before)


def test_integers_in_scope() -> None:
    model = Net()
    model.layers[0].register_parameter(
        "codes", nn.Parameter(torch.ones(3, dtype=torch.int32), requires_grad=False)
    )
    tuned = contents(model)
    tuned["layers.0.codes"] += 1
    with pytest.raises(ParameterError, match=r"'layers.0.codes' is of dtype I32, so"):
        Candidates(model, diff(model, tuned))


@pytest.mark.parametrize("wrong", [float("inf"), float("-inf"), 3.4e38])
def test_a_change_that_is_not_finite(wrong: float) -> None:
    model = Net()
    model.layers[1].bias.data[2] = -3.4e38
    tuned = searching.nudged(contents(model))
    tuned["layers.1.bias"][2] = wrong
    with pytest.raises(NonFiniteError, match=r"'layers.1.bias', position 2: the change from -3.4"):
        Candidates(model, diff(model, tuned))


def test_a_graft_of_another_model() -> None:
    _, _, _, graft = pair()
    other = nn.Linear(6, 8)
    with pytest.raises(CoverageError):
        Candidates(other, graft)
    wider = Net()
    wider.head = nn.Linear(7, 3)
    with pytest.raises(BaseMismatchError):
        Candidates(wider, graft)


@pytest.mark.parametrize("how", ["data", "to", "replaced"])
def test_weights_that_move_meanwhile(how: str) -> None:
    model, base, _, graft = pair()

    def moving(model: Any, batch: Any) -> torch.Tensor:
        if how == "data":
            model.head.weight.data = model.head.weight.data.clone()
        elif how == "to":
            model.double()
        else:
            model.head = nn.Linear(6, 3)
        return loss(model, batch)

    with (
        pytest.raises(HostChangedError, match=r"moved or replaced .* load it again, and move it"),
        Candidates(model, graft) as candidates,
    ):
        half_way(candidates, moving)
    if how != "to":  # what did not move holds the base
        assert holds(model.layers, {n[7:]: t for n, t in base.items() if n[:7] == "layers."})


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda v: v.expand(2), DataError, r"the loss is \[2\]; wanted a tensor of one element"),
        (lambda v: v.item(), DataError, "the loss is float; wanted a tensor of one element"),
        (lambda _: None, DataError, "the loss is NoneType; wanted"),
        (lambda v: v.to(torch.complex64), DataError, "the loss is of torch.complex64; wanted"),
        (lambda v: v.detach(), DataError, "at step 3 depends on no weight that may change"),
        (lambda v: v * float("nan"), NonFiniteError, "the loss is nan at step 3: look at its"),
        (lambda v: v / 0, NonFiniteError, "the loss is inf at step 3"),
        (
            lambda v: (v - v.detach()).sqrt(),
            NonFiniteError,
            "the gradient at step 3 has a NaN or infinity, where the loss is 0: look at the loss",
        ),
    ],
)
def test_what_is_no_loss(make: Callable[[torch.Tensor], Any], error: Any, says: str) -> None:
    model, base, _, graft = pair()
    with pytest.raises(error, match=says), Candidates(model, graft) as candidates:
        half_way(candidates, lambda m, b: make(loss(m, b)))
    assert holds(model, base)


def test_a_loss_of_something_else() -> None:
    model, _, _, graft = pair()
    other = Net()
    with (
        pytest.raises(DataError, match="at step 3 depends on no tensor with candidates"),
        Candidates(model, graft) as candidates,
    ):
        candidates.differentiate(lambda _, b: loss(other, b), BATCH, "step 3")


def test_no_gradients_are_made_in_inference_mode() -> None:
    model, _, _, graft = pair()
    with (
        pytest.raises(DataError, match="depends on no weight that may change"),
        torch.inference_mode(),
        Candidates(model, graft) as candidates,
    ):
        candidates.differentiate(loss, BATCH, "here")


def test_under_no_grad_there_are_slopes() -> None:
    model, _, _, graft = pair()
    with torch.no_grad(), Candidates(model, graft) as candidates:
        candidates.differentiate(loss, BATCH, "here")
        assert candidates.slopes.any()


# ---- choosing ------------------------------------------------------------------------------------


def test_what_is_chosen() -> None:
    model = Mixed()
    base, tuned = contents(model), tuned_for(model)
    graft = diff(base, tuned)
    candidates = Candidates(model, graft)
    for seed in range(5):
        chosen = torch.rand(graft.nnz, generator=torch.Generator().manual_seed(seed)) < 0.3
        found = candidates.choose(chosen.numpy())
        assert found.nnz == int(chosen.sum())
        assert torch.equal(searching.kept(found, graft), chosen)
        assert not (found.mask - graft.mask).nnz
        host = {n: t.clone() for n, t in base.items()}
        assert factories.same_bits(searching.grafted(host, found), searching.grafted(base, found))
        for name in found.names:
            at = found[name].indices
            assert torch.equal(found[name].new, tuned[name].reshape(-1)[at])
            assert torch.equal(found[name].old, base[name].reshape(-1)[at])


def test_one_dtypes_entries_alone() -> None:
    model = Mixed()
    graft = diff(contents(model), tuned_for(model))
    chosen = searching.gathered(
        graft, {n: torch.full(s, n == "head.bias") for n, s in graft.shapes.items()}
    ).bool()
    found = Candidates(model, graft).choose(chosen.numpy())
    assert found.names == ("head.bias",)
    assert list(found.groups) == ["F16"]
