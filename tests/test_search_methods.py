"""Each method's scores, judged by plain dense ones; what does not depend on the loss's scale."""

from __future__ import annotations

from decimal import Decimal, localcontext
from typing import Any

import pytest
import searching
import torch
from hosts import State, contents, holds
from hotgraft import diff, localize
from hotgraft.errors import DataError, NonFiniteError
from hotgraft.search import (
    FirstOrder,
    Fisher,
    Learned,
    Method,
    Movement,
    Panigrahi,
    Snip,
    Step,
)
from hotgraft.search.candidates import Candidates
from hotgraft.search.choice import largest
from hotgraft.search.method import PER_CANDIDATE, largest_affordable
from hotgraft.search.panigrahi import logits
from searching import Net, batches, loss, pair
from torch import nn

pytestmark = pytest.mark.usefixtures("one_thread")

DATA = batches(4)


class Watched:
    """A loss that keeps what it was called with: the batches, and the weights at each."""

    def __init__(self, scale: float = 1.0) -> None:
        self.scale = scale
        self.seen: list[tuple[State, searching.Batch, bool]] = []

    def __call__(self, model: nn.Module, batch: searching.Batch) -> torch.Tensor:
        self.seen.append((contents(model), batch, torch.is_grad_enabled()))
        return self.scale * loss(model, batch)

    @property
    def steps(self) -> list[tuple[State, searching.Batch]]:
        """Those that were differentiated."""
        return [(state, batch) for state, batch, differentiated in self.seen if differentiated]


def slopes_of(watched: Watched, at: list[State] | None = None) -> list[torch.Tensor]:
    """The dense slopes of each step, at the weights that it should have had."""
    model, base, tuned, graft = pair()
    found = []
    for i, (state, batch) in enumerate(watched.steps):
        where = state if at is None else at[i]
        assert holds(loaded(state), where) or at is None
        found.append(
            searching.gathered(
                graft, searching.dense_slopes(model, base, tuned, where, loss, batch)
            )
        )
    return found


def loaded(state: State) -> Net:
    model = Net()
    model.load_state_dict(state)
    return model


def ranked(method: Method, watched: Watched, budget: int, seed: int = 0) -> torch.Tensor:
    model, _, _, graft = pair()
    with Candidates(model, graft) as candidates:
        return method.rank(candidates, searching.ask(watched, DATA, budget, seed))


# ---- scores from one pass -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "score"),
    [
        (FirstOrder(steps=6), lambda slopes: -sum(slopes)),
        (Snip(steps=6), lambda slopes: abs(sum(slopes))),
        (Fisher(steps=6), lambda slopes: sum(s * s for s in slopes).sqrt()),
    ],
)
def test_scores_at_the_base(method: Any, score: Any) -> None:
    _, base, _, _ = pair()
    watched = Watched()
    found = ranked(method, watched, 9)
    assert len(watched.seen) == 6
    wanted = score(slopes_of(watched, [base] * 6))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-8)
    assert len(wanted.unique()) > 50


def test_movement_sums_along_the_straight_way() -> None:
    _, base, tuned, graft = pair()
    watched = Watched()
    found = ranked(Movement(steps=16), watched, 9)
    ends = [(i + 0.5) / 8 for i in range(8)]
    at = []
    for step in range(1, 17):
        gate = ends[step % 8]
        gates = {name: torch.full(shape, gate) for name, shape in graft.shapes.items()}
        at.append(searching.between(base, tuned, gates))
    torch.testing.assert_close(found, -sum(slopes_of(watched, at)), rtol=1e-5, atol=1e-8)


def test_movement_adds_up_to_the_losss_fall() -> None:
    """The integral of the slopes along a way is the difference of its ends."""
    _, base, tuned, _ = pair()
    model, _, _, graft = pair()
    with Candidates(model, graft) as candidates:
        ask = searching.ask(loss, DATA[:1], 9)
        found = Movement(steps=8).rank(candidates, ask)
    fall = loss(loaded(base), DATA[0]) - loss(loaded(tuned), DATA[0])
    assert float(found.sum()) / 8 == pytest.approx(fall.item(), rel=0.02)


# ---- the paper's relaxation ---------------------------------------------------------------------


def test_panigrahi_is_the_papers_update() -> None:
    """S <- S - rate x mean[dL/dg] (1 - 2 b) sigma'(S - bias), as the paper has it, in doubles."""
    budget, steps, per_step, rate, bias, seed = 11, 4, 3, 2e5, 10.0, 5
    _, base, tuned, graft = pair()
    watched = Watched()
    told: list[Step] = []
    model, _, _, _ = pair()
    method = Panigrahi(steps=steps, rate=rate, bias=bias, batches=per_step)
    with Candidates(model, graft) as candidates:
        ask = searching.ask(watched, DATA, budget, seed, progress=told.append)
        found = method.rank(candidates, ask)

    change = searching.gathered(graft, {n: (tuned[n] - base[n]) for n in base})
    inside = searching.highest(change.abs(), budget).double()
    scores = torch.rand(len(change), generator=torch.Generator().manual_seed(seed)).double()
    assert len(watched.steps) == steps * per_step
    for step in range(steps):
        gates = inside + (1 - 2 * inside) * torch.sigmoid(scores - bias)
        mean = torch.zeros(len(change)).double()
        for state, batch in watched.steps[step * per_step : (step + 1) * per_step]:
            soft = searching.between(base, tuned, spread(graft, gates))
            for name in base:
                torch.testing.assert_close(state[name], soft[name], rtol=1e-4, atol=1e-6)
            dense = searching.dense_slopes(model, base, tuned, soft, loss, batch)
            mean += searching.gathered(graft, dense).double() / per_step
        open_ = torch.sigmoid(scores - bias)
        scores = scores - rate * mean * (1 - 2 * inside) * open_ * (1 - open_)
    gates = inside + (1 - 2 * inside) * torch.sigmoid(scores - bias)
    torch.testing.assert_close(found.sigmoid(), gates, rtol=0, atol=1e-3)
    moved = highest_differ(gates, inside, budget)
    assert moved > 0  # the search did something
    assert [s.kept for s in told][-1] == int((gates > 0.5).sum())

    again, _, _, _ = pair()
    best = localize(again, tuned, loss, DATA, count=budget, scope="all", method=method, seed=seed)
    assert torch.equal(searching.kept(best, graft), searching.highest(gates, budget))


def spread(graft: Any, flat: torch.Tensor) -> State:
    """Gates of a graft's entries as dense tensors, 0 elsewhere."""
    out, filled = {}, 0
    for name, shape in graft.shapes.items():
        at = graft[name].indices
        out[name] = torch.zeros(shape)
        out[name].view(-1)[at] = flat[filled : filled + len(at)].float()
        filled += len(at)
    return out


def highest_differ(gates: torch.Tensor, inside: torch.Tensor, k: int) -> int:
    return int((searching.highest(gates, k) != inside.bool()).sum())


def test_panigrahi_without_steps_to_speak_of_keeps_the_base_mask() -> None:
    model, base, tuned, _ = pair()
    found = localize(
        model, tuned, loss, DATA, count=7, scope="all", method=Panigrahi(1, 1e-9, 10.0, 1)
    )
    assert found == localize(base, tuned, count=7, scope="all", method="magnitude")


def test_the_order_of_logits_is_that_of_exact_gates() -> None:
    """Also where the gates are 1 in fp32 or fp64, and where S - bias would round two to one."""
    generator = torch.Generator().manual_seed(1)
    scores = torch.cat([torch.rand(60, generator=generator) * s for s in (1, 80, -60)])
    scores = torch.cat([scores, torch.tensor([0.5, 0.5 + 2**-24, 2e3, 3e3, -2e3])])
    inside = torch.rand(len(scores), generator=generator) < 0.5
    inside[-5:] = False
    with localcontext() as context:
        context.prec = 1500  # 1 - exp(-3000) is not 1
        shift = [Decimal(float(s)) - 10 for s in scores]
        open_ = [1 / (1 + (-x).exp()) for x in shift]
        exact = [1 - g if b else g for g, b in zip(open_, inside.tolist(), strict=True)]
    found = logits(scores.double(), inside, 10.0)
    assert int((found.float().sigmoid() == 1).sum()) > 20
    order = sorted(range(len(exact)), key=exact.__getitem__)
    assert order == sorted(range(len(exact)), key=found.tolist().__getitem__)
    assert len(found.unique()) == len(set(exact)) == len(exact)


class Two(nn.Module):
    """Weights that a loss can prefer by name."""

    def __init__(self) -> None:
        super().__init__()
        self.early = nn.Parameter(torch.zeros(30))
        self.late = nn.Parameter(torch.zeros(20))


def preferring(model: nn.Module, weight: float) -> torch.Tensor:
    assert isinstance(model, Two)
    return -(model.early.sum() + weight * model.late.sum())


TWO = {"early": torch.full((30,), 0.2), "late": torch.full((20,), 0.1)}


def test_panigrahi_tells_saturated_gates_apart() -> None:
    """All gates are 1 in fp32; what the loss prefers comes later by name."""
    gates: list[torch.Tensor] = []

    class Seen(Panigrahi):
        def rank(self, candidates: Candidates, search: Any) -> torch.Tensor:
            found = super().rank(candidates, search)
            gates.append(found.float().sigmoid())
            return found

    found = localize(Two(), TWO, preferring, [50.0], count=20, scope="all", method=Seen(1))
    assert torch.equal(gates[0], torch.ones(50))
    assert found.names == ("late",)


def test_panigrahi_with_too_high_a_rate() -> None:
    method = Panigrahi(1, rate=1e38, bias=0.0, batches=1)
    message = r"step 1 of 1 makes 20 of 50 S infinite or a NaN: take a smaller rate than 1e\+38"
    with pytest.raises(NonFiniteError, match=message):
        localize(Two(), TWO, preferring, [1e3], count=20, scope="all", method=method)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"rate": float("nan")}, "rate nan: wanted a finite number of at least 0"),
        ({"rate": float("inf")}, "rate inf: wanted a finite number of at least 0"),
        ({"rate": -1.0}, "rate -1.0: wanted a finite number of at least 0"),
        ({"bias": float("nan")}, "bias nan: wanted a finite number"),
        ({"bias": -float("inf")}, "bias -inf: wanted a finite number"),
    ],
)
def test_panigrahi_is_given_numbers(how: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        Panigrahi(**how)


# ---- the learned mask ---------------------------------------------------------------------------


def gates_in(state: State, base: State, tuned: State, graft: Any) -> torch.Tensor:
    """How far each entry went, as the model's weights tell."""
    far = {n: (state[n].double() - base[n]) / (tuned[n].double() - base[n]) for n in base}
    return torch.cat([far[n].reshape(-1)[graft[n].indices] for n in graft.names])


@pytest.mark.parametrize("budget", [1, 5, 60, 80])
def test_learned_gates_sum_up_to_the_budget(budget: int) -> None:
    _, base, tuned, graft = pair(dtype=torch.float64)
    model = Net(torch.float64)
    watched = Watched()
    with Candidates(model, graft) as candidates:
        ask = searching.ask(watched, DATA, budget)
        Learned(steps=25, rate=0.5).rank(candidates, ask)
    assert graft.nnz > 80
    assert len(watched.steps) == 25
    for state, _ in watched.steps:
        gates = gates_in(state, base, tuned, graft)
        assert gates.min() >= -1e-9
        assert gates.max() <= 1 + 1e-9
        assert float(gates.sum()) == pytest.approx(budget, rel=2e-4)


def test_learned_steps_down_the_slopes() -> None:
    """A step moves a score against its slope, in proportion; the first gates follow |change|."""
    budget = 12
    _, base, tuned, graft = pair(dtype=torch.float64)
    model, watched = Net(torch.float64), Watched()
    with Candidates(model, graft) as candidates:
        Learned(steps=8).rank(candidates, searching.ask(watched, DATA, budget))
    change = torch.cat([(tuned[n] - base[n]).reshape(-1)[graft[n].indices] for n in graft.names])
    logits = [
        torch.special.logit(gates_in(state, base, tuned, graft)) for state, _ in watched.steps
    ]
    by_size = torch.log(change.abs())
    start = torch.stack([logits[0], by_size])
    assert torch.corrcoef(start)[0, 1] > 0.9999
    for step, (state, batch) in enumerate(watched.steps[:-1]):
        dense = searching.dense_slopes(model, base, tuned, state, loss, batch)
        slopes = searching.gathered(graft, dense).double()
        moved = logits[step + 1] - logits[step]  # the threshold moves all alike
        assert torch.corrcoef(torch.stack([moved, slopes]))[0, 1] < -0.999


def test_learned_keeps_the_highest_scores_and_lowers_the_loss() -> None:
    model, base, tuned, _ = pair()
    method, k = Learned(steps=60), 12
    graft = diff(base, tuned, count=2 * k)  # the pool of a model this small
    with Candidates(model, graft) as candidates:
        scores = method.rank(candidates, searching.ask(loss, DATA, k))
    learned = localize(model, tuned, loss, DATA, count=k, scope="all", method=method)
    assert torch.equal(searching.kept(learned, graft), searching.highest(scores, k))
    by_size = localize(base, tuned, count=k, scope="all", method="magnitude")
    target = [(x, loaded(tuned)(x).detach()) for x, _ in batches(8, seed=9)]

    def fit(found: Any) -> float:
        model = loaded(searching.grafted(base, found))
        return sum(loss(model, batch).item() for batch in target)

    model, _, _, _ = pair()
    own = localize(model, tuned, loss, target, count=k, scope="all", method=Learned(steps=200))
    assert fit(own) < fit(by_size) < sum(loss(loaded(base), batch).item() for batch in target)


def test_learned_tells_how_far_it_is() -> None:
    model, _, tuned, graft = pair()
    told: list[Step] = []
    target = [(x, loaded(tuned)(x).detach()) for x, _ in DATA]
    with Candidates(model, graft) as candidates:
        ask = searching.ask(loss, target, 30, progress=told.append)
        Learned(steps=30).rank(candidates, ask)
    assert [(s.step, s.steps, s.kept) for s in told] == [(i, 30, 30) for i in range(1, 31)]
    assert 0 < told[0].recovery < told[-1].recovery <= 1
    assert told[-1].loss < told[0].loss


# ---- what does not matter -----------------------------------------------------------------------


def test_what_does_not_depend_on_the_scale_of_the_loss() -> None:
    for name in ("first_order", "fisher", "snip", "movement", "learned"):
        found = []
        extremes = () if name == "learned" else (1e30, 2.0**100, 2.0**-100, 1e-30)
        for scale in (1.0, 1000.0, 1024.0, 1e-3, *extremes):
            model, _, tuned, _ = pair()

            def scaled(model: Any, batch: Any, scale: float = scale) -> torch.Tensor:
                return loss(model, batch) * scale

            how = {"count": 15, "scope": "all", "method": searching.QUICK[name], "seed": 3}
            found.append(localize(model, tuned, scaled, DATA, **how).id)
        assert len(set(found)) == 1, name


@pytest.mark.parametrize("kind", [FirstOrder, Fisher, Snip, Movement])
def test_scores_want_a_loss_that_changes(kind: Any) -> None:
    model, _, tuned, _ = pair()

    def none(model: Any, batch: Any) -> torch.Tensor:
        return loss(model, batch) * 0

    message = f"does not change with any candidate, over 3 batches, so '{kind.name}' cannot choose"
    with pytest.raises(DataError, match=message):
        localize(model, tuned, none, DATA, count=5, scope="all", method=kind(steps=3))


@pytest.mark.parametrize("kind", [FirstOrder, Fisher, Snip, Movement])
def test_what_the_loss_does_not_depend_on_goes_by_size(kind: Any) -> None:
    """Four entries matter; of the others the largest changes make up the number."""
    tuned = {"early": torch.arange(1.0, 31), "late": torch.arange(-6.5, -106, -5)}

    def of_few(model: Any, _: Any) -> torch.Tensor:
        return 0 * model.late.sum() - model.early[:4].sum()

    k = 25  # of a pool of all 50
    found = localize(Two(), tuned, of_few, [0], count=k, scope="all", method=kind(steps=2))
    size = torch.cat([tuned["early"], tuned["late"]]).abs()
    size[:4] = torch.inf
    wanted = sorted(size.topk(k).indices.tolist())
    assert wanted[:5] == [0, 1, 2, 3, 25]
    late = [30 + i for i in found["late"].indices.tolist()]
    assert found["early"].indices.tolist() + late == wanted


@pytest.mark.parametrize("name", ["magnitude", "first_order", "fisher", "snip", "learned"])
def test_a_wider_type_changes_nothing_to_speak_of(name: str) -> None:
    """The same numbers, stored in fp64, give the same mask."""
    model, _, tuned, _ = pair()
    wider = Net().double()
    wide = {n: t.double() for n, t in tuned.items()}

    def exact(model: Any, batch: Any) -> torch.Tensor:
        return (model(batch[0]) - batch[1]).double().square().mean()

    how: Any = {"count": 15, "scope": "all", "method": searching.QUICK[name]}
    one = localize(model, tuned, exact, DATA, **how)
    other = localize(wider, wide, exact, DATA, **how)
    assert one.mask == other.mask


# ---- pieces -------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_the_k_highest(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    n = 1 + seed * 3
    scores = torch.randint(-3, 4, (n,), generator=generator).float()  # with many ties
    scores[scores == -3] = -1e38 if seed % 2 else -0.0
    then = torch.randint(0, 3, (n,), generator=generator).float()
    order = sorted(range(n), key=lambda i: (-float(scores[i]), -float(then[i]), i))
    for k in range(1, n + 1):
        chosen = torch.from_numpy(largest(scores, k))
        assert int(chosen.sum()) == k
        assert torch.equal(chosen, searching.highest(scores, k))
        assert largest(scores, k, then).nonzero()[0].tolist() == sorted(order[:k])


@pytest.mark.parametrize(("k", "n"), [(0, 3), (-1, 3), (4, 3), (1, 0)])
def test_more_than_there_are(k: int, n: int) -> None:
    with pytest.raises(DataError, match=f"the {k} highest of {n} scores: wanted 1 .. {n}"):
        largest(torch.zeros(n), k)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
def test_scores_that_are_no_numbers(wrong: float) -> None:
    scores = torch.arange(6.0)
    scores[[1, 4]] = wrong
    with pytest.raises(NonFiniteError, match="2 of 6 scores are a NaN or infinity"):
        largest(scores, 1)


def test_the_pool_is_what_the_memory_allows() -> None:
    big, small = 10**9, 10**12
    assert largest_affordable(1000, big, small) == 100_000  # a hundred times the budget
    assert largest_affordable(1000, 5000, small) == 5000  # all there is
    nbytes = 40_000_000
    assert largest_affordable(10_000, big, nbytes) * PER_CANDIDATE <= nbytes // 4
    assert largest_affordable(10_000, big, nbytes) > 10_000 * 10
    assert largest_affordable(10**6, big, nbytes) == 2 * 10**6  # something to choose from
    assert largest_affordable(10, 10, 0) == 10


@pytest.mark.parametrize("kind", [FirstOrder, Fisher, Snip, Movement, Panigrahi])
@pytest.mark.parametrize("steps", [0, -1])
def test_no_steps(kind: Any, steps: int) -> None:
    with pytest.raises(DataError, match=f"steps {steps}: wanted a whole number of at least 1"):
        kind(steps=steps)


def test_no_batches_a_step() -> None:
    with pytest.raises(DataError, match="batches 0: wanted a whole number of at least 1"):
        Panigrahi(batches=0)


def test_the_pool_holds_what_differs_most() -> None:
    model, base, tuned, _ = pair()
    watched = Watched()
    localize(model, tuned, watched, DATA, count=1, scope="all", method=FirstOrder(steps=1))
    seen: list[int] = []

    class Small(FirstOrder):
        def pool(self, count: int, eligible: int, base_nbytes: int) -> int:
            assert (count, eligible) == (3, sum(t.numel() for t in base.values()))
            assert base_nbytes == 4 * eligible
            return 10

        def rank(self, candidates: Candidates, search: Any) -> torch.Tensor:
            assert candidates.graft == diff(base, tuned, count=10)
            seen.append(candidates.count)
            return super().rank(candidates, search)

    found = localize(model, tuned, loss, DATA, count=3, scope="all", method=Small(steps=2))
    assert seen == [10]
    assert found.nnz == 3
