"""Where a coordinate lives: tied, transposed, strided, any dtype; what cannot be written."""

from __future__ import annotations

import ctypes
import mmap
from pathlib import Path

import factories
import numpy as np
import pytest
import torch
from hosts import contents, holds, single
from hotgraft import Entries, Graft, attach, fingerprint
from hotgraft.errors import (
    BaseMismatchError,
    CastWarning,
    CoverageError,
    GraftError,
    HostChangedError,
    NonFiniteError,
    OverlapError,
    ParameterError,
)
from hotgraft.format import DTYPES
from hotgraft.placement.slots import overlaps_itself
from torch import nn

BACKENDS = pytest.mark.parametrize("backend", ["cpu", "reference"])


class Holder(nn.Module):
    """Some tensors as parameters (floats) or buffers (the rest)."""

    def __init__(self, **tensors: torch.Tensor) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            if tensor.is_floating_point():
                self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
            else:
                self.register_buffer(name, tensor)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def round_trip(model: nn.Module, backend: str, seed: int = 5) -> None:
    """A graft on everything goes in and out, exactly."""
    base = contents(model)
    unique = {name: base[name] for name, _ in model.named_parameters()}
    unique |= {name: base[name] for name, _ in model.named_buffers()}
    graft = factories.graft_on(unique, seed=seed, share=0.5, finite=False)
    wanted = factories.grafted(unique, graft)
    host = attach(model, backend=backend)
    host.load(graft, name="a", allow_nonfinite=True)
    host.activate("a")
    held = contents(model)
    assert factories.same_bits({name: held[name] for name in unique}, wanted)
    host.verify()
    host.deactivate()
    assert holds(model, base)
    host.detach()


@BACKENDS
@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_every_dtype(dtype: str, backend: str) -> None:
    values = factories.tensor(dtype, (5, 7), seed=3, finite=False)
    round_trip(Holder(w=values, scalar=values[0, 0].clone(), row=values[2].clone()), backend)


@BACKENDS
def test_several_dtypes_of_one_size(backend: str) -> None:
    names = ("BF16", "F16", "I16", "F32", "I32", "F64", "F8_E5M2", "U8", "BOOL")
    round_trip(Holder(**{n.lower(): factories.tensor(n, (4, 3), seed=1) for n in names}), backend)


@BACKENDS
def test_strided_parameters(backend: str) -> None:
    big = factories.tensor("BF16", (6, 12), seed=1)
    halves = Holder(left=big[:, :5], right=big[:, 5:], plain=factories.tensor("BF16", (4,), 2))
    assert halves.left.data_ptr() == big.data_ptr()
    round_trip(halves, backend)
    round_trip(Holder(t=factories.tensor("F32", (4, 6), seed=2).t()), backend)
    round_trip(Holder(p=factories.tensor("F16", (2, 3, 4, 2), seed=2).permute(3, 0, 2, 1)), backend)
    round_trip(Holder(one=factories.tensor("F32", (1, 6), seed=2)[:, ::2]), backend)
    conv = nn.Conv2d(3, 4, 2, bias=False).to(memory_format=torch.channels_last)
    assert not conv.weight.is_contiguous()
    round_trip(conv, backend)


@BACKENDS
def test_a_mix_of_contiguous_and_strided(backend: str) -> None:
    big = factories.tensor("F32", (5, 8), seed=1)
    round_trip(Holder(a=big[:, 1:3], b=big[:, 4:].t(), c=big[:, 0].clone()), backend)


def test_mismatches_in_strided_tensors_name_the_checkpoint_position() -> None:
    model = Holder(w=torch.arange(12.0).view(3, 4).t())
    host = attach(model)
    wrong = single("w", torch.arange(12.0).view(3, 4).t().contiguous(), [1, 7], [9, 9], [4, 5])
    with pytest.raises(BaseMismatchError, match="'w', position 7: found bits 0x40c00000, wanted"):
        host.load(wrong)


# ---- tied ---------------------------------------------------------------------------------------


@BACKENDS
def test_tied_parameters_under_either_name(backend: str) -> None:
    for name in ("embed.weight", "head.weight"):
        model = factories.TinyModel()
        base = contents(model)
        graft = single(name, model.embed.weight, [2, 9], [5.0, 6.0])
        host = attach(model, backend=backend)
        host.load(graft, name="a")
        host.activate("a")
        wanted = factories.grafted(
            base, single("embed.weight", base["embed.weight"], [2, 9], [5, 6])
        )
        wanted["head.weight"] = wanted["embed.weight"]
        assert holds(model, wanted)
        host.verify()
        host.deactivate()
        assert holds(model, base)


def test_skills_meet_under_different_tied_names() -> None:
    model = factories.TinyModel()
    base = contents(model)
    host = attach(model, base_id=fingerprint(model))
    host.load(single("embed.weight", model.embed.weight, [2, 4], [5.0, 6.0]), name="a")
    host.activate("a")
    host.load(single("head.weight", base["head.weight"], [4, 8], [7.0, 8.0]), name="b")
    host.activate("a", "b", policy="priority")
    assert model.head.weight.view(-1)[[2, 4, 8]].tolist() == [5.0, 7.0, 8.0]
    with torch.no_grad():
        model.embed.weight.mul_(1)  # a write that changes nothing: the whole base is looked at
    host.verify()
    host.deactivate()
    assert holds(model, base)


def test_a_graft_that_names_tied_tensors_twice() -> None:
    model = factories.TinyModel()
    one = single("embed.weight", model.embed.weight, [2, 9], [5.0, 6.0])["embed.weight"]
    other = single("head.weight", model.embed.weight, [2, 9], [5.0, 7.0])["head.weight"]
    host = attach(model)
    skill = host.load(Graft.from_entries({"embed.weight": one, "head.weight": one}), name="same")
    assert skill.nnz == 2
    with pytest.raises(CoverageError, match=r"'embed.weight' and 'head.weight' share memory"):
        host.load(Graft.from_entries({"embed.weight": one, "head.weight": other}))


def test_skills_on_views_of_one_storage() -> None:
    fused = torch.zeros(3, 8)
    model = Holder(q=fused[:, :4], k=fused[:, 4:])
    host = attach(model)
    host.load(single("q", fused[:, :4], [1], [7.0]), name="q")
    host.load(single("k", fused[:, 4:], [2], [8.0]), name="k")
    for names in (("q",), ("k",), ("q", "k"), ()):
        host.activate(*names)
        assert (fused[0, 1].item(), fused[0, 6].item()) == (
            7.0 * ("q" in names),
            8.0 * ("k" in names),
        )


def test_different_parameters_on_one_storage() -> None:
    shared = torch.arange(6.0)
    model = Holder(a=shared, b=shared, part=shared[2:5])  # they share a version counter
    assert model.a is not model.b
    before = model.a._version, model.b._version
    host = attach(model)
    host.load(single("b", shared, [1, 3], [7.0, 8.0]), name="x")
    host.activate("x")
    assert model.part.tolist() == [2.0, 8.0, 4.0]
    assert (model.a._version, model.b._version) > before
    assert model.a._version > before[0]
    host.deactivate()
    entries = {"a": single("a", shared, [3], [7.0])["a"]}
    entries["part"] = single("part", shared[2:5], [1], [8.0])["part"]
    with pytest.raises(CoverageError, match=r"'a' and 'part' share memory"):
        host.load(Graft.from_entries(entries))
    assert shared.tolist() == [0, 1, 2, 3, 4, 5]


class Transposed(nn.Module):
    """An autoencoder whose decoder is its encoder, transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.enc = nn.Linear(4, 3, bias=False)
        self.dec = nn.Linear(3, 4, bias=False)
        nn.init.zeros_(self.enc.weight)
        self.dec.weight = nn.Parameter(self.enc.weight.data.t())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.dec(self.enc(x))
        return out


@BACKENDS
def test_skills_meet_in_a_transposed_tie(backend: str) -> None:
    model = Transposed()
    base = contents(model)
    host = attach(model, backend=backend, base_id=fingerprint(model))
    host.load(single("enc.weight", base["enc.weight"], [1], [7.0]), name="a")
    host.activate("a")
    cell = model.enc.weight[0]
    with pytest.raises(BaseMismatchError, match=r"'enc.weight', position 1: the base holds"):
        host.load(single("dec.weight", base["dec.weight"], [3], [9.0], [7.0]), name="b")
    host.load(single("dec.weight", base["dec.weight"], [3, 4], [9.0, 5.0]), name="b")
    assert host.skills["b"].plan.graft.names == ("enc.weight",)
    for names, policy, wanted in (
        ("b", "refuse", 9.0), ("ab", "sum", 16.0), ("ab", "mean", 8.0), ("ba", "priority", 7.0),
    ):  # fmt: skip
        host.activate(*names, policy=policy)
        assert cell[1] == wanted
        assert model.dec.weight[1].tolist() == [wanted, 5.0 * ("b" in names), 0.0]
        with torch.no_grad():
            model.dec.weight.mul_(1)
        host.verify()
    with pytest.raises(OverlapError):
        host.activate("a", "b")
    host.deactivate()
    assert holds(model, base)


def test_a_graft_may_say_different_cells_under_different_names() -> None:
    model = Transposed()
    base = contents(model)
    parts = {
        "enc.weight": single("enc.weight", base["enc.weight"], [1, 2], [7.0, 8.0])["enc.weight"],
        "dec.weight": single("dec.weight", base["dec.weight"], [3, 4], [7.0, 5.0])["dec.weight"],
    }
    host = attach(model)
    skill = host.load(Graft.from_entries(parts), name="a")
    assert skill.plan.graft["enc.weight"].indices.tolist() == [1, 2, 5]
    assert skill.plan.graft["enc.weight"].new.tolist() == [7.0, 8.0, 5.0]
    host.activate("a")
    assert model.enc.weight.view(-1)[[1, 2, 5]].tolist() == [7.0, 8.0, 5.0]
    parts["dec.weight"] = single("dec.weight", base["dec.weight"], [3], [6.0])["dec.weight"]
    with pytest.raises(CoverageError, match=r"'dec.weight' and 'enc.weight' share memory"):
        host.load(Graft.from_entries(parts), name="b")
    model.dec.weight = nn.Parameter(torch.zeros(4, 3))
    with pytest.raises(HostChangedError, match=r"'dec.weight' was replaced"):
        host.deactivate()


def test_clones_of_what_the_host_ties_are_united() -> None:
    model = factories.TinyModel()
    shape = model.embed.weight
    halves = {
        "embed.weight": single("embed.weight", shape, [2, 9], [5.0, 6.0])["embed.weight"],
        "head.weight": single("head.weight", shape, [4, 9], [3.0, 6.0])["head.weight"],
    }
    host = attach(model)
    host.load(Graft.from_entries(halves), name="a")
    host.activate("a")
    assert model.embed.weight.view(-1)[[2, 4, 9]].tolist() == [5.0, 3.0, 6.0]


def test_views_meet_in_the_tensor_that_covers_them() -> None:
    flat = torch.zeros(24)
    model = Holder(
        rows=flat[:12].view(3, 4), flat=flat, left=flat.view(6, 4)[:, :2], tail=flat[13:]
    )
    base = contents(model)
    host = attach(model)
    for name, at in (("rows", 4), ("left", 4), ("tail", 2), ("flat", 8)):
        host.load(single(name, base[name], [at], [1.0 + at]), name=name)
    assert {skill.plan.graft.names for skill in host.skills.values()} == {("flat",)}
    host.activate("rows", "tail", "left")
    assert flat.nonzero().flatten().tolist() == [4, 8, 15]
    with pytest.raises(OverlapError):
        host.activate("left", "flat", policy="refuse")
    host.deactivate()
    assert not flat.any()


def test_overlaps_that_nothing_covers_are_refused_by_name() -> None:
    flat = torch.zeros(24)
    halves = Holder(a=flat[:16], b=flat[8:], c=flat.view(torch.int32)[20:])
    columns = Holder(a=flat.view(4, 6)[:, :4], b=flat.view(4, 6)[:, 3:])
    bits = Holder(a=flat, b=flat.view(torch.int32))
    for model in (halves, columns, bits):
        host = attach(model)
        with pytest.raises(ParameterError, match=r"'a' and 'b' share memory.*clone one"):
            host.load(single("a", model.a, [1], [1.0]))
    attach(Holder(a=flat.view(4, 6)[:, :4], b=flat.view(4, 6)[:, 4:])).load(
        single("b", flat.view(4, 6)[:, 4:], [1], [1.0])
    )


# ---- what cannot be written ---------------------------------------------------------------------


class Quantised(nn.Parameter):
    """Looks like a bitsandbytes parameter: packed bytes, and a state that explains them."""

    quant_state = "nf4"


def mapped(tmp_path: Path) -> torch.Tensor:
    path = tmp_path / "weights"
    path.write_bytes(np.arange(4096, dtype=np.float32).tobytes())
    with path.open("rb") as file:
        view = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    array = np.frombuffer(view, np.float32)
    address = array.__array_interface__["data"][0]
    writable = (ctypes.c_float * 4096).from_address(address)  # torch itself would warn
    tensor = torch.from_numpy(np.ctypeslib.as_array(writable))
    tensor.keep = (view, array)
    return tensor


def test_parameters_that_cannot_be_written_are_refused() -> None:
    good = torch.zeros(4, 4)
    model = Holder(good=good)
    model.register_parameter("meta", nn.Parameter(torch.empty(4, 4, device="meta")))
    model.register_parameter("expanded", nn.Parameter(torch.zeros(1, 4).expand(4, 4)))
    model.register_parameter("overlapping", nn.Parameter(torch.zeros(9).as_strided((4, 4), (1, 1))))
    model.register_parameter("quantised", Quantised(torch.zeros(4, 4), requires_grad=False))
    model.register_parameter("lazy", nn.UninitializedParameter())
    model.register_buffer("sparse", torch.zeros(4, 4).to_sparse())
    model.register_buffer("negative", torch.zeros(4, 4)._neg_view())
    messages = {
        "meta": "on the meta device",
        "expanded": "several elements may share memory",
        "overlapping": "several elements may share memory",
        "quantised": "is a Quantised, which stores other bits",
        "lazy": "not initialised yet",
        "sparse": "wanted a strided tensor",
        "negative": "lazy view",
    }
    host = attach(model)
    entries = single("good", good, [1], [1.0])["good"]
    for name, message in messages.items():
        with pytest.raises(ParameterError, match=rf"'{name}'.*{message}"):
            host.load(Graft.from_entries({"good": entries, name: entries}), name="x")
    assert not host.skills
    assert not good.any()
    host.load(Graft.from_entries({"good": entries}), name="x")
    host.activate("x")
    host.deactivate()


def test_read_only_memory_is_refused_before_it_is_written(tmp_path: Path) -> None:
    held = mapped(tmp_path)
    host = attach(Holder(w=held))
    with pytest.raises(ParameterError, match=r"'w' lies in read-only memory.*clone it"):
        host.load(single("w", held, [1, 2], [0.0, 0.0]))
    assert not host.skills


def test_a_model_that_is_all_meta_says_so() -> None:
    with torch.device("meta"):
        host = attach(nn.Linear(2, 2))
    with pytest.raises(ParameterError, match="meta device, so it has no data here"):
        host.load(single("weight", torch.zeros(2, 2), [1], [1.0]))


def test_types_that_grafts_cannot_hold_are_refused() -> None:
    model = Holder(good=torch.zeros(3))
    model.register_buffer("complex", torch.zeros(3, dtype=torch.complex64))
    host = attach(model)
    with pytest.raises(GraftError, match=r"'complex' has dtype torch.complex64"):
        host.load(single("complex", torch.zeros(3), [1], [1.0]))
    host.load(single("good", torch.zeros(3), [1], [1.0]))


@pytest.mark.parametrize(
    ("shape", "strides", "overlaps"),
    [((3, 4), (4, 1), False), ((4, 3), (1, 4), False), ((3, 4), (12, 2), False), ((), (), False),
     ((1, 4), (0, 1), False), ((3, 4), (0, 1), True), ((3, 4), (3, 1), True),
     ((2, 2), (1, 1), True)],
)  # fmt: skip
def test_overlaps_itself(shape: tuple, strides: tuple, overlaps: bool) -> None:
    assert overlaps_itself(shape, strides) is overlaps


# ---- casts --------------------------------------------------------------------------------------


def entries_of(new: list[float], old: list[float], dtype: torch.dtype) -> Graft:
    where = torch.arange(len(new))
    made = Entries(
        where, torch.tensor(new, dtype=dtype), torch.tensor(old, dtype=dtype), (len(new),)
    )
    return Graft.from_entries({"w": made})


@BACKENDS
@pytest.mark.parametrize("source", factories.FLOATS)
@pytest.mark.parametrize("target", factories.FLOATS)
def test_cast_rounds_new_and_old_once(source: str, target: str, backend: str) -> None:
    if source == target:
        return
    kinds = DTYPES[source].torch, DTYPES[target].torch
    old, new = (factories.weights(source, (40,), seed) for seed in (1, 2))
    graft = Graft.from_entries({"w": Entries(torch.arange(40), new, old, (40,))})
    model = Holder(w=old.to(kinds[1]))
    base = contents(model)
    host = attach(model, backend=backend)
    with pytest.raises(
        BaseMismatchError, match=f"is {source} in the graft and {target} .*cast=True"
    ):
        host.load(graft)
    skill = host.load(graft, name="a", cast=True)
    assert skill.id == graft.id
    host.activate("a")
    assert torch.equal(model.w, new.to(kinds[1]))
    host.deactivate()
    assert holds(model, base)


def test_cast_counts_entries_that_vanish() -> None:
    graft = entries_of([1 + 2**-12, 1 + 2**-8 + 2**-30], [1.0, 0.5], torch.float32)
    model = Holder(w=torch.tensor([1.0, 0.5], dtype=torch.bfloat16))
    host = attach(model)
    with pytest.warns(CastWarning, match="1 of 2 entries equal the base once rounded") as caught:
        host.load(graft, name="a", cast=True)
    assert caught[0].filename == __file__
    host.activate("a")
    assert model.w.tolist() == [1.0, 1.0]


@BACKENDS
@pytest.mark.parametrize("target", ["BF16", "F16", "F32"])
def test_cast_of_doubles_is_what_torch_made_of_the_model(target: str, backend: str) -> None:
    """Which rounds by way of fp32: a tie there may be none in fp64."""
    kind = DTYPES[target].torch
    ties = [1 + 2**-8 + 2**-40, 1 + 2**-8 - 2**-40, 1 + 2**-11 + 2**-40, -1 - 2**-11 - 2**-40]
    old, new = (torch.tensor(sign * np.array(ties)) for sign in (1, -1))
    graft = Graft.from_entries({"w": Entries(torch.arange(4), new, old, (4,))})
    model = Holder(w=old.to(kind))
    assert target == "F32" or model.w[0] == 1.0 or model.w[2] == 1.0
    base = contents(model)
    host = attach(model, backend=backend)
    host.load(graft, name="a", cast=True)
    host.activate("a")
    assert torch.equal(model.w, new.to(kind))
    host.deactivate()
    assert holds(model, base)
    with pytest.raises(NonFiniteError, match="2 values overflow"):
        host.load(entries_of([1e300, 1e39, 1, 1], ties, torch.float64), cast=True)


def test_cast_checks_the_base_after_rounding_and_overflow() -> None:
    model = Holder(w=torch.tensor([1.0, 2.0], dtype=torch.float16))
    host = attach(model)
    with pytest.raises(BaseMismatchError, match="position 1: found bits 0x4000, wanted 0x4200"):
        host.load(entries_of([5.0, 5.0], [1.0, 3.0], torch.float32), cast=True)
    with pytest.raises(NonFiniteError, match="1 values overflow in the host's precision"):
        host.load(entries_of([5.0, 1e6], [1.0, 2.0], torch.float32), cast=True)
    host.load(entries_of([5.0, 1e6], [1.0, 2.0], torch.float32), name="a", cast=True,
              allow_nonfinite=True)  # fmt: skip
    host.activate("a")
    assert model.w.tolist() == [5.0, float("inf")]


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2", "I8", "I32", "BOOL", "U64"])
def test_only_floats_are_cast(dtype: str) -> None:
    host = attach(Holder(w=factories.tensor(dtype, (2,))))
    with pytest.raises(BaseMismatchError, match="only BF16, F16, F32 and F64 can be cast"):
        host.load(entries_of([5.0, 5.0], [1.0, 3.0], torch.float32), cast=True)
