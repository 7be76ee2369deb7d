"""localize: exactly k entries, exact ends, seeds, hosts; and nothing left behind."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import searching
import torch
from hosts import State, contents, holds
from hotgraft import Graft, attach, diff, fingerprint, localize
from hotgraft.errors import (
    BaseMismatchError,
    GateError,
    HostChangedError,
    SkillInUseError,
    UnreachedWarning,
)
from hotgraft.search import METHODS, FirstOrder, Method, localization
from safetensors.torch import save_file
from searching import QUICK, SEARCHES, Net, batches, loss, pair
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

pytestmark = pytest.mark.usefixtures("one_thread")

DATA = batches(4)
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


def test_a_commit_from_inside_the_loss_is_refused() -> None:
    """What it wrote would be lost when the search puts the base back."""
    model, base, tuned, _ = pair()
    host = attach(model)
    host.load(diff(base, tuned, count=20), name="skill")

    def switching(model: Net, batch: Any) -> torch.Tensor:
        host.activate("skill")
        return loss(model, batch)

    with pytest.raises(GateError):
        found("learned", model, tuned, loss=switching)
    assert holds(model, base)
    host.activate("skill")  # and afterwards it goes on
    host.detach(force=True)


def test_the_loss_s_scale_does_not_matter() -> None:
    """Slopes whose squares are no number in fp32, at both ends."""
    plain = found("learned")
    for scale in (2.0**-80, 2.0**60):
        scaled = found("learned", loss=lambda model, batch, by=scale: loss(model, batch) * by)
        assert scaled.mask == plain.mask


def Net_of(state: State) -> Net:  # noqa: N802 - a Net
    model = Net()
    model.load_state_dict(state)
    return model


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


# ---- others -------------------------------------------------------------------------------------


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


# ---- commits and other writes -------------------------------------------------------------------


class Around(nn.Module):
    """A module around another, as an adapter or a pipeline is."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> Any:
        return self.inner(x)


@pytest.mark.parametrize("part", [False, True])
def test_commits_wait_from_the_first_look_at_the_base(
    part: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, base, tuned, _ = pair()
    host = attach(model)
    host.load(diff(base, tuned, count=20), name="skill")
    searched, target = (Around(model), {f"inner.{n}": t for n, t in tuned.items()})
    waited = []

    def slow(*args: Any, **how: Any) -> Graft:
        graft = diff(*args, **how)
        commits.start()
        commits.join(0.2)
        waited.append(commits.is_alive())
        return graft

    commits = threading.Thread(target=host.activate, args=("skill",))
    monkeypatch.setattr(localization, "diff", slow)
    graft = found("learned", *((searched, target) if part else (model, tuned)))
    commits.join()
    assert waited == [True]
    assert graft.mask.nnz == 9
    assert host.active == ("skill",)
    host.verify()  # what the commit wrote is there
    host.deactivate()
    assert holds(model, base)


@pytest.mark.parametrize("when", ["diff", "search"])
def test_a_commit_of_a_host_around_the_model_is_found(
    when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, base, tuned, every = pair()
    outer = Around(model)
    host = attach(outer)
    host.load(diff(outer, {f"inner.{n}": t for n, t in tuned.items()}), name="skill")

    def early(*args: Any, **how: Any) -> Graft:
        graft = diff(*args, **how)
        host.activate("skill")
        return graft

    def late(step: Any) -> None:
        if step.step == 2:
            host.activate("skill")

    if when == "diff":  # before anything was written, so the skill stays live
        monkeypatch.setattr(localization, "diff", early)
        with pytest.raises(BaseMismatchError, match="do not hold the base's values"):
            found("learned", model, tuned)
        assert holds(model, tuned)
        host.verify()
    else:
        with pytest.raises(HostChangedError, match="during the search somebody wrote to"):
            found("learned", model, tuned, count=every.nnz - 1, progress=late)
        assert holds(model, base)  # every entry of the skill was a candidate
        with pytest.raises(HostChangedError):  # the host does not go on as if nothing were
            host.deactivate()


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_tensors_without_a_gradient_are_named() -> None:
    class Saving(Net):
        """Reentrant checkpointing: the first block's input needs no gradient."""

        def forward(self, x: torch.Tensor) -> Any:
            x = checkpoint(self.layers[0], x, use_reentrant=True)
            return self.head(torch.tanh(self.layers[1](x)))

    model, tuned = Saving(), pair()[2]
    says = r"'layers.0.bias', 'layers.0.weight', so .* use_reentrant=True"
    for name in SEARCHES:
        with pytest.warns(UnreachedWarning, match=says) as caught:
            found(name, model, tuned, count=60)
        mine = [w for w in caught if w.category is UnreachedWarning]
        assert len(mine) == 1


# ---- loaders ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SEARCHES)
def test_a_seed_settles_a_shuffling_loader_and_a_noisy_loss(name: str) -> None:
    texts, wanted = (torch.cat(parts) for parts in zip(*batches(8), strict=True))
    loader = DataLoader(TensorDataset(texts, wanted), batch_size=5, shuffle=True)

    def order(seed: int) -> list[float]:
        seen = []

        def noisy(model: Any, batch: Any) -> torch.Tensor:
            seen.append(float(batch[0].sum()))
            seen.append(float(torch.rand(())))
            return loss(model, batch)

        found(name, data=loader, seed=seed, loss=noisy)
        return seen

    orders = []
    for outer, seed in ((1, 4), (2, 4), (2, 5)):
        torch.manual_seed(outer)
        orders.append(order(seed))
    assert orders[0] == orders[1] != orders[2]
