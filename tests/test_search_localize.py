"""localize: exactly k entries, exact ends, seeds; and every bad input, with nothing changed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import searching
import torch
from hosts import State, contents, holds
from hotgraft import Graft, attach, diff, fingerprint, localize
from hotgraft.errors import (
    BaseMismatchError,
    CoverageError,
    DataError,
    GraftError,
    NonFiniteError,
    ParameterError,
    SkillInUseError,
)
from hotgraft.search import METHODS, FirstOrder, Learned, Method
from safetensors.torch import save_file
from searching import QUICK, SEARCHES, Net, batches, loss, one_thread, pair  # noqa: F401

DATA = batches(4)
OTHER = Net()
ELIGIBLE = sum(p.numel() for p in Net().parameters())
ENCODER = sum(p.numel() for p in Net().layers.parameters())


def found(name: str, model: Any = None, tuned: Any = None, data: Any = None, **how: Any) -> Graft:
    """What a method finds between the small models, or others."""
    if model is None:
        model, _, tuned, _ = pair()
    how = {"count": 9, "scope": "all", "method": QUICK[name], **how}
    return localize(model, tuned, how.pop("loss", loss), data or DATA, **how)


def test_every_method_is_tested() -> None:
    assert set(QUICK) == set(METHODS)


# ---- exactly k ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_exactly_k_entries_whatever_ties(name: str) -> None:
    model = Net()
    base = contents(model)
    tuned = {n: t.clone() for n, t in base.items()}
    for tensor in tuned.values():  # equal changes, exactly: powers of two
        tensor.view(-1)[::2] = 0.5
    for p in model.parameters():
        p.data.view(-1)[::2] = 0.25
    base = contents(model)
    differing = diff(base, tuned).nnz
    for k in (1, 2, differing - 1, differing, differing + 1, ELIGIBLE - 1, ELIGIBLE):
        graft = found(name, model, tuned, count=k)
        assert graft.nnz == k
        assert holds(model, base)
        check_bits(graft, base, tuned)
        provenance = graft.provenance
        assert (provenance.scope, provenance.method) == ("all", name)
        assert (provenance.eligible, graft.density) == (ELIGIBLE, k / ELIGIBLE)
        if name != "random" and k >= differing:
            assert not (diff(base, tuned).mask - graft.mask).nnz


def check_bits(graft: Graft, base: State, tuned: State) -> None:
    for name in graft.names:
        entries = graft[name]
        assert torch.equal(entries.new, tuned[name].reshape(-1)[entries.indices])
        assert torch.equal(entries.old, base[name].reshape(-1)[entries.indices])


@pytest.mark.parametrize("name", METHODS)
def test_a_scope_and_a_density(name: str) -> None:
    graft = found(name, scope="encoder", count=None, density=0.1)
    assert graft.nnz == int(0.1 * ENCODER)
    assert graft.provenance.eligible == ENCODER
    assert all(n.startswith("layers.") for n in graft.names)


def test_what_makes_up_the_number_are_the_first_that_agree() -> None:
    model = Net()
    base = contents(model)
    tuned = {n: t.clone() for n, t in base.items()}
    tuned["layers.1.bias"][3] += 1
    graft = found("learned", model, tuned, count=4)
    assert {n: i.tolist() for n, i in graft.mask.items()} == {
        "head.bias": [0, 1, 2],
        "layers.1.bias": [3],
    }
    check_bits(graft, base, tuned)


# ---- both ends ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_density_one_is_the_fine_tuned_model(name: str, dtype: torch.dtype) -> None:
    model, base, tuned, _ = pair(dtype=dtype)
    other = Net(dtype)
    other.load_state_dict(tuned)
    x = DATA[0][0]
    with torch.no_grad():
        ends = model(x).clone(), other(x)
        graft = found(name, model, tuned, count=None, density=1.0)
        host = attach(model)
        host.load(graft, name="skill")
        assert torch.equal(model(x), ends[0])
        host.activate("skill")
        assert torch.equal(model(x), ends[1])
        assert not torch.equal(*ends)
        assert holds(model, tuned)
        host.deactivate()
        assert torch.equal(model(x), ends[0])
    host.detach()
    assert holds(model, base)


# ---- seeds --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_a_seed_fixes_the_graft(name: str) -> None:
    model, _, tuned, _ = pair()
    before = torch.get_rng_state()
    one = found(name, model, tuned, seed=4)
    assert torch.equal(torch.get_rng_state(), before)
    assert found(name, seed=4) == one


def test_another_seed_is_another_graft() -> None:
    assert len({found("random", seed=seed).id for seed in range(4)}) == 4


def test_a_random_mask_is_spread_evenly() -> None:
    counts = torch.zeros(ELIGIBLE)
    _, base, tuned, _ = pair()
    for seed in range(90):
        graft = found("random", base, tuned, count=40, seed=seed)
        ones = {n: torch.zeros(t.shape) for n, t in base.items()}
        for n in graft.names:
            ones[n].view(-1)[graft[n].indices] = 1
        counts += torch.cat([ones[n].reshape(-1) for n in sorted(ones)])
    share = 40 / ELIGIBLE
    chi = ((counts - 90 * share) ** 2 / (90 * share * (1 - share))).mean()
    assert 0.7 < chi < 1.3
    assert counts.min() > 0


@pytest.mark.parametrize("name", SEARCHES)
def test_lists_are_shuffled_by_the_seed_and_other_data_is_not(name: str) -> None:
    def order(data: Any, seed: int) -> list[int]:
        seen = []

        def watched(model: Any, batch: Any) -> torch.Tensor:
            if torch.is_grad_enabled():
                seen.append(batch[0])
            return loss(model, batch[1:])

        found(name, data=data, seed=seed, loss=watched)
        return seen

    class Stream:
        def __iter__(self) -> Any:
            return iter(numbered)

    numbered = [(i, *batch) for i, batch in enumerate(batches(8))]
    one, again, other = (order(numbered, seed) for seed in (1, 1, 2))
    assert one == again != other
    assert order(Stream(), 1) == order(Stream(), 2) == [i % 8 for i in range(len(one))]


# ---- where the fine-tuned model comes from ------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_a_file_or_a_module_or_a_state_dict(name: str, tmp_path: Path) -> None:
    model, base, tuned, _ = pair()
    save_file(tuned, tmp_path / "model.safetensors")
    other = Net()
    other.load_state_dict(tuned)
    ids = {found(name, model, source).id for source in (tuned, other, tmp_path)}
    assert len(ids) == 1
    base_id = fingerprint(base)
    assert found(name, model, tuned, base_id=base_id).provenance.base_id == base_id


@pytest.mark.parametrize("name", ["magnitude", "random"])
def test_what_needs_no_loss(name: str) -> None:
    _, base, tuned, _ = pair()
    graft = localize(base, tuned, count=9, scope="all", method=name)
    assert graft == found(name)


def test_magnitude_is_diffs() -> None:
    _, base, tuned, _ = pair()
    assert found("magnitude", base, tuned) == diff(base, tuned, count=9)


# ---- nothing is left behind ---------------------------------------------------------------------


@pytest.mark.parametrize("name", SEARCHES)
@pytest.mark.parametrize("place", ["loss", "progress", "nowhere"])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_everything_is_as_before(name: str, place: str, error: type[BaseException]) -> None:
    model, _, tuned, _ = pair()
    model.train()
    model.layers[1].eval()
    model.head.weight.grad = torch.ones(3, 6)
    before = searching.snapshot(model)
    calls = []

    def used(model: Any, batch: Any) -> torch.Tensor:
        calls.append("loss")
        if place == "loss" and len(calls) > 2 and torch.is_grad_enabled():
            raise error("stop")
        return loss(model, batch)

    def progress(step: Any) -> None:
        calls.append("progress")
        if place == "progress" and step.step == 2:
            raise error("stop")

    if place == "nowhere":
        found(name, model, tuned, loss=used, progress=progress)
        assert calls.count("progress") == SEARCHES[name].steps  # type: ignore[attr-defined]
    else:
        with pytest.raises(error, match="stop"):
            found(name, model, tuned, loss=used, progress=progress)
    assert searching.is_as_before(model, before)


@pytest.mark.parametrize("name", SEARCHES)
def test_a_host_with_nothing_live(name: str) -> None:
    model, base, tuned, _ = pair()
    host = attach(model)
    host.load(diff(base, tuned, count=20), name="skill")
    graft = found(name, model, tuned)
    assert graft == found(name)
    host.verify()
    host.load(graft, name="found")
    host.activate("found")
    assert holds(model, searching.grafted(base, graft))
    host.detach(force=True)
    assert holds(model, base)


def test_a_host_with_a_live_skill_keeps_it() -> None:
    """The weights as they are count as the base, so the graft lies on top of the skill."""
    model, base, tuned, _ = pair()
    skill = diff(base, tuned, count=20)
    host = attach(model)
    host.load(skill, name="skill")
    host.activate("skill")
    live = contents(model)
    graft = found("learned", model, tuned)
    assert holds(model, live)
    host.verify()
    assert graft == found("learned", Net_of(live), tuned)
    assert not (graft.mask & skill.mask).nnz  # nothing differs there any more
    host.deactivate()
    assert holds(model, base)
    host.detach()


def Net_of(state: State) -> Net:  # noqa: N802 - a Net
    model = Net()
    model.load_state_dict(state)
    return model


# ---- bad input ----------------------------------------------------------------------------------


Spoil = Callable[[Net, State, dict[str, Any]], Any]


def set_(key: str, value: Any) -> Spoil:
    return lambda _model, _tuned, how: how.__setitem__(key, value)


def change(name: str, value: Any) -> Spoil:
    """Another tensor in the fine-tuned state, or none."""

    def spoil(_model: Net, tuned: State, _how: dict[str, Any]) -> None:
        if value is None:
            del tuned[name]
        else:
            tuned[name] = value(tuned[name])

    return spoil


def poison(value: float) -> Spoil:
    def put(tensor: torch.Tensor) -> torch.Tensor:
        tensor[3] = value
        return tensor

    return change("layers.1.bias", put)


EVERY: dict[str, tuple[Spoil, type[Exception], str]] = {
    "density 0": (set_("density", 0), GraftError, r"density 0 is not in \(0, 1\]"),
    "density 2": (set_("density", 2), GraftError, r"density 2 is not in \(0, 1\]"),
    "density nan": (set_("density", float("nan")), GraftError, r"density nan is not in \(0, 1\]"),
    "density tiny": (
        set_("density", 1e-4),
        GraftError,
        r"density 0.0001 of the 131 eligible elements \(scope 'all'\) rounds to 0 entries; the "
        "smallest that keeps one is",
    ),
    "no density": (set_("density", None), GraftError, "density 0.0001 .* rounds to 0 entries"),
    "count 0": (set_("count", 0), GraftError, r"count 0 is not in \[1, 131\]"),
    "count beyond": (set_("count", 132), GraftError, r"count 132 is not in \[1, 131\]"),
    "both": (set_("both", True), GraftError, "give density or count, not both"),
    "scope unknown": (set_("scope", "head"), CoverageError, "unknown scope 'head'; known are"),
    "scope empty": (
        set_("scope", lambda _name, _shape: False),
        CoverageError,
        "holds none of the 6 tensors",
    ),
    "seed negative": (set_("seed", -1), DataError, "seed -1: wanted at least 0"),
    "missing tensor": (
        change("head.weight", None),
        CoverageError,
        "the fine-tuned model lacks 'head.weight', which the base has in scope 'all'; name a scope",
    ),
    "other shape": (
        change("head.weight", lambda t: t[:2]),
        BaseMismatchError,
        r"'head.weight' is F32 \[3, 6\] in the base and F32 \[2, 6\] in the fine-tuned model",
    ),
    "other dtype": (
        change("head.weight", torch.Tensor.double),
        BaseMismatchError,
        r"'head.weight' is F32 \[3, 6\] in the base and F64 \[3, 6\] .*convert one",
    ),
}
SEARCHING: dict[str, tuple[Spoil, type[Exception], str]] = {
    "finetuned nan": (
        poison(float("nan")),
        NonFiniteError,
        "'layers.1.bias', position 3: the difference is NaN",
    ),
    "finetuned inf": (
        poison(float("inf")),
        NonFiniteError,
        "'layers.1.bias', position 3: the change from .* to inf is not finite",
    ),
    "no loss": (set_("loss", None), DataError, "needs a loss and data, and the loss is missing"),
    "no data": (set_("data", None), DataError, "needs a loss and data, and the data is missing"),
    "data empty": (set_("data", []), DataError, "data has no batch"),
    "data no data": (set_("data", 5), DataError, "data is a int; wanted batches"),
    "data one batch": (set_("data", {"x": 1}), DataError, "data is a dict; wanted batches"),
    "data used up": (
        set_("data", (batch for batch in DATA[:1])),
        DataError,
        r"data ended after 1 of \d batches and cannot be read again: give what can",
    ),
    "loss not a scalar": (
        set_("loss", lambda m, b: m(b[0])),
        DataError,
        r"the loss is \[5, 3\]; wanted a tensor of one element",
    ),
    "loss a number": (
        set_("loss", lambda _model, _batch: 1.0),
        DataError,
        "the loss is float; wanted",
    ),
    "loss nan": (
        set_("loss", lambda m, b: loss(m, b) * float("nan")),
        NonFiniteError,
        "the loss is nan at (step|batch) 1",
    ),
    "loss detached": (
        set_("loss", lambda m, b: loss(m, b).detach()),
        DataError,
        "the loss at step 1 of .* depends on no weight that may change",
    ),
    "loss of another model": (
        set_("loss", lambda _model, b: loss(OTHER, b)),
        DataError,
        "the loss at step 1 of .* depends on no tensor with candidates",
    ),
    "frozen": (
        lambda model, _tuned, _how: model.layers[1].bias.requires_grad_(False),
        ParameterError,
        r"'layers.1.bias' is frozen .* let it require one, or choose a scope without it",
    ),
    "nothing differs": (
        lambda model, tuned, _how: tuned.update(contents(model)),
        GraftError,
        "bit for bit equal in scope 'all': nothing to graft",
    ),
}


def refused(name: str, spoil: Spoil, error: type[Exception], says: str) -> None:
    model, _, tuned, _ = pair()
    how: dict[str, Any] = {"loss": loss, "data": DATA, "count": 29, "scope": "all"}
    spoil(model, tuned, how)
    if "density" in how:
        del how["count"]
    if how.pop("both", False):
        how["density"] = 0.1
    before = searching.snapshot(model)
    with pytest.raises(error, match=says):
        localize(model, tuned, how.pop("loss"), how.pop("data"), method=QUICK[name], **how)
    assert searching.is_as_before(model, before)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("what", EVERY)
def test_bad_input_to_any_method(name: str, what: str) -> None:
    refused(name, *EVERY[what])


@pytest.mark.parametrize("name", SEARCHES)
@pytest.mark.parametrize("what", SEARCHING)
def test_bad_input_to_a_search(name: str, what: str) -> None:
    spoil, error, says = SEARCHING[what]
    if what == "data used up":
        spoil = set_("data", (batch for batch in DATA[:1]))  # a new one
    if what == "loss of another model" and name == "panigrahi":
        says = says.replace("step 1 of .*", "step 1 of 2, batch 1 of 2")
    refused(name, spoil, error, says)


@pytest.mark.parametrize("name", SEARCHES)
@pytest.mark.parametrize("kind", [dict, str])
def test_a_search_wants_a_live_module(name: str, kind: type, tmp_path: Path) -> None:
    _, base, tuned, _ = pair()
    save_file(base, tmp_path / "model.safetensors")
    source: Any = base if kind is dict else str(tmp_path)
    says = f"method '{name}' runs the base, so it wants a live module; found a {kind.__name__}"
    with pytest.raises(DataError, match=says):
        found(name, source, tuned)


@pytest.mark.parametrize(
    ("method", "says"),
    [
        ("best", f"unknown method 'best'; known are {', '.join(METHODS)}"),
        ("", "unknown method ''"),
        (Learned, r"wanted a name \(magnitude, .* such as Learned\(steps=600\)"),
        (None, "method is None; wanted a name"),
        (7, "method is 7; wanted a name"),
    ],
)
def test_what_is_no_method(method: Any, says: str) -> None:
    model, _, tuned, _ = pair()
    with pytest.raises(DataError, match=says):
        localize(model, tuned, loss, DATA, count=3, scope="all", method=method)


@pytest.mark.parametrize("name", [name for name in METHODS if name != "learned"])
def test_a_checkpoint_is_for_what_keeps_one(name: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"method '{name}' takes no checkpoint"):
        found(name, checkpoint=tmp_path / "search")
    assert not list(tmp_path.iterdir())


def test_ones_own_method() -> None:
    class Last:
        """The last candidates."""

        name = "last"

        def pool(self, count: int, eligible: int, base_nbytes: int) -> int:  # noqa: ARG002
            return eligible

        def rank(self, candidates: Any, search: Any) -> torch.Tensor:  # noqa: ARG002
            return torch.arange(candidates.count).float()

    own: Method = Last()
    model, base, tuned, every = pair()
    graft = localize(model, tuned, loss, DATA, count=4, scope="all", method=own)
    assert graft.provenance.method == "last"
    assert torch.equal(searching.kept(graft, every), torch.arange(every.nnz) >= every.nnz - 4)
    assert holds(model, base)


def test_a_frozen_tensor_out_of_scope_is_no_matter() -> None:
    model, _, tuned, _ = pair()
    model.head.requires_grad_(False)
    graft = found("learned", model, tuned, scope="encoder")
    assert graft.nnz == 9
    assert not model.head.weight.requires_grad


def test_a_live_graft_in_the_way_says_so() -> None:
    """A graft made on top of a live skill does not go onto the base by mistake."""
    model, base, tuned, _ = pair()
    host = attach(model)
    host.load(diff(base, {n: t + 1 for n, t in base.items()}), name="skill")
    host.activate("skill")
    graft = localize(model, tuned, loss, DATA, count=9, scope="all", method=FirstOrder(steps=2))
    with pytest.raises(BaseMismatchError):
        host.load(graft, name="found")
    with pytest.raises(SkillInUseError):
        host.detach()
    host.detach(force=True)
    assert holds(model, base)
