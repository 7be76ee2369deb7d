"""localize: every bad input is named, and changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import searching
import torch
from hosts import State, contents
from hotgraft import localize
from hotgraft.errors import (
    BaseMismatchError,
    CoverageError,
    DataError,
    GraftError,
    NonFiniteError,
    ParameterError,
)
from hotgraft.search import METHODS, Learned
from safetensors.torch import save_file
from searching import QUICK, SEARCHES, Net, batches, loss, pair

pytestmark = pytest.mark.usefixtures("one_thread")

DATA = batches(4)
OTHER = Net()


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
    "seed negative": (
        set_("seed", -1),
        DataError,
        r"seed -1: wanted a whole number in 0 .. 2\*\*63 - 1",
    ),
    "seed true": (set_("seed", True), DataError, "seed True: wanted a whole number"),
    "seed large": (set_("seed", 2**63), DataError, f"seed {2**63}: wanted a whole number"),
    "seed fraction": (set_("seed", 1.5), DataError, "seed 1.5: wanted a whole number"),
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
        localize(source, tuned, loss, DATA, count=9, scope="all", method=QUICK[name])


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
    model, _, tuned, _ = pair()
    how: Any = {"count": 9, "scope": "all", "method": QUICK[name]}
    with pytest.raises(DataError, match=f"method '{name}' takes no checkpoint"):
        localize(model, tuned, loss, DATA, checkpoint=tmp_path / "search", **how)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "wrong", [{"steps": 0}, {"rate": float("nan")}, {"rate": -1.0}, {"prior": float("inf")}]
)
def test_hyper_parameters_of_learned(wrong: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=f"{next(iter(wrong))} .*: wanted"):
        Learned(**wrong)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("wrong", [None, 3, [], b"x"])
def test_what_is_no_model(name: str, wrong: Any) -> None:
    model, _, tuned, _ = pair()
    how: Any = {"count": 9, "scope": "all", "method": QUICK[name]}
    kind = type(wrong).__name__
    before = searching.snapshot(model)
    with pytest.raises(DataError, match=f"finetuned is a {kind}; wanted a model, a state dict"):
        localize(model, wrong, loss, DATA, **how)
    with pytest.raises(DataError, match=f"base is a {kind}; wanted a model, a state dict"):
        localize(wrong, tuned, loss, DATA, **how)
    assert searching.is_as_before(model, before)
