"""diff: from every kind of source, exact or the largest part, with its denominator."""

import json
import re
import struct
from pathlib import Path

import pytest
import torch
from factories import (
    FLOATS,
    SPECS,
    TinyModel,
    changed,
    finetuned,
    grafted,
    same_bits,
    state,
    tensor,
    weights,
)
from hotgraft import Graft, diff, fingerprint
from hotgraft.errors import (
    BackendError,
    BaseMismatchError,
    CoverageError,
    GraftError,
    NonFiniteError,
    ParameterError,
)
from hotgraft.format import DTYPES
from hotgraft.weights import INDEX
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

MODEL = "model.safetensors"


def numbered(n: int, dtype: torch.dtype = torch.float32) -> tuple[dict, dict]:
    """A base of zeros, and a model whose entry i differs by i + 1."""
    return {"w": torch.zeros(n, dtype=dtype)}, {"w": torch.arange(1, n + 1).to(dtype)}


def shard(folder: Path, weights_: dict[str, torch.Tensor], files: int = 2) -> Path:
    """A checkpoint folder of several files and an index."""
    folder.mkdir(exist_ok=True)
    names = [f"model-{i + 1:05}-of-{files:05}.safetensors" for i in range(files)]
    where = {name: names[i % files] for i, name in enumerate(weights_)}
    for file in names:
        save_file({n: t for n, t in weights_.items() if where[n] == file}, folder / file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return folder


# ---- what it finds ----------------------------------------------------------------------------


@given(st.integers(0, 99))
def test_the_exact_difference_leads_from_one_to_the_other(seed):
    base = state(seed, finite=False)
    tuned = finetuned(base, seed + 1, share=[0, 0.01, 0.5, 1][seed % 4], finite=False)
    graft = diff(base, tuned)
    assert same_bits(grafted(base, graft), tuned)
    assert same_bits(grafted(tuned, graft.invert()), base)
    assert all(
        (graft[n].new.view(torch.uint8) != graft[n].old.view(torch.uint8)).any()
        for n in graft.names
    )
    assert graft.provenance.method == "exact"
    assert diff(base, tuned, backend="reference") == graft


@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_every_dtype(dtype):
    base = {"w": tensor(dtype, (30, 7)), "v": tensor(dtype, (3,), 5)}
    tuned = {"w": changed(base["w"], 50), "v": base["v"]}
    exact = diff(base, tuned)
    assert (exact.names, exact.nnz) == (("w",), 50)
    assert same_bits(grafted(base, exact), tuned)
    for k in (1, 20, 50, 60):
        top = diff(base, tuned, count=k)
        assert top == diff(base, tuned, count=k, backend="reference")
        assert top.nnz == min(k, 50)
        assert not (top.mask - exact.mask).nnz
    assert top == exact


@given(st.sampled_from(FLOATS), st.integers(0, 99), st.integers(1, 126))
def test_top_k_agrees_with_the_reference(dtype, seed, count):
    base = {name: weights(dtype, (7, 6), seed + i) for i, name in enumerate("abc")}
    tuned = {name: changed(t, 30, seed) for name, t in base.items()}
    wanted = diff(base, tuned, count=count, backend="reference")
    assert diff(base, tuned, count=count) == wanted
    assert wanted.nnz == min(count, 90)


def test_ties_go_to_the_earlier_name_then_the_lower_position():
    base = {name: torch.zeros(4) for name in ("b", "a", "c")}
    tuned = {name: torch.ones(4) for name in ("c", "b", "a")}
    graft = diff(base, tuned, count=6)
    assert graft["a"].indices.tolist() == [0, 1, 2, 3]
    assert graft["b"].indices.tolist() == [0, 1]
    assert graft.names == ("a", "b")


def test_unaligned_files_are_read(tmp_path):
    """safetensors does not promise that a tensor in a file is aligned."""
    paths = []
    tuned = changed(weights("F32", (70,)), 9)
    for name, values in (("a", weights("F32", (70,))), ("b", tuned)):
        head = json.dumps({"w": {"dtype": "F32", "shape": [70], "data_offsets": [0, 280]}}).encode()
        head += b" " * ((-len(head) % 8) + 1)
        paths.append(tmp_path / f"{name}.safetensors")
        paths[-1].write_bytes(struct.pack("<Q", len(head)) + head + values.numpy().tobytes())
    assert diff(*paths).nnz == 9
    assert diff(*paths, count=4).nnz == 4


# ---- how much ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("density", "n", "wanted"),
    [
        (0.29, 100, 29),  # 0.29 * 100 is 28.999999999999996 in doubles
        (0.57, 100, 57),
        (1.1e-3, 1000, 1),
        (0.1, 19, 1),
        (1 / 3, 3, 0),  # the double nearest to a third is below it
        (0.3333333333333334, 3, 1),
        (1, 7, 7),
        (1.0, 7, 7),
        (1e-4, 10_000, 1),
        (0.999, 1000, 999),
    ],
)
def test_a_density_asks_for_its_floor(density, n, wanted):
    base, tuned = numbered(n)
    if not wanted:
        with pytest.raises(GraftError, match="rounds to 0 entries"):
            diff(base, tuned, density=density)
        return
    graft = diff(base, tuned, density=density)
    assert graft["w"].indices.tolist() == list(range(n - wanted, n))
    assert (graft.nnz, graft.provenance.eligible) == (wanted, n)
    assert graft.provenance.method == "magnitude"


def test_fewer_differ_than_were_asked_for():
    base = {"w": torch.zeros(10)}
    tuned = {"w": torch.zeros(10).index_fill(0, torch.tensor([3, 7]), 1.0)}
    assert diff(base, tuned, count=5) == diff(base, tuned, density=0.9) == diff(base, tuned)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"density": 0.0}, "density 0.0 is not in (0, 1]"),
        ({"density": -0.1}, "density -0.1 is not in (0, 1]"),
        ({"density": 1.0001}, "density 1.0001 is not in (0, 1]"),
        ({"density": float("nan")}, "density nan is not in (0, 1]"),
        ({"density": float("inf")}, "density inf is not in (0, 1]"),
        (
            {"density": 0.09},
            "density 0.09 of the 10 eligible elements (scope 'all') rounds to 0 entries; the "
            "smallest that keeps one is 0.1",
        ),
        ({"count": 0}, "count 0 is not in [1, 10], the eligible elements"),
        ({"count": 11}, "count 11 is not in [1, 10], the eligible elements"),
        ({"count": -1}, "count -1 is not in [1, 10]"),
        ({"density": "0.5"}, "density '0.5' is not a number"),
        ({"count": 1, "density": 0.5}, "give density or count, not both"),
    ],
)
def test_amounts_that_cannot_be(arguments, message):
    with pytest.raises(GraftError, match=re.escape(message)):
        diff(*numbered(10), **arguments)


def test_a_count_is_a_whole_number():
    with pytest.raises(TypeError):
        diff(*numbered(10), count=2.5)


def test_nothing_differs():
    base, _ = numbered(10)
    for arguments in ({}, {"density": 0.5}, {"count": 3}):
        with pytest.raises(GraftError, match="bit for bit equal in scope 'all': nothing to graft"):
            diff(base, base, **arguments)


def test_nan_cannot_be_ranked_but_can_be_copied():
    base, tuned = numbered(100)
    tuned["w"][42] = float("nan")
    with pytest.raises(
        NonFiniteError, match=r"'w', position 42: the difference is NaN.*take the exact difference"
    ):
        diff(base, tuned, count=3)
    assert same_bits(grafted(base, diff(base, tuned)), tuned)


# ---- scopes -----------------------------------------------------------------------------------

ENCODER = sorted(name for name in SPECS if name.startswith("layers."))


@pytest.mark.parametrize(
    ("scope", "label", "names"),
    [
        ("all", "all", sorted(SPECS)),
        ("encoder", "encoder", ENCODER),
        ("linear", "linear", [n for n in ENCODER if "attention" in n]),
        (lambda _, shape: len(shape) == 1, "<lambda>", [n for n in ENCODER if "norm" in n]),
    ],
)
def test_a_scope_and_its_denominator(scope, label, names):
    base = state()
    graft = diff(base, finetuned(base), scope=scope)
    eligible = sum(base[name].numel() for name in names)
    assert list(graft.names) == names
    assert (graft.provenance.scope, graft.provenance.eligible) == (label, eligible)
    assert graft.density == graft.nnz / eligible
    assert diff(base, finetuned(base), scope=scope, density=0.1).nnz == eligible // 10


def test_scopes_that_hold_nothing():
    base = {"head.weight": torch.zeros(2, 2)}
    with pytest.raises(CoverageError, match=r"scope 'encoder' holds none of the 1 tensors \('head"):
        diff(base, base, scope="encoder")
    with pytest.raises(CoverageError, match="unknown scope 'decoder'; known are all, encoder, lin"):
        diff(base, base, scope="decoder")


def test_what_is_out_of_scope_may_differ():
    base, tuned = state(), finetuned(state())
    tuned["extra"] = torch.zeros(3)
    tuned["embed.weight"] = torch.zeros(99)
    del tuned["step"]
    assert diff(base, tuned, scope="encoder").names == tuple(ENCODER)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"step": None}, CoverageError, "the fine-tuned model lacks 'step', which the base has in"),
        ({"extra": torch.zeros(3)}, CoverageError, "has 'extra', which the base lacks; scope='enc"),
        (
            {"embed.weight": torch.zeros(8, 13).bfloat16()},
            BaseMismatchError,
            "'embed.weight' is BF16 [13, 8] in the base and BF16 [8, 13] in the fine-tuned model",
        ),
        (
            {"step": torch.tensor(1, dtype=torch.int32)},
            BaseMismatchError,
            "'step' is I64 [] in the base and I32 [] in the fine-tuned model; convert one of them",
        ),
        ({"step": torch.tensor(1j)}, GraftError, "'step' has dtype torch.complex64; a graft holds"),
        (
            {"step": torch.zeros((), device="meta")},
            ParameterError,
            "'step' is on the meta device: load its weights first",
        ),
        ({"step": 7}, ParameterError, "'step' is a int, not a dense tensor: pass a mapping of"),
        ({"step": {}}, ParameterError, "'step' is a dict, not a dense tensor"),
        (
            {"step": torch.zeros(3, 3).to_sparse()},
            ParameterError,
            "'step' is a torch.sparse_coo, not a dense tensor",
        ),
    ],
)
def test_models_that_do_not_match(change, error, message):
    base = state()
    tuned = finetuned(base) | change
    tuned = {name: t for name, t in tuned.items() if t is not None}
    with pytest.raises(error, match=re.escape(message)):
        diff(base, tuned)


class Wrapped(torch.Tensor):
    """As torchao's: a tensor that holds its values in others."""

    @staticmethod
    def __new__(cls, held):
        return torch.Tensor._make_wrapper_subclass(cls, held.shape, dtype=held.dtype)

    def __init__(self, held):
        self.held = held

    def __tensor_flatten__(self):
        return ["held"], None

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise AssertionError("nobody should read it")


def test_tensors_without_values_of_their_own():
    for odd, message in (
        (Wrapped(torch.zeros(4)), "'w' is a Wrapped, which stores other bits than its values"),
        (torch.nn.UninitializedParameter(), "'w' is not initialised yet: run the model once first"),
    ):
        with pytest.raises(ParameterError, match=message):
            diff({"w": odd}, {"w": torch.ones(4)})
        with pytest.raises(ParameterError, match=message):
            fingerprint({"w": odd})


def test_many_names_are_not_all_listed():
    base = {f"w{i}": torch.zeros(1) for i in range(9)}
    with pytest.raises(CoverageError, match="lacks 'w1', 'w2', 'w3' and 5 more, which the base"):
        diff(base, {"w0": torch.ones(1)})


def test_a_backend_is_never_replaced():
    with pytest.raises(BackendError, match="unknown backend 'gpu'; known are cpu, reference"):
        diff(*numbered(3), backend="gpu")


# ---- sources ----------------------------------------------------------------------------------


def test_all_sources_agree(tmp_path):
    """Modules, state dicts, files, folders and sharded folders give the same graft."""
    torch.manual_seed(0)
    base, tuned = TinyModel(seed=1), TinyModel(seed=2)
    states = [
        {n: t for n, t in model.state_dict().items() if n != "head.weight"}
        for model in (base, tuned)
    ]
    wanted = diff(base, tuned)
    for i, weights_ in enumerate(states):
        (tmp_path / f"folder{i}").mkdir()
        save_file(weights_, tmp_path / f"folder{i}" / MODEL)
        save_file(weights_, tmp_path / f"file{i}.safetensors")
        shard(tmp_path / f"shards{i}", weights_, 3)
    left = [base, states[0], *(tmp_path / n for n in ("folder0", "file0.safetensors", "shards0"))]
    right = [tuned, states[1], *(tmp_path / n for n in ("folder1", "file1.safetensors", "shards1"))]
    for one in left:
        for other in right:
            assert diff(one, other) == wanted
    assert diff(str(left[2]), str(right[4]), count=20) == diff(base, tuned, count=20)
    assert len({fingerprint(source) for source in left}) == 1
    assert fingerprint(left[0]) != fingerprint(right[0])


def test_tied_tensors_count_once():
    base, tuned = TinyModel(seed=1), TinyModel(seed=2)
    graft = diff(base, tuned)
    assert "embed.weight" in graft.names
    assert "head.weight" not in graft.names
    assert graft.provenance.eligible == sum(p.numel() for p in base.parameters())


def test_tied_tensors_against_copies_of_them():
    base = TinyModel(seed=1)
    copies = {name: t.detach().clone() for name, t in TinyModel(seed=2).state_dict().items()}
    wanted = diff(base, TinyModel(seed=2))
    assert diff(base, copies) == wanted
    clones = {name: t.detach().clone() for name, t in base.state_dict().items()}
    both = diff(clones, TinyModel(seed=2))
    assert {*wanted.names, "head.weight"} == {*both.names}
    assert both.rebase(base) == both
    assert Graft.from_mask(base, copies, both.mask) == both
    copies["head.weight"][0] += 1
    message = "'embed.weight' and 'head.weight' are tied in the base, but different in the fine-"
    with pytest.raises(BaseMismatchError, match=re.escape(message)):
        diff(base, copies)
    with pytest.raises(BaseMismatchError, match=re.escape(message)):
        diff(base, copies, scope=lambda name, _shape: name == "embed.weight")
    assert diff(base, copies, scope="encoder") == diff(base, TinyModel(seed=2), scope="encoder")
    copies["head.weight"] = torch.zeros(3)
    with pytest.raises(BaseMismatchError, match=r"'head.weight' is F32 \[13, 8\] in the base"):
        diff(base, copies)


def test_transposed_ties_count_once():
    memory, tuned = torch.zeros(3, 4), torch.arange(12.0).reshape(3, 4) + 1
    base = {"enc": memory, "dec": memory.t(), "flat": memory.view(-1), "part": memory[1:]}
    for fresh in (
        {"enc": tuned, "dec": tuned.t(), "flat": tuned.view(-1), "part": tuned[1:]},
        {"enc": tuned, "dec": tuned.t().clone(), "flat": tuned.view(-1).clone(), "part": tuned[1:]},
    ):
        graft = diff(base, fresh, scope=lambda name, _shape: name != "part")
        assert (graft.names, graft.provenance.eligible) == (("enc",), 12)
    assert fingerprint({"enc": memory, "dec": memory.t()}) == fingerprint({"enc": memory})
    with pytest.raises(BaseMismatchError, match="'enc' and 'dec' are tied in the base, but diff"):
        diff(base, {**fresh, "dec": tuned.reshape(4, 3)})


def test_lazily_negated_tensors_are_read_as_they_are():
    plain = torch.tensor([1.0, -2.0])
    negated = torch._neg_view(plain)
    base = {"w": torch.zeros(2), "v": plain}
    graft = diff(base, {"w": negated, "v": plain})
    assert graft["w"].new.tolist() == [-1.0, 2.0]
    assert fingerprint({"w": plain, "v": negated}) == fingerprint({"w": plain, "v": -plain})


def test_strided_and_empty_tensors():
    wide = torch.arange(12.0).reshape(3, 4)
    base = {"t": wide.t(), "s": wide[:, ::2], "none": torch.zeros(0, 3)}
    tuned = {"t": wide.t() + 1, "s": wide[:, ::2].clone(), "none": torch.zeros(0, 3)}
    graft = diff(base, tuned)
    assert (graft.names, graft["t"].shape, graft.provenance.eligible) == (("t",), (4, 3), 18)
    assert graft["t"].old.tolist() == wide.t().reshape(-1).tolist()


def test_provenance_and_progress():
    base = state()
    done = []
    graft = diff(base, finetuned(base), base_id="b", progress=lambda *at: done.append(at))
    assert isinstance(graft, Graft)
    assert graft.provenance.base_id == "b"
    assert done[-1] == (graft.provenance.eligible,) * 2
    assert done == sorted(done)


@pytest.mark.parametrize("amount", [{"density": 0.1}, {"count": 3}])
def test_the_choice_of_the_largest_is_reported_too(amount):
    base, done = state(), []
    graft = diff(base, finetuned(base), progress=lambda *at: done.append(at), **amount)
    eligible = graft.provenance.eligible
    assert done == sorted(done)
    assert len(done) == 2 * len(base)
    assert (eligible, 2 * eligible) in done
    assert done[-1] == (2 * eligible, 2 * eligible)
