"""Digest, verify and adopt: what is known of the weights and what is found out."""

from __future__ import annotations

import itertools
import re

import factories
import pytest
import torch
from hosts import Mixed, Workshop, contents, holds, single
from hotgraft import attach, fingerprint
from hotgraft.errors import (
    AdoptWarning,
    HostChangedError,
    HotgraftError,
    SkillInUseError,
)
from torch import nn


def test_digest_is_keyed_on_base_ids_weights_and_policy() -> None:
    shop = Workshop(base_id="base")
    host, seen = shop.host, set()
    host.load(shop.a, name="a too")
    sets = [
        ((), {}),
        (("a",), {}),
        (("b",), {}),
        (("a", "b"), {"policy": "priority"}),
        (("b", "a"), {"policy": "priority"}),
    ]
    for names, more in sets:
        host.activate(*names, **more)
        seen.add(host.digest)
    assert len(seen) == len(sets)
    host.activate("a")
    digest = host.digest
    assert re.fullmatch("[0-9a-f]{64}", digest)
    host.activate("a too")
    assert host.digest == digest  # the name is not part of it
    assert Workshop(base_id="other").host.digest not in seen
    host.deactivate()
    assert Workshop(base_id="base").host.digest == host.digest


def test_digest_counts_order_only_under_priority() -> None:
    model = nn.Linear(4, 4)
    host = attach(model, base_id="base")
    for i in range(2):
        host.load(single("weight", model.weight, [i, 8], [1.0, 1.0]), name=f"s{i}")
    digests = {}
    for policy, names, weights in itertools.product(
        ("refuse", "sum"), (("s0", "s1"), ("s1", "s0")), ((1.0, 1.0), (2.0, 2.0))
    ):
        host.activate(*names, policy=policy, weights=weights)
        digests[policy, names, weights] = host.digest
        assert host.active == names
    assert len(set(digests.values())) == 4


def test_digest_tells_apart_what_names_map_elsewhere() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    with torch.no_grad():
        model[1].weight.copy_(model[0].weight)
    graft = single("0.weight", model[0].weight, [1], [7.0])
    digests = set()
    for target in ("0.weight", "1.weight"):
        host = attach(model, base_id="base")
        host.load(graft, name="a", names={"0.weight": target})
        with host.using("a"):
            digests.add(host.digest)
        host.detach()
    assert len(digests) == 2


def test_digest_without_a_base_id_says_what_to_do() -> None:
    shop = Workshop()
    with pytest.raises(HotgraftError, match=r"fingerprint\(model\).*attach\(model, base_id"):
        _ = shop.host.digest
    assert shop.host.base_id is None


def test_verify_finds_every_foreign_write(shop: Workshop) -> None:
    shop.host.activate("a")
    total = shop.host.verify()
    assert total == 2 * shop.a.nnz + shop.b.nnz
    for name in shop.a.names:
        tensor = shop.model.state_dict()[name]
        live = {int(i) for i in shop.a[name].indices}
        for at in sorted(live | {int(i) for i in shop.b[name].indices}):
            flat = tensor.data.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[
                tensor.element_size()
            ]).view(-1)  # fmt: skip
            flat[at] ^= 1
            with pytest.raises(
                HostChangedError,
                match=rf"wrote to the weights: .*'{name}', position {at}: found bits",
            ):
                shop.host.verify()
            flat[at] ^= 1
    assert shop.host.verify() == total


def test_verify_checks_the_whole_base_where_its_id_is_known() -> None:
    shop = Workshop(base_id=fingerprint(Mixed()))
    untouched = next(i for i in range(5) if i not in shop.a["first.bias"].indices
                     and i not in shop.b["first.bias"].indices)  # fmt: skip
    shop.host.activate("a")
    with torch.no_grad():
        shop.model.first.bias[untouched] += 1
    with pytest.raises(HostChangedError, match=r"base's id is now .*outside the skills"):
        shop.host.verify()
    with torch.no_grad():
        shop.model.first.bias.copy_(shop.with_a["first.bias"])
    shop.host.verify()
    shop.host.deactivate()
    assert shop.is_base()


@pytest.mark.parametrize("name", ["0.weight", "1.weight", "1.bias"])
def test_verify_finds_writes_that_torch_does_not_count(name: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    host = attach(model, base_id=fingerprint(model))
    host.load(single("0.weight", model[0].weight, [1], [2.0]), name="a")
    host.activate("a")
    host.verify()
    data = model.get_parameter(name).data.view(-1)
    before = data[3].item()
    data[3] = 5.0
    with pytest.raises(HostChangedError, match=r"base's id is now"):
        host.verify()
    data[3] = before
    host.verify()
    model[1] = nn.Linear(4, 4)  # no skill writes to it
    host.deactivate()
    with pytest.raises(HostChangedError, match=r"module '1' was replaced"):
        host.verify()


def test_adopt_takes_what_is_live_for_the_base() -> None:
    shop = Workshop(base_id="base")
    at = next(i for i in range(30) if i not in shop.a["first.weight"].indices)
    kept = single("first.weight", shop.base["first.weight"], [at], [9.0])
    shop.host.load(kept, name="kept")
    shop.host.activate("a")
    with pytest.warns(AdoptWarning, match=r"do not fit the adopted base: a, b; rebase"):
        assert shop.host.adopt() == ("a", "b")
    assert shop.host.active == ()
    assert shop.host.base_id is None
    assert list(shop.host.skills) == ["kept"]
    shop.host.activate("kept")
    assert holds(shop.model, factories.grafted(shop.with_a, kept))
    shop.host.load(shop.b.rebase(shop.with_a, mode="replacement"), name="b")
    shop.host.activate("b")
    assert holds(shop.model, factories.grafted(shop.with_a, shop.b))
    shop.host.deactivate()
    assert shop.is_a()


def test_adopt_after_an_optimiser_step() -> None:
    model = nn.Linear(4, 4)
    host = attach(model)
    host.load(single("weight", model.weight, [0], [3.0]), name="a")
    model(torch.ones(4)).sum().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    stepped = contents(model)
    with pytest.raises(HostChangedError):
        host.activate("a")
    with pytest.warns(AdoptWarning):
        host.adopt()
    host.load(single("weight", model.weight, [0], [3.0]), name="a")
    host.activate("a")
    host.deactivate()
    assert holds(model, stepped)


def test_adopt_is_refused_in_a_block_and_after_a_move() -> None:
    shop = Workshop(base_id="base")
    with shop.host.using("a"), pytest.raises(SkillInUseError, match="nothing to go back to"):
        shop.host.adopt()
    shop.model.double()
    with pytest.raises(HostChangedError, match="was moved"):
        shop.host.adopt()
    assert list(shop.host.skills) == ["a", "b"]
    assert shop.host.base_id == "base"
