"""evaluate against a plain one, against torchmetrics, and its intervals against the truth."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import fields

import numpy as np
import pytest
import torch
from hotgraft import Estimate, Evaluation, evaluate
from hotgraft.errors import EvaluationError, HotgraftError, NonFiniteError
from hotgraft.evaluation import Scores
from hypothesis import given
from hypothesis import strategies as st
from torchmetrics.functional import classification as judge

pytestmark = pytest.mark.usefixtures("one_thread")

SCORES = [field.name for field in fields(Scores)]
EVERYWHERE = (-math.inf, math.inf)

Table = list[list[float]]


# ---- the plain one: a text at a time, in Python's own numbers ---------------------------------


def softmax(logits: list[float]) -> list[float]:
    parts = [math.exp(x - max(logits)) for x in logits]
    return [part / sum(parts) for part in parts]


def answer(logits: list[float]) -> int:
    return logits.index(max(logits))


def plain_ece(table: Table, labels: list[int], bins: int) -> float:
    # The edges are numbers too, and a third may lie on either side of five fifteenths.
    edges = torch.linspace(0, 1, bins + 1, dtype=torch.float64).tolist()
    total = 0.0
    for m in range(bins):
        inside = [
            (max(softmax(row)), answer(row) == label)
            for row, label in zip(table, labels, strict=True)
            if edges[m] <= max(softmax(row)) < edges[m + 1]
            or (m == bins - 1 and max(softmax(row)) == 1)
        ]
        if inside:
            sure = sum(confidence for confidence, _ in inside) / len(inside)
            right = sum(hit for _, hit in inside) / len(inside)
            total += len(inside) / len(labels) * abs(right - sure)
    return total


def plain_f1(table: Table, labels: list[int]) -> float:
    answers = [answer(row) for row in table]
    found = []
    for c in {*answers, *labels}:
        hits = sum(a == c == label for a, label in zip(answers, labels, strict=True))
        precision = hits / answers.count(c) if c in answers else 0.0
        recall = hits / labels.count(c) if c in labels else 0.0
        found.append(2 * precision * recall / (precision + recall) if hits else 0.0)
    return sum(found) / len(found)


def plain(table: Table, labels: list[int]) -> dict[str, float]:
    n, pairs = len(labels), list(zip(table, labels, strict=True))
    distance = [
        sum((p - (c == label)) ** 2 for c, p in enumerate(softmax(row))) for row, label in pairs
    ]
    return {
        "accuracy": sum(answer(row) == label for row, label in pairs) / n,
        "f1": plain_f1(table, labels),
        "nll": sum(-math.log(softmax(row)[label]) for row, label in pairs) / n,
        "brier": sum(distance) / n,
        "ece10": plain_ece(table, labels, 10),
        "ece15": plain_ece(table, labels, 15),
    }


def plain_all(own: Table, base: Table, finetuned: Table, labels: list[int]) -> dict[str, float]:
    """What an evaluation holds, by its path in it; an undefined rel is missing."""
    found, before, after = (plain(table, labels) for table in (own, base, finetuned))
    every = dict(found)
    every |= {f"change.{name}": found[name] - after[name] for name in SCORES}
    same = [answer(a) == answer(b) for a, b in zip(own, finetuned, strict=True)]
    every["agreement"] = sum(same) / len(same)
    every["way"] = after["accuracy"] - before["accuracy"]
    if every["way"]:
        every["rel"] = (found["accuracy"] - before["accuracy"]) / every["way"]
    return every


def flat(found: Evaluation) -> dict[str, Estimate]:
    every = {name: getattr(found, name) for name in SCORES}
    if found.change is not None:
        every |= {f"change.{name}": getattr(found.change, name) for name in SCORES}
    every |= {"rel": found.rel, "agreement": found.agreement}
    return {name: one for name, one in every.items() if one is not None}


def ends(drawn: list[float], value: float, name: str, tail: float) -> tuple[float, float]:
    """An interval by its definition: from the last value in the lower tail to the upper's first."""
    drawn = sorted(drawn)
    low = drawn[math.floor(tail * (len(drawn) - 1))]
    high = drawn[math.ceil((1 - tail) * (len(drawn) - 1))]
    if "ece" in name:
        low, high = min(low, 2 * value - high), max(high, 2 * value - low)
        if "change" not in name:
            low, high = max(low, 0), min(high, 1)
    return low, high


def close(a: float, b: float) -> bool:
    # torchmetrics counts F1 in float.
    return a == b or (math.isnan(a) and math.isnan(b)) or math.isclose(a, b, abs_tol=2e-6)


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Three models' logits with ties, some texts told surely, and labels; often few of each."""
    n, classes = draw(st.integers(1, 14)), draw(st.integers(2, 5))
    rng = np.random.default_rng(draw(st.integers(0, 999)))
    dtype = draw(st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]))
    scale = draw(st.sampled_from([0.0, 0.25, 2.0, 40.0]))
    made = [torch.from_numpy(rng.integers(-3, 4, (n, classes)) * scale).to(dtype) for _ in range(3)]
    return made, torch.from_numpy(rng.integers(0, draw(st.integers(1, classes)), n))


@given(problems(), st.sampled_from([0.5, 0.9, 0.95]), st.integers(1, 25))
def test_it_agrees_with_the_plain_one(problem, confidence, resamples):
    (own, base, finetuned), labels = problem
    tables = [x.double().tolist() for x in (own, base, finetuned)]
    found = flat(
        evaluate(
            own,
            labels,
            base=base,
            finetuned=finetuned,
            resamples=resamples,
            confidence=confidence,
            seed=7,
        )
    )
    n, rng = len(labels), np.random.default_rng(7)
    draws = [rng.integers(n, size=n).tolist() for _ in range(resamples)]
    wanted = plain_all(*tables, labels.tolist())
    drawn = [
        plain_all(*([t[i] for i in draw] for t in tables), labels[draw].tolist()) for draw in draws
    ]
    tail = (1 - confidence) / 2
    for name, (value, low, high) in found.items():
        assert close(value, wanted.get(name, math.nan)), name
        if name != "rel":
            expected = ends([each[name] for each in drawn], wanted[name], name, tail)
        else:
            rels = [each["rel"] for each in drawn if each["way"] * wanted["way"] > 0]
            lost = [math.inf] * (resamples - len(rels))
            expected = (
                ends([-x for x in lost] + rels, value, name, tail)[0],
                ends(rels + lost, value, name, tail)[1],
            )
        assert close(low, expected[0]), name
        assert close(high, expected[1]), name


# ---- torchmetrics -----------------------------------------------------------------------------


def simulated(
    n: int, seed: int = 0, sharpness: float = 1.6, classes: int = 15
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """A fine-tuned model that is too sure, a graft that is nearly as good, a base; labels."""
    rng = torch.Generator().manual_seed(seed)
    truth = 2 * torch.randn(n, classes, generator=rng)
    labels = torch.multinomial(truth.softmax(1), 1, generator=rng)[:, 0]

    def model(noise: float, sharpness: float) -> torch.Tensor:
        return sharpness * (truth + noise * torch.randn(n, classes, generator=rng))

    made = {"base": model(2.5, 0.5), "finetuned": model(0.3, sharpness), "logits": model(0.5, 1.2)}
    return made, labels


def test_values_are_those_of_torchmetrics():
    models, labels = simulated(700)
    logits = models["logits"]
    found = evaluate(logits, labels, resamples=1)
    likely = logits.softmax(1)
    wanted = {
        "accuracy": judge.multiclass_accuracy(logits, labels, 15, average="micro"),
        "f1": judge.multiclass_f1_score(logits, labels, 15, average="macro"),
        "ece10": judge.multiclass_calibration_error(likely, labels, 15, n_bins=10),
        "ece15": judge.multiclass_calibration_error(likely, labels, 15, n_bins=15),
        "nll": torch.nn.functional.cross_entropy(logits, labels),
    }
    for name, value in wanted.items():
        assert getattr(found, name).value == pytest.approx(value.item(), abs=1e-6), name


def test_intervals_are_of_the_values_own_statistic():
    """What a resample is given from sums is what its texts would be given from torchmetrics."""
    models, labels = simulated(400, seed=1)
    rng, values = np.random.default_rng(3), {}
    for _ in range(30):
        at = torch.from_numpy(rng.integers(400, size=400))
        again = evaluate(**{k: x[at] for k, x in models.items()}, labels=labels[at], resamples=1)
        for name, one in flat(again).items():
            values.setdefault(name, []).append(one.value)
    found = flat(evaluate(**models, labels=labels, resamples=30, confidence=0.8, seed=3))
    assert found.keys() == values.keys()
    for name, one in found.items():
        assert one[1:] == pytest.approx(ends(values[name], one.value, name, 0.1), abs=1e-6), name


def test_the_surest_answers_share_a_bin_with_the_nearly_sure():
    nearly = math.log(0.95 / 0.05)
    logits = torch.tensor([[1000.0, 0.0], [nearly, 0.0]], dtype=torch.float64)
    found = evaluate(logits, torch.tensor([1, 0]))
    assert found.ece10.value == pytest.approx((1.0 + 0.95) / 2 - 0.5)
    assert found.ece15.value == pytest.approx((1.0 + 0.95) / 2 - 0.5)


def test_without_torchmetrics_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchmetrics.functional.classification", None)
    with pytest.raises(HotgraftError, match=r'pip install "hotgraft\[evaluation\]"'):
        evaluate(torch.zeros(2, 2), torch.zeros(2, dtype=torch.int64))


def test_importing_hotgraft_leaves_torchmetrics_alone():
    code = "import sys, hotgraft; hotgraft.evaluate; sys.exit('torchmetrics' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# ---- the intervals ----------------------------------------------------------------------------


def test_intervals_hold_the_truth_as_often_as_they_say():
    """100 samples of a large population: what is known of all of it is the truth."""
    models, labels = simulated(40_000, seed=2, classes=4)
    truth = flat(evaluate(**models, labels=labels, resamples=1))
    rng = np.random.default_rng(0)
    found: dict[str, list[Estimate]] = {name: [] for name in truth}
    for trial in range(100):
        at = torch.from_numpy(rng.integers(len(labels), size=400))
        sample = {name: x[at] for name, x in models.items()}
        for name, one in flat(
            evaluate(**sample, labels=labels[at], resamples=200, seed=trial)
        ).items():
            found[name].append(one)
    for name, every in found.items():
        held = sum(low <= truth[name].value <= high for _, low, high in every)
        assert held >= 89, name
        # And they are no wider than values are spread, joined ones aside.
        values, lows, highs = np.array(every).T
        width = (highs - lows).mean() / (2 * 1.96 * values.std())
        assert 0.85 < width < (1.6 if "ece" in name else 1.35), name


def test_an_interval_narrows_with_more_texts_and_less_confidence():
    models, labels = simulated(1600)

    def width(texts: int, confidence: float) -> float:
        found = evaluate(models["logits"][:texts], labels[:texts], confidence=confidence)
        return found.accuracy.high - found.accuracy.low

    assert width(1600, 0.95) == pytest.approx(width(100, 0.95) / 4, rel=0.3)
    assert width(1600, 0.5) == pytest.approx(width(1600, 0.95) * 0.674 / 1.96, rel=0.2)


def test_comparisons_are_paired():
    """Two models that err on the same texts differ less than either is uncertain."""
    models, labels = simulated(1000)
    near = models["finetuned"] * 1.01
    found = evaluate(near, labels, finetuned=models["finetuned"])
    assert found.change.accuracy == Estimate(0, 0, 0)
    assert found.change.nll.high - found.change.nll.low < (found.nll.high - found.nll.low) / 10
    assert found.change.nll.low > 0


def test_a_calibration_errors_interval_holds_its_value():
    """Resamples alone would not: theirs is larger, the more so the better the model."""
    models, labels = simulated(300, sharpness=1.0)
    logits = models["finetuned"]
    found = evaluate(logits, labels, confidence=0.5)
    for one in (found.ece10, found.ece15):
        assert 0 <= one.low <= one.value <= one.high
    assert found.ece15.value - found.ece15.low > 0.6 * (found.ece15.high - found.ece15.value)


def test_a_calibration_error_is_at_most_one():
    found = evaluate(1000 * told([True] + [False] * 9), torch.zeros(10, dtype=torch.int64))
    assert found.ece10.value == pytest.approx(0.9)
    assert found.ece10.low < 0.8  # which is reflected beyond 1
    assert found.ece10.high == 1


def test_a_seed_gives_the_same_interval_whatever_else_is_random():
    models, labels = simulated(300)
    found = evaluate(**models, labels=labels, resamples=100)
    torch.manual_seed(5)
    np.random.default_rng(5)
    assert evaluate(**models, labels=labels, resamples=100, seed=0) == found
    assert evaluate(**models, labels=labels, resamples=100, seed=1) != found
    alone = evaluate(models["logits"], labels, resamples=100)
    assert alone.accuracy == found.accuracy
    assert alone.ece10 == found.ece10


# ---- rel, agreement, change -------------------------------------------------------------------


def test_the_ends_of_the_way_are_nought_and_one():
    models, labels = simulated(1000)
    base, finetuned = models["base"], models["finetuned"]
    top = evaluate(finetuned, labels, base=base, finetuned=finetuned)
    assert top.rel == top.agreement == Estimate(1, 1, 1)
    assert all(getattr(top.change, name) == Estimate(0, 0, 0) for name in SCORES)
    bottom = evaluate(base, labels, base=base, finetuned=finetuned)
    assert bottom.rel == Estimate(0, 0, 0)
    assert bottom.change.accuracy.high < 0


def test_what_was_not_asked_for_is_none():
    models, labels = simulated(50)
    logits, base, finetuned = models["logits"], models["base"], models["finetuned"]
    alone = evaluate(logits, labels)
    assert (alone.rel, alone.agreement, alone.change) == (None, None, None)
    with_base = evaluate(logits, labels, base=base)
    assert (with_base.rel, with_base.agreement, with_base.change) == (None, None, None)
    with_finetuned = evaluate(logits, labels, finetuned=finetuned)
    assert with_finetuned.rel is None
    assert with_finetuned.agreement is not None
    assert with_finetuned.change is not None


def told(right: list[bool]) -> torch.Tensor:
    """Logits of two classes whose answers to label 0 are as said."""
    return torch.tensor([[1.0, 0.0] if hit else [0.0, 1.0] for hit in right])


@pytest.mark.parametrize(
    ("gained", "lost", "confidence", "value", "bounded"),
    [
        (0, 0, 0.95, math.nan, False),  # equal everywhere
        (2, 2, 0.95, math.nan, False),  # equally many
        (3, 0, 0.95, 1.0, False),  # a resample in twenty misses all three
        (6, 0, 0.95, 1.0, True),  # one in 400
        (9, 6, 0.95, 2.0, False),  # they change places too often
        (9, 6, 0.2, 2.0, True),  # but not in the middle
        (0, 6, 0.95, 0.0, True),  # fine-tuning did harm, that much is sure
    ],
)
def test_rel_is_known_as_far_as_the_way_is(gained, lost, confidence, value, bounded):
    rest = [text % 2 == 0 for text in range(40 - gained - lost)]
    base = told([False] * gained + [True] * lost + rest)
    finetuned = told([True] * gained + [False] * lost + rest)
    own = told([True] * (gained + lost) + rest)
    labels = torch.zeros(40, dtype=torch.int64)
    rel = evaluate(own, labels, base=base, finetuned=finetuned, confidence=confidence).rel
    if math.isnan(value):
        assert math.isnan(rel.value)
    else:
        assert rel.value == pytest.approx(gained / (gained - lost))
    if bounded:
        assert rel.low <= rel.value <= rel.high
        assert all(math.isfinite(end) for end in rel)
    else:
        assert (rel.low, rel.high) == EVERYWHERE


# ---- what comes in ----------------------------------------------------------------------------


def test_one_text_is_enough():
    found = evaluate(torch.tensor([[0.0, 2.0]]), torch.tensor([1]))
    sure = 1 / (1 + math.exp(-2))
    assert found.accuracy == found.f1 == Estimate(1, 1, 1)
    assert found.nll == pytest.approx([-math.log(sure)] * 3)
    assert found.brier == pytest.approx([2 * (1 - sure) ** 2] * 3)
    assert found.ece10 == pytest.approx([1 - sure] * 3)


def test_a_perfect_model_is_perfect():
    labels = torch.arange(6) % 3
    found = evaluate(1000 * torch.nn.functional.one_hot(labels, 3).float(), labels)
    for name in SCORES:
        perfect = 1 if name in {"accuracy", "f1"} else 0
        assert getattr(found, name) == pytest.approx([perfect] * 3, abs=1e-15), name


def test_a_tie_goes_to_the_first_class():
    logits = torch.tensor([[1.0, 1.0, 0.0], [0.0, 1.0, 1.0]])
    assert evaluate(logits, torch.tensor([0, 1])).accuracy.value == 1
    assert evaluate(logits, torch.tensor([1, 2])).accuracy.value == 0


def test_classes_that_nobody_names_do_not_count():
    """Six classes, three of them met: one right, one a wrong answer, one a missed label."""
    logits = torch.eye(6)[[0, 0, 4]]
    assert evaluate(logits, torch.tensor([0, 0, 5])).f1.value == pytest.approx(1 / 3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_precision_is_lost_before_and_not_here(dtype):
    models, labels = simulated(200)
    logits = models["logits"].to(dtype)
    assert evaluate(logits, labels, resamples=20) == evaluate(logits.double(), labels, resamples=20)


def test_it_matters_not_how_a_tensor_lies():
    models, labels = simulated(200)
    kept = {name: x.clone() for name, x in models.items()}
    wanted = evaluate(**models, labels=labels, resamples=20)
    turned = {name: x.T.contiguous().T.requires_grad_() for name, x in models.items()}
    assert evaluate(**turned, labels=labels.int(), resamples=20) == wanted
    with torch.inference_mode():
        inferred = {name: x.clone() for name, x in models.items()}
        assert evaluate(**inferred, labels=labels.clone(), resamples=20) == wanted
    assert evaluate(**inferred, labels=labels.clone(), resamples=20) == wanted
    doubles = {name: x.double() for name, x in models.items()}
    before = {name: x.clone() for name, x in doubles.items()}
    assert evaluate(**doubles, labels=labels, resamples=20) == wanted
    for name in models:
        assert torch.equal(models[name], kept[name])
        assert torch.equal(doubles[name], before[name])


GOOD, LABELS = torch.zeros(4, 3), torch.tensor([0, 1, 2, 0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": [[0.0, 1.0]]}, r"logits is list; give a tensor of floats"),
        ({"logits": torch.zeros(4, 3, dtype=torch.int64)}, r"logits is torch.int64; give"),
        ({"logits": torch.zeros(4)}, r"logits has shape \[4\]; \[texts, classes\]"),
        ({"logits": torch.zeros(4, 3, 1)}, r"logits has shape \[4, 3, 1\]"),
        ({"logits": torch.zeros(0, 3)}, r"logits has shape \[0, 3\]; .* a text or more"),
        ({"logits": torch.zeros(4, 1)}, r"logits has shape \[4, 1\]; .* two classes or more"),
        ({"logits": None}, r"logits is NoneType"),
        ({"base": torch.zeros(4, 2)}, r"base has shape \[4, 2\] .* own logits \[4, 3\]"),
        ({"finetuned": torch.zeros(5, 3)}, r"finetuned has shape \[5, 3\] .* the same texts"),
        ({"finetuned": torch.zeros(4, 3).int()}, r"finetuned is torch.int32"),
        ({"labels": [0, 1, 2, 0]}, r"labels is list; give an int64 tensor \[texts\]"),
        ({"labels": torch.zeros(4)}, r"labels is torch.float32; give an int64"),
        ({"labels": torch.zeros(4, dtype=torch.bool)}, r"labels is torch.bool; give an int64"),
        ({"labels": torch.tensor([0, 1])}, r"labels has shape \[2\]; \[4\] is wanted"),
        ({"labels": torch.tensor([[0, 1, 2, 0]])}, r"labels has shape \[1, 4\]"),
        ({"labels": torch.tensor([0, 1, 3, 0])}, r"label 3 of text 2 is not in \[0, 3\)"),
        ({"labels": torch.tensor([0, -100, 1, 0])}, r"label -100 of text 1 .* leave out texts"),
        ({"resamples": 0}, r"resamples 0 is not a whole number from 1 on"),
        ({"logits": GOOD.to("meta")}, r"logits is on the device meta, where it has no values"),
        ({"base": GOOD.to_sparse()}, r"base is sparse_coo; give a dense tensor"),
        ({"labels": LABELS.to("meta")}, r"labels is on the device meta"),
        ({"labels": LABELS.to_sparse()}, r"labels is sparse_coo; give"),
        ({"resamples": True}, r"resamples True is not a whole number from 1 on"),
        ({"resamples": np.True_}, r"resamples .*True.* is not a whole number"),
        ({"resamples": 1e3}, r"resamples 1000.0 is not a whole number"),
        ({"seed": -1}, r"seed -1 is not a whole number from 0 on"),
        ({"seed": None}, r"seed None is not a whole number"),
        ({"confidence": 0}, r"confidence 0 is not a number in \(0, 1\)"),
        ({"confidence": 1.0}, r"confidence 1.0 is not a number in \(0, 1\)"),
        ({"confidence": math.nan}, r"confidence nan is not a number in \(0, 1\)"),
        ({"confidence": "0.95"}, r"confidence '0.95' is not a number in \(0, 1\)"),
    ],
)
def test_bad_input_is_named(change, message):
    with pytest.raises(EvaluationError, match=message):
        evaluate(**({"logits": GOOD, "labels": LABELS} | change))


@pytest.mark.parametrize("name", ["logits", "base", "finetuned"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e301])
def test_logits_are_finite(name, bad):
    models = {key: GOOD.double().clone() for key in ("logits", "base", "finetuned")}
    models[name][2, 1] = bad
    where = rf"{name}: the logit of text 2 at class 1 is {bad}, and 1 of 12 .* mask with a large"
    with pytest.raises(NonFiniteError, match=where.replace("+", r"\+")):
        evaluate(**models, labels=LABELS)


def test_the_largest_logits_still_count():
    logits = torch.tensor([[1e300, -1e300], [-1e300, 1e300]], dtype=torch.float64)
    found = evaluate(logits, torch.tensor([0, 0]))
    assert found.nll.value == pytest.approx(1e300)
    assert found.brier.value == 1
    assert found.ece10.value == pytest.approx(0.5)
