"""What is live: activate, using, hold, unload, detach, attach."""

from __future__ import annotations

import itertools
import re
import threading

import factories
import pytest
import torch
from hosts import Mixed, Workshop, contents, holds, single, versions
from hotgraft import Graft, attach, compose
from hotgraft.errors import (
    BackendError,
    GateError,
    GraftError,
    HotgraftError,
    OverlapError,
    SkillInUseError,
    UnknownSkillError,
)
from torch import nn

# ---- live = f(base, the active set, the policy) -------------------------------------------------


def test_activate_writes_exactly_the_new_bits_and_deactivate_the_base(shop: Workshop) -> None:
    assert shop.is_base()
    shop.host.activate("a")
    assert shop.is_a()
    assert shop.host.active == ("a",)
    shop.host.deactivate()
    assert shop.is_base()
    assert shop.host.active == ()


def test_applying_twice_is_applying_once(shop: Workshop) -> None:
    shop.host.activate("a")
    before = versions(shop.model)
    shop.host.activate("a")
    assert shop.is_a()
    assert versions(shop.model) == before


def test_activate_replaces_what_was_live(shop: Workshop) -> None:
    shop.host.activate("a")
    shop.host.activate("b")
    assert shop.is_b()
    shop.host.activate()
    assert shop.is_base()


@pytest.mark.parametrize("policy", ["priority", "sum", "mean", "sign"])
def test_sets_equal_the_composed_graft(shop: Workshop, policy: str) -> None:
    names = [name for name in shop.a.names if name != "step"] if policy != "priority" else None
    if names is not None:  # integers know no arithmetic
        host = shop.host
        host.unload("a")
        host.unload("b")
        base = {name: shop.base[name] for name in names}
        shop.a, shop.b = (shrunk(base, seed) for seed in (1, 2))
        host.load(shop.a, name="a")
        host.load(shop.b, name="b")
    weights = [1.0, 1.0] if policy == "priority" else [0.5, 0.25]
    shop.host.activate("a", "b", policy=policy, weights=weights)
    composed = compose([shop.a, shop.b], policy, weights, backend="reference")
    assert holds(shop.model, factories.grafted(shop.base, composed))
    shop.host.activate("b")
    assert holds(shop.model, factories.grafted(shop.base, shop.b))


def shrunk(base: dict[str, torch.Tensor], seed: int) -> Graft:
    """A graft whose values are the base's, halved: arithmetic on it does not overflow."""
    positions = factories.graft_on(base, seed=seed, share=0.4).mask
    halved = {name: (tensor * 0.5).to(tensor.dtype) for name, tensor in base.items()}
    return Graft.from_mask(base, halved, positions)


def test_priority_lets_the_last_named_win(shop: Workshop) -> None:
    shop.host.activate("a", "b", policy="priority")
    b_on_a = factories.grafted(shop.with_a, shop.b)
    assert holds(shop.model, b_on_a)
    shop.host.activate("b", "a", policy="priority")
    assert holds(shop.model, factories.grafted(shop.with_b, shop.a))


def test_refused_overlap_counts_and_changes_nothing(shop: Workshop) -> None:
    shop.host.activate("a")
    before = versions(shop.model)
    shared = (shop.a.mask & shop.b.mask).nnz
    with pytest.raises(OverlapError, match=r"(a and b|b and a) on \d+") as raised:
        shop.host.activate("a", "b")
    counts = re.findall(r" on (\d+)", str(raised.value))
    assert 0 < sum(map(int, counts)) <= shared
    assert shop.is_a()
    assert versions(shop.model) == before
    assert shop.host.active == ("a",)


def test_any_order_of_leaving_ends_in_the_base() -> None:
    for order in itertools.permutations("abc"):
        shop = Workshop()
        shop.host.load(factories.graft_on(shop.base, seed=3), name="c")
        left = ["a", "b", "c"]
        shop.host.activate(*left, policy="priority")
        for name in order:
            left.remove(name)
            shop.host.activate(*left, policy="priority")
            wanted = shop.base
            for rest in left:
                wanted = factories.grafted(wanted, shop.host.skills[rest].plan.graft)
            assert holds(shop.model, wanted)
        assert shop.is_base()


def test_using_nests_and_puts_back(shop: Workshop) -> None:
    with shop.host.using("a"):
        assert shop.is_a()
        with shop.host.using("b"):
            assert shop.is_b()
        assert shop.is_a()
    assert shop.is_base()


@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt, GeneratorExit, SystemExit])
def test_using_puts_back_on_exceptions(shop: Workshop, kind: type[BaseException]) -> None:
    shop.host.activate("b")
    with pytest.raises(kind), shop.host.using("a"):
        raise kind
    assert shop.is_b()


def test_using_puts_back_after_switching_inside(shop: Workshop) -> None:
    with shop.host.using("a"):
        shop.host.activate("b")
    assert shop.is_base()
    with pytest.raises(UnknownSkillError), shop.host.using("nobody"):
        raise AssertionError
    assert shop.host.unload("a") is None  # nothing is left that would put it back


def test_using_blocks_may_end_in_any_order() -> None:
    shop = Workshop()
    first, second = shop.host.using("a"), shop.host.using("b")
    with first:
        second.__enter__()
    assert shop.is_b()  # the later block is still open
    second.__exit__(None, None, None)
    assert shop.is_base()


def test_using_in_two_threads_ends_in_the_base() -> None:
    shop = Workshop()

    def work(name: str) -> None:
        for _ in range(100):
            with shop.host.using(name):
                pass

    threads = [threading.Thread(target=work, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert shop.is_base()
    assert shop.host.active == ()


def test_hold_refuses_a_commit_of_its_own_thread(shop: Workshop) -> None:
    with shop.host.hold():
        with pytest.raises(GateError, match="hold of the same thread"):
            shop.host.activate("a")
        assert shop.host.verify() == shop.a.nnz + shop.b.nnz
        shop.host.load(shop.a, name="again")
        with pytest.raises(UnknownSkillError), shop.host.using("nobody"):
            raise AssertionError
        with pytest.raises(GateError) as raised, shop.host.using("a"):
            raise AssertionError
        assert raised.value.__context__ is None
    assert shop.is_base()
    shop.host.activate("again")
    assert shop.is_a()


def test_a_block_left_inside_a_hold_is_over(shop: Workshop) -> None:
    block = shop.host.using("a")
    block.__enter__()
    with shop.host.hold(), pytest.raises(GateError, match="inside a forward pass or a hold"):
        block.__exit__(None, None, None)
    assert shop.host.active == ("a",)
    shop.host.deactivate()
    assert shop.is_base()
    assert shop.host.adopt() == ()


def test_active_is_in_the_order_last_given(shop: Workshop) -> None:
    shop.host.load(single("step", shop.base["step"], [0], [5]), name="c")
    shop.host.unload("b")
    shop.host.load(single("first.bias", shop.base["first.bias"], [0], [2.5]), name="b")
    for names in (("b", "c"), ("c", "b")):
        shop.host.activate(*names)
        assert shop.host.active == names


def test_a_weight_of_minus_zero_is_zero() -> None:
    model = nn.Linear(2, 1, bias=False)
    nn.init.constant_(model.weight, -0.0)
    host = attach(model)
    host.load(single("weight", model.weight, [0, 1], [2.5, -2.5]), name="a")
    host.activate("a", weights=[0.0])
    zero = contents(model)
    host.activate("a", weights=[-0.0])
    assert holds(model, zero)
    assert str(host._ledger.live.weights) == "(0.0,)"


# ---- leaving ------------------------------------------------------------------------------------


def test_unload_refuses_what_is_live_unless_forced(shop: Workshop) -> None:
    shop.host.activate("a")
    with pytest.raises(SkillInUseError, match="'a' is live; deactivate first"):
        shop.host.unload("a")
    assert shop.is_a()
    shop.host.unload("b", force=True)
    assert shop.is_a()
    shop.host.unload("a", force=True)
    assert shop.is_base()
    assert not shop.host.skills


def test_unload_refuses_what_a_block_will_put_back(shop: Workshop) -> None:
    shop.host.activate("a")
    with shop.host.using("b"):
        for force in (False, True):
            with pytest.raises(SkillInUseError, match="open `using` block will put 'a' back"):
                shop.host.unload("a", force=force)
        assert shop.is_b()
    assert shop.is_a()


def test_detach_gives_the_base_back() -> None:
    shop = Workshop()
    shop.host.activate("a")
    with pytest.raises(SkillInUseError, match="a is live"):
        shop.host.detach()
    shop.host.detach(force=True)
    assert shop.is_base()
    assert "forward" not in vars(shop.model)
    shop.host.detach()
    for call in (
        lambda: shop.host.activate("a"),
        lambda: shop.host.load(shop.a, name="z"),
        shop.host.verify,
        shop.host.deactivate,
        shop.host.adopt,
    ):
        with pytest.raises(HotgraftError, match="was detached"):
            call()
    again = attach(shop.model)
    again.load(shop.a, name="a")
    again.activate("a")
    assert shop.is_a()


def test_detach_inside_a_block_leaves_the_base() -> None:
    shop = Workshop()
    with shop.host.using("a"):
        shop.host.detach(force=True)
    assert shop.is_base()


# ---- attaching ----------------------------------------------------------------------------------


def test_attach_refuses_what_it_cannot_serve() -> None:
    with pytest.raises(GraftError, match="ReLU has no parameters"):
        attach(nn.ReLU())
    with pytest.raises(BackendError, match="unknown backend 'warp'; known are cpu, reference"):
        attach(Mixed(), backend="warp")
    with pytest.raises(BackendError, match="cuda"):
        attach(Mixed(), backend="cuda")
    model = Mixed()
    attach(model)
    with pytest.raises(GateError, match="attached to this model already"):
        attach(model)


def test_repr_says_what_is_live() -> None:
    shop = Workshop()
    assert repr(shop.host) == "Host(Mixed, 2 skills, live: nothing)"
    shop.host.activate("a")
    assert repr(shop.host) == "Host(Mixed, 2 skills, live: a)"
