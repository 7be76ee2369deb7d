"""The loop: what it trains, how it reads data, and what its accidents leave behind."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import factories
import pytest
import torch
from hosts import contents, holds
from hotgraft import Mask, diff, train
from hotgraft.errors import CoverageError, DataError, HotgraftError, NonFiniteError
from torch import nn
from torch.utils.data import DataLoader

pytestmark = pytest.mark.usefixtures("one_thread")

TOKENS = torch.arange(24).view(4, 6) % 13
BATCHES = [TOKENS[:2], TOKENS[2:]]


def loss(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Say the next token."""
    logits = model(tokens[:, :-1])
    return nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def flags(model: nn.Module) -> dict[str, bool]:
    return {name: p.requires_grad for name, p in model.named_parameters()}


class NoisyModel(factories.TinyModel):
    """With dropout."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return super().forward(tokens) * nn.functional.dropout(
            torch.ones(13), 0.5, training=self.training
        )


# ---- what it does -------------------------------------------------------------------------------


def test_it_is_the_loop_that_one_would_write() -> None:
    model, other = factories.TinyModel(), factories.TinyModel()
    losses = train.finetune(model, loss, BATCHES, train.sgd(model, lr=0.1), steps=5)
    trained = [p for name, p in other.named_parameters() if name.startswith("layers.")]
    optimizer = torch.optim.SGD(trained, lr=0.1, momentum=0.9)
    wanted = []
    for step in range(5):
        value = loss(other, BATCHES[step % 2])
        wanted.append(value.item())
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
    assert losses == wanted
    assert holds(model, contents(other))


def test_it_learns_and_touches_the_scope_only() -> None:
    model = factories.TinyModel()
    before = contents(model)
    losses = train.finetune(model, loss, BATCHES, train.sgd(model, lr=0.2), steps=60)
    assert losses[-1] < losses[0] - 0.5
    assert diff(before, model, scope="encoder").nnz > 0
    assert torch.equal(model.embed.weight, before["embed.weight"])


def test_flags_and_gradients_are_as_before() -> None:
    model = factories.TinyModel()
    model.layers[0][1].bias.requires_grad_(False)
    model.embed.weight.grad = torch.ones(13, 8)
    before, seen = flags(model), []

    def look(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        seen.append(flags(model))
        return loss(model, batch)

    train.finetune(model, look, BATCHES, train.sgd(model), steps=2)
    assert seen == [{name: name.startswith("layers.") for name in before}] * 2
    assert flags(model) == before
    assert all(p.grad is None for n, p in model.named_parameters() if n.startswith("layers."))
    assert torch.equal(model.embed.weight.grad, torch.ones(13, 8))


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_the_callers(training: bool) -> None:
    model = factories.TinyModel().train(training)
    model.layers[0].train(not training)
    train.finetune(model, loss, BATCHES, train.sgd(model), steps=1)
    assert (model.training, model.layers[0].training) == (training, not training)


def test_progress_is_told_each_step() -> None:
    model = factories.TinyModel()
    told: list[tuple[int, int, float]] = []
    losses = train.finetune(
        model, loss, BATCHES, train.sgd(model), steps=3, progress=lambda *args: told.append(args)
    )
    assert told == [(1, 3, losses[0]), (2, 3, losses[1]), (3, 3, losses[2])]


def test_a_second_run_goes_on_with_the_same_optimizer() -> None:
    model, other = factories.TinyModel(), factories.TinyModel()
    optimizer = train.adamw(model, lr=1e-2, l1=0.2)
    for _ in range(2):
        train.finetune(model, loss, BATCHES, optimizer, steps=2)
    train.finetune(other, loss, BATCHES, train.adamw(other, lr=1e-2, l1=0.2), steps=4)
    assert holds(model, contents(other))


def test_a_second_task_around_the_first() -> None:
    model = factories.TinyModel()
    base = contents(model)
    train.finetune(model, loss, BATCHES, train.sgd(model, lr=0.2), steps=10)
    first = diff(base, model, density=0.2, scope="encoder")
    model.load_state_dict(factories.grafted(base, first))
    optimizer = train.sgd(model, lr=0.2)
    other = [batch.flip(1) for batch in BATCHES]
    with train.protect(optimizer, model, first):
        train.finetune(model, loss, other, optimizer, steps=10)
    both = diff(base, model, scope="encoder")
    assert both.nnz > 2 * first.nnz
    for name in first.names:
        where = torch.isin(both[name].indices, first[name].indices)
        assert torch.equal(both[name].new[where], first[name].new)


# ---- seeds --------------------------------------------------------------------------------------


def test_a_seed_settles_dropout_and_shuffling() -> None:
    found = []
    for seed in (3, 3, 4):
        torch.manual_seed(len(found))
        before = torch.get_rng_state()
        model = NoisyModel().train()
        data = DataLoader(list(TOKENS), batch_size=1, shuffle=True)
        losses = train.finetune(model, loss, data, train.sgd(model), steps=6, seed=seed)
        found.append((losses, contents(model)))
        assert torch.equal(torch.get_rng_state(), before)  # nobody else's numbers were taken
    assert found[0][0] == found[1][0] != found[2][0]
    assert factories.same_bits(found[0][1], found[1][1])


def test_without_a_seed_torchs_generator_goes_on() -> None:
    found = []
    for seed in (0, 0, 1):
        model = NoisyModel().train()
        torch.manual_seed(seed)
        found.append(train.finetune(model, loss, [TOKENS], train.sgd(model), steps=2))
    assert found[0] == found[1] != found[2]
    assert not torch.equal(torch.get_rng_state(), torch.manual_seed(1).get_state())


@pytest.mark.parametrize("seed", [-1, 2**63, True, 1.0, "1"])
def test_a_seed_that_is_none_is_refused_before_the_first_step(seed: Any) -> None:
    model = factories.TinyModel()
    before = contents(model)
    with pytest.raises(DataError, match="wanted a whole number in 0"):
        train.finetune(model, loss, BATCHES, train.sgd(model), steps=1, seed=seed)
    assert holds(model, before)


# ---- data ---------------------------------------------------------------------------------------


class Counted:
    """Two batches, as often as wanted."""

    def __init__(self) -> None:
        self.rounds = 0

    def __iter__(self) -> Iterator[torch.Tensor]:
        self.rounds += 1
        yield from BATCHES


def test_data_is_read_again_as_often_as_needed() -> None:
    data, model = Counted(), factories.TinyModel()
    train.finetune(model, loss, data, train.sgd(model), steps=4)
    assert data.rounds == 2
    train.finetune(model, loss, data, train.sgd(model), steps=5)
    assert data.rounds == 5


def test_an_iterator_that_is_long_enough() -> None:
    model = factories.TinyModel()
    assert len(train.finetune(model, loss, iter(BATCHES), train.sgd(model), steps=2)) == 2


@pytest.mark.parametrize("hidden", [False, True])
def test_an_iterator_that_ends(hidden: bool) -> None:
    class Once:
        batches = iter(BATCHES)

        def __iter__(self) -> Iterator[torch.Tensor]:
            return self.batches

    model = factories.TinyModel().requires_grad_(False)
    with pytest.raises(DataError, match="ended after 2 of 3 batches"):
        train.finetune(model, loss, Once() if hidden else iter(BATCHES), train.sgd(model), steps=3)
    assert not any(flags(model).values())


@pytest.mark.parametrize("data", [[], iter(())])
def test_no_data(data: Any) -> None:
    model = factories.TinyModel()
    with pytest.raises(DataError, match="no batch"):
        train.finetune(model, loss, data, train.sgd(model), steps=3)


def test_what_is_no_data() -> None:
    model = factories.TinyModel()
    with pytest.raises(DataError, match="data is a int"):
        train.finetune(model, loss, 5, train.sgd(model), steps=3)  # type: ignore[arg-type]


@pytest.mark.parametrize("steps", [0, -3])
def test_no_steps(steps: int) -> None:
    model = factories.TinyModel()
    with pytest.raises(DataError, match=rf"steps {steps}: wanted at least 1"):
        train.finetune(model, loss, BATCHES, train.sgd(model), steps=steps)


# ---- losses -------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_leaves_the_weights(wrong: float) -> None:
    model = factories.TinyModel()
    model.embed.weight.requires_grad_(False)
    before, taken = flags(model), list[Any]()

    def bad(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        taken.append(contents(model))
        return loss(model, batch) * (wrong if len(taken) == 3 else 1)

    with pytest.raises(NonFiniteError, match=r"loss is (nan|inf) at step 3 of 9"):
        train.finetune(model, bad, BATCHES, train.adamw(model, l1=0.1), steps=9)
    assert holds(model, taken[2])
    assert not holds(model, taken[1])
    assert flags(model) == before


def test_a_gradient_that_is_not_finite_leaves_the_weights() -> None:
    model = factories.TinyModel()
    before = contents(model)

    def bad(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        return (
            loss(model, batch) + model.layers[0][1].bias.sub(model.layers[0][1].bias).sum().sqrt()
        )

    plain = torch.optim.SGD(model.layers.parameters(), lr=0.1)
    with pytest.raises(NonFiniteError, match=r"finite at step 1 of 2, but its gradient's norm is"):
        train.finetune(model, bad, BATCHES, plain, steps=2)
    assert holds(model, before)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda value: value.expand(3), r"loss is \[3\]; wanted a tensor of one element"),
        (lambda value: value.item(), "loss is float; wanted"),
        (lambda value: value.detach(), "depends on no weight that may change"),
    ],
)
def test_what_is_no_loss(make: Any, says: str) -> None:
    model = factories.TinyModel()
    before = contents(model)
    with pytest.raises(DataError, match=says):
        train.finetune(model, lambda m, b: make(loss(m, b)), BATCHES, train.sgd(model), steps=1)
    assert holds(model, before)


def test_an_exception_of_the_callers_comes_through() -> None:
    model = factories.TinyModel()
    before = flags(model)

    def stop(step: int, _steps: int, _loss: float) -> None:
        if step == 2:
            raise KeyboardInterrupt

    optimizer = train.sgd(model)
    mask = Mask({"layers.0.1.bias": ((8,), range(8))})
    bias = model.layers[0][1].bias.detach().clone()
    with pytest.raises(KeyboardInterrupt), train.protect(optimizer, model, mask):
        train.finetune(model, loss, BATCHES, optimizer, steps=9, progress=stop)
    assert flags(model) == before
    assert torch.equal(model.layers[0][1].bias, bias)


def test_another_models_optimizer() -> None:
    model = factories.TinyModel()
    with pytest.raises(CoverageError, match="none of them this model's"):
        train.finetune(model, loss, BATCHES, train.sgd(factories.TinyModel()), steps=1)


def test_errors_are_ours_and_pythons() -> None:
    assert issubclass(DataError, HotgraftError)
    assert issubclass(DataError, ValueError)
