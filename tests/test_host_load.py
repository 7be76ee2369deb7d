"""Loading a skill: checked against this host, or refused with nothing changed."""

from __future__ import annotations

from pathlib import Path

import factories
import pytest
import torch
from hosts import Mixed, Workshop, holds, single
from hotgraft import Graft, attach
from hotgraft.errors import (
    BaseMismatchError,
    CoverageError,
    FormatError,
    GraftError,
    NonFiniteError,
    PartialWarning,
    SkillInUseError,
    UnknownSkillError,
)


def test_load_takes_a_path_and_its_stem(tmp_path: Path) -> None:
    shop = Workshop()
    shop.a.save(tmp_path / "sql.v1.graft.safetensors")
    skill = shop.host.load(tmp_path / "sql.v1.graft.safetensors")
    assert skill.name == "sql.v1"
    assert (skill.id, skill.nnz) == (shop.a.id, shop.a.nnz)
    assert shop.host.load(str(tmp_path / "sql.v1.graft.safetensors"), name="x").id == shop.a.id
    assert shop.host.load(shop.b).name == shop.b.id[:12]
    assert list(shop.host.skills) == ["a", "b", "sql.v1", "x", shop.b.id[:12]]


def test_arguments_of_other_types(tmp_path: Path) -> None:
    shop = Workshop()
    for name in ("", 3, ["c"], b"c"):
        with pytest.raises(GraftError, match="its name is a string, and not empty"):
            shop.host.load(shop.a, name=name)  # type: ignore[arg-type]
    with pytest.raises(CoverageError, match="names 3: wanted a mapping or a function"):
        shop.host.load(shop.a, name="c", names=3)  # type: ignore[arg-type]
    with open(tmp_path / "theirs", "wb") as theirs:
        with pytest.raises(FormatError, match=r"is no path; wanted that of a graft file"):
            shop.host.load(theirs.fileno())  # type: ignore[arg-type]
        theirs.write(b"it is open still")
    with pytest.raises(UnknownSkillError):
        shop.host.unload(["a"])  # type: ignore[arg-type]
    assert list(shop.host.skills) == ["a", "b"]


def test_load_refuses_a_name_twice_unless_replaced() -> None:
    shop = Workshop()
    with pytest.raises(SkillInUseError, match=r"'a' is loaded already; replace=True"):
        shop.host.load(shop.b, name="a")
    shop.host.load(shop.b, name="a", replace=True)
    shop.host.activate("a")
    assert shop.is_b()
    with pytest.raises(SkillInUseError, match="'a' is live"):
        shop.host.load(shop.a, name="a", replace=True)
    assert shop.is_b()


def test_replacing_forgets_the_sets_it_was_composed_into() -> None:
    shop = Workshop()
    shop.host.activate("a", "b", policy="priority")
    shop.host.deactivate()
    c = factories.graft_on(shop.base, seed=3)
    shop.host.load(c, name="b", replace=True)
    shop.host.activate("a", "b", policy="priority")
    assert holds(shop.model, factories.grafted(shop.with_a, c))


def test_composed_plans_are_kept_and_bounded() -> None:
    shop = Workshop()
    plans = []
    for i in range(40):
        shop.host.activate("a", "b", policy="priority")
        plans.append(shop.host._ledger.live.plan)
        shop.host.load(single("first.bias", shop.base["first.bias"], [0], [i]), name=f"n{i}")
        shop.host.activate(f"n{i}", "a", policy="priority")
    assert len({id(plan) for plan in plans}) == 1  # used again and again, so never thrown out
    assert len(shop.host._composer) == 16
    shop.host.deactivate()
    shop.host.unload("a")
    assert not len(shop.host._composer)


def test_an_unknown_skill_lists_the_known() -> None:
    shop = Workshop()
    with pytest.raises(UnknownSkillError, match=r"no skill \['a', 'b'\] is loaded"):
        shop.host.activate(["a", "b"])
    for call in (lambda: shop.host.activate("a", "nobody"), lambda: shop.host.unload("nobody")):
        with pytest.raises(UnknownSkillError, match=r"no skill 'nobody' is loaded; .*: a, b"):
            call()
    with pytest.raises(UnknownSkillError, match="none yet"):
        attach(Mixed()).activate("a")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"names": ("a", "a")}, "named twice"),
        ({"names": ("a",), "policy": "best"}, "unknown policy 'best'; known are refuse"),
        ({"names": ("a",), "weights": [1.0, 2.0]}, "2 weights for 1 grafts"),
        ({"names": ("a",), "weights": 0.5}, "give a list with a number a graft"),
        ({"names": ("a", "b"), "policy": "sum", "weights": [1.0, float("nan")]}, "nan is not"),
        ({"names": ("a", "b"), "policy": "sum"}, "knows no arithmetic"),
    ],
)
def test_bad_arguments_of_activate(arguments: dict, message: str) -> None:
    shop = Workshop()
    names = arguments.pop("names")
    with pytest.raises(GraftError, match=message):
        shop.host.activate(*names, **arguments)
    assert shop.is_base()


def test_load_verify_and_unload_under_a_live_skill(shop: Workshop) -> None:
    shop.host.activate("a")
    c = factories.graft_on(shop.base, seed=3, share=0.5)
    shop.host.load(c, name="c")  # overlaps a: what the base holds under a is known from a
    assert shop.host.verify() == 2 * shop.a.nnz + shop.b.nnz + c.nnz
    shop.host.unload("b")
    shop.host.activate("c")
    assert holds(shop.model, factories.grafted(shop.base, c))
    on_top = factories.graft_on(shop.with_a, seed=3, share=0.5)
    with pytest.raises(BaseMismatchError, match=r"skill 'd' does not fit: .*wanted"):
        shop.host.load(on_top, name="d")


def test_a_base_that_differs_under_the_live_skill_is_refused(shop: Workshop) -> None:
    shop.host.activate("a")
    name = shop.a.names[0]
    at = int(shop.a[name].indices[0])
    other = single(name, shop.base[name], [at], [5.0], [3.0])
    with pytest.raises(BaseMismatchError, match=rf"{name}.*position {at}: the base holds bits 0x"):
        shop.host.load(other, name="c")
    assert shop.is_a()


def test_wrong_bits_say_where_what_and_what_was_wanted(shop: Workshop) -> None:
    base = shop.base["second.weight"]
    wrong = single("second.weight", base, [3, 7], [1.0, 1.0], [base.view(-1)[3].item(), 2.0])
    held = int(base.view(torch.uint16).view(-1)[7])
    with pytest.raises(
        BaseMismatchError,
        match=rf"1 of 2 entries differ, first 'second.weight', position 7: found bits {held:#x}, "
        "wanted 0x4000",
    ):
        shop.host.load(wrong, name="c")
    assert list(shop.host.skills) == ["a", "b"]


def test_wrong_shape_dtype_and_name_are_refused() -> None:
    shop = Workshop()
    with pytest.raises(BaseMismatchError, match=r"'first.bias' has shape \[7\].*\[5\] in the host"):
        shop.host.load(single("first.bias", torch.zeros(7), [0], [1.0]))
    with pytest.raises(BaseMismatchError, match=r"'first.bias' is BF16 in the graft and F32"):
        shop.host.load(single("first.bias", torch.zeros(5, dtype=torch.bfloat16), [0], [1.0]))
    with pytest.raises(CoverageError, match=r"lacks 'frist.bias'; the nearest .* 'first.bias'"):
        shop.host.load(single("frist.bias", torch.zeros(5), [0], [1.0]))
    assert list(shop.host.skills) == ["a", "b"]
    assert shop.is_base()


def test_partial_coverage_is_refused_unless_asked_for() -> None:
    shop = Workshop()
    parts = {name: shop.a[name] for name in shop.a.names}
    parts["third.weight"] = parts["first.bias"]
    graft = Graft.from_entries(parts)
    with pytest.raises(CoverageError, match=r"lacks 'third.weight'.*partial=True"):
        shop.host.load(graft, name="c")
    lost = len(parts["first.bias"].indices)
    with pytest.warns(PartialWarning, match=rf"{lost} of {graft.nnz} entries are left") as caught:
        skill = shop.host.load(graft, name="c", partial=True)
    assert caught[0].filename == __file__
    assert (skill.nnz, skill.id) == (shop.a.nnz, graft.id)
    shop.host.activate("c")
    assert shop.is_a()
    alone = Graft.from_entries({"third.weight": parts["first.bias"]})
    with pytest.raises(CoverageError, match=r"third.weight"):
        shop.host.load(alone, partial=True)


def test_nonfinite_bits_are_refused_unless_allowed(shop: Workshop) -> None:
    graft = single("first.bias", shop.base["first.bias"], [1, 3], [1.0, float("nan")])
    with pytest.raises(NonFiniteError, match=r"'first.bias', position 3: .*0x7fc00000.*allow_nonf"):
        shop.host.load(graft, name="c")
    shop.host.load(graft, name="c", allow_nonfinite=True)
    with shop.host.using("c"):
        assert holds(shop.model, factories.grafted(shop.base, graft))


def test_a_bad_file_changes_nothing(tmp_path: Path) -> None:
    shop = Workshop()
    (tmp_path / "bad.graft.safetensors").write_bytes(b"\0" * 100)
    with pytest.raises(FormatError):
        shop.host.load(tmp_path / "bad.graft.safetensors")
    with pytest.raises(OSError, match="nowhere"):
        shop.host.load(tmp_path / "nowhere.graft.safetensors")
    assert list(shop.host.skills) == ["a", "b"]
