"""Protected positions hold their bits through every step, and the others are trained."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import factories
import numpy as np
import pytest
import torch
from hosts import contents, holds
from hotgraft import Mask, attach, diff, train
from hotgraft.errors import BaseMismatchError, CoverageError, GraftError, HostChangedError
from hotgraft.graft import bits
from torch import nn

Make = Callable[[Iterator[nn.Parameter]], torch.optim.Optimizer]


def sgd(parameters: Iterator[nn.Parameter], **how: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.1, **how)


def adamw(parameters: Iterator[nn.Parameter], **how: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.5, **how)


OPTIMIZERS = {
    f"{make.__name__}-{''.join(how) or 'default'}": (make, how)
    for make in (sgd, adamw)
    for how in ({}, {"foreach": False}, {"foreach": True}, {"fused": True})
}
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def every_third(model: nn.Module, *names: str) -> Mask:
    """A third of the positions of some tensors, or of all."""
    state = model.state_dict()
    return Mask({n: (tuple(state[n].shape), range(0, state[n].numel(), 3)) for n in names or state})


def run(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3) -> None:
    """Steps with gradients that are nowhere 0."""
    generator = torch.Generator().manual_seed(7)
    for _ in range(steps):
        for p in model.parameters():
            if p.requires_grad:
                p.grad = (torch.rand(p.shape, generator=generator) + 0.5).to(p.device, p.dtype)
        optimizer.step()


def moved(model: nn.Module, before: dict[str, torch.Tensor]) -> dict[str, np.ndarray[Any, Any]]:
    """The positions of each tensor that hold other bits than before."""
    now = contents(model)
    return {name: np.flatnonzero(bits(now[name]) != bits(before[name])) for name in before}


def is_rest(model: nn.Module, before: dict[str, torch.Tensor], mask: Mask) -> bool:
    """Whether what moved is everything but the mask."""
    found = moved(model, before)
    return all(
        np.array_equal(found[n], np.setdiff1d(np.arange(t.numel()), mask.get(n, [])))
        for n, t in before.items()
    )


class Blocks(nn.Module):
    """Two layers, one of them with a weight that is transposed in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(5, 4), nn.Linear(4, 6)])
        self.layers[1].weight = nn.Parameter(torch.randn(4, 6).t())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers[1](self.layers[0](x))  # type: ignore[no-any-return]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_every_optimizer_leaves_them_alone(kind: str, dtype: torch.dtype, device: str) -> None:
    make, how = OPTIMIZERS[kind]
    torch.manual_seed(1)
    model = Blocks().to(device, dtype)
    other = copy.deepcopy(model)
    optimizer, mask = make(model.parameters(), **how), every_third(model)
    before = contents(model)
    train.protect(optimizer, model, mask)
    run(model, optimizer)
    run(other, make(other.parameters(), **how))
    wanted = contents(other)
    for name, tensor in wanted.items():
        chosen = torch.zeros(tensor.numel(), dtype=torch.bool)
        chosen[torch.tensor(mask[name])] = True
        wanted[name] = torch.where(chosen.view(tensor.shape), before[name], tensor)
    assert holds(model, wanted)
    found = moved(model, before)
    assert all(found[name].size for name in before)


def test_bits_are_kept_and_not_values() -> None:
    model = nn.Linear(6, 1, bias=False)
    strange = torch.tensor([-0.0, 1e-45, 3.0, float("nan"), float("inf"), 1.0])
    with torch.no_grad():
        model.weight.copy_(strange)
        model.weight.view(torch.int32)[0, 3] = 0x7FC0_1234  # a NaN that says something
    before = contents(model)
    optimizer = sgd(model.parameters())
    mask = Mask({"weight": ((1, 6), [0, 1, 3, 4])})
    with train.protect(optimizer, model, mask):
        run(model, optimizer)
    assert is_rest(model, before, mask)


def test_they_hold_what_they_held_when_it_began() -> None:
    model = Blocks()
    optimizer, before = sgd(model.parameters()), contents(model)
    train.protect(optimizer, model, every_third(model))
    run(model, optimizer, 1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)
    run(model, optimizer, 1)
    assert is_rest(model, before, every_third(model))


@pytest.mark.parametrize("names", [("head.weight",), ("embed.weight", "head.weight")])
def test_tied_weights(names: tuple[str, ...]) -> None:
    model = factories.TinyModel()
    optimizer, before, mask = adamw(model.parameters()), contents(model), every_third(model, *names)
    train.protect(optimizer, model, mask)
    run(model, optimizer)
    both = mask | every_third(model, "embed.weight", "head.weight")
    assert is_rest(model, before, both)


def test_a_tie_through_a_view_of_the_same_memory() -> None:
    model = nn.ModuleDict({"a": nn.Linear(3, 4, bias=False), "b": nn.Linear(4, 3, bias=False)})
    model["b"].weight = nn.Parameter(model["a"].weight.detach().t())
    optimizer = torch.optim.SGD([model["a"].weight], lr=0.1)  # the mask names the other one
    before = contents(model)
    train.protect(optimizer, model, Mask({"b.weight": ((3, 4), [1])}))
    run(model, optimizer)
    assert np.array_equal(moved(model, before)["a.weight"], np.setdiff1d(np.arange(12), [3]))


def test_a_mask_in_the_names_of_the_model_inside() -> None:
    inner = Blocks()
    mask = every_third(inner)
    outer = nn.ModuleDict({"encoder": inner, "head": nn.Linear(6, 2)})
    optimizer, before = sgd(outer.parameters()), contents(outer)
    protection = train.protect(optimizer, outer, mask)
    run(outer, optimizer)
    assert set(protection.mask) == {f"encoder.{name}" for name in mask}
    assert is_rest(outer, before, protection.mask)


def test_a_graft_says_where_too() -> None:
    model = Blocks()
    optimizer, before = sgd(model.parameters()), contents(model)
    graft = factories.graft_on(before, share=0.3)
    train.protect(optimizer, model, graft)
    run(model, optimizer)
    assert is_rest(model, before, graft.mask)


# ---- frozen, thawed, moved ----------------------------------------------------------------------


def test_frozen_tensors_may_be_in_the_mask_and_thaw() -> None:
    model = Blocks()
    model.layers[0].requires_grad_(False)
    optimizer, before, mask = sgd(model.parameters()), contents(model), every_third(model)
    train.protect(optimizer, model, mask)
    run(model, optimizer)
    frozen = [name for name in before if name.startswith("layers.0.")]
    assert all(not len(moved(model, before)[name]) for name in frozen)
    model.requires_grad_(True)
    run(model, optimizer)
    assert is_rest(model, before, mask)


def test_what_the_optimizer_takes_on_later_is_protected_from_then() -> None:
    model = Blocks()
    optimizer = sgd(model.layers[1].parameters())
    before, mask = contents(model), every_third(model)
    train.protect(optimizer, model, mask)
    versions = [p._version for p in model.layers[0].parameters()]
    run(model, optimizer, 1)
    assert [p._version for p in model.layers[0].parameters()] == versions  # not written
    optimizer.add_param_group({"params": list(model.layers[0].parameters())})
    run(model, optimizer)
    assert is_rest(model, before, mask)


def test_a_mask_that_the_optimizer_never_touches() -> None:
    model = Blocks()
    optimizer, before = sgd(model.layers[1].parameters()), contents(model)
    train.protect(optimizer, model, every_third(model, "layers.0.weight"))
    run(model, optimizer)
    assert not len(moved(model, before)["layers.0.weight"])
    assert len(moved(model, before)["layers.1.bias"]) == 6


def test_an_empty_mask_protects_nothing() -> None:
    model = Blocks()
    optimizer, before = sgd(model.parameters()), contents(model)
    with train.protect(optimizer, model, Mask({})) as protection:
        run(model, optimizer)
    assert protection.mask.nnz == 0
    assert is_rest(model, before, Mask({}))


def test_weights_that_were_moved_are_found_again() -> None:
    model = Blocks()
    optimizer, before, mask = adamw(model.parameters()), contents(model), every_third(model)
    train.protect(optimizer, model, mask)
    run(model, optimizer, 1)
    for p in model.parameters():
        p.data = p.data.clone()  # what model.to(device) does
    run(model, optimizer, 1)
    assert is_rest(model, before, mask)


@pytest.mark.gpu
def test_a_model_that_goes_to_a_gpu_stays_protected() -> None:
    model = Blocks()
    optimizer, before, mask = sgd(model.parameters()), contents(model), every_third(model)
    train.protect(optimizer, model, mask)
    model.to("cuda")
    run(model, optimizer)
    assert is_rest(model, before, mask)


def test_another_precision_is_an_error() -> None:
    model = Blocks()
    optimizer = sgd(model.parameters())
    protection = train.protect(optimizer, model, every_third(model))
    model.bfloat16()
    with pytest.raises(BaseMismatchError, match=r"was F32 when .* and is BF16 now"):
        run(model, optimizer, 1)
    with pytest.raises(BaseMismatchError):  # again: it is never silently gone
        run(model, optimizer, 1)
    with pytest.raises(BaseMismatchError):
        protection.remove()
    run(model, optimizer, 1)  # it is gone all the same


# ---- the end of it ------------------------------------------------------------------------------


def test_removal() -> None:
    model = Blocks()
    optimizer, before = sgd(model.parameters()), contents(model)
    protection = train.protect(optimizer, model, every_third(model))
    run(model, optimizer)
    protection.remove()
    protection.remove()
    run(model, optimizer)
    assert is_rest(model, before, Mask({}))


def test_removal_writes_nothing_after_a_step_that_ended() -> None:
    model = Blocks()
    optimizer = sgd(model.parameters())
    with train.protect(optimizer, model, every_third(model)):
        run(model, optimizer)
        with torch.no_grad():
            model.layers[0].bias.fill_(9)
    assert model.layers[0].bias.tolist() == [9] * 4


def test_two_protections_end_one_by_one() -> None:
    model = Blocks()
    optimizer, before = sgd(model.parameters()), contents(model)
    first, second = every_third(model, "layers.0.weight"), every_third(model, "layers.1.weight")
    with train.protect(optimizer, model, first):
        with train.protect(optimizer, model, second):
            run(model, optimizer)
            assert is_rest(model, before, first | second)
        run(model, optimizer)
        assert is_rest(model, before, first)


class Breaks(torch.optim.SGD):
    """Writes to every parameter, and stops."""

    def step(self, closure: Any = None) -> None:
        super().step(closure)
        raise RuntimeError("power cut")


def test_a_step_that_breaks_off() -> None:
    model = Blocks()
    optimizer, before, mask = (
        Breaks(model.parameters(), lr=0.1),
        contents(model),
        every_third(model),
    )
    with (
        pytest.raises(RuntimeError, match="power cut"),
        train.protect(optimizer, model, mask),
    ):
        run(model, optimizer)
    assert is_rest(model, before, mask)


def test_a_closure_that_raises() -> None:
    model = Blocks()
    optimizer, before = sgd(model.parameters()), contents(model)
    calls = []

    def closure() -> float:
        calls.append(1)
        raise RuntimeError("no loss today")

    with train.protect(optimizer, model, every_third(model)):
        with pytest.raises(RuntimeError, match="no loss"):
            optimizer.step(closure)
        run(model, optimizer)
        assert is_rest(model, before, every_third(model))
    assert calls == [1]


def test_hooks_that_come_later_do_not_get_past_it() -> None:
    model = Blocks()
    optimizer, before, mask = sgd(model.parameters()), contents(model), every_third(model)
    zeros = {name: torch.zeros_like(tensor) for name, tensor in before.items()}
    train.protect(optimizer, model, mask)
    train.pull(optimizer, model, 0.3, base=zeros)
    run(model, optimizer)
    assert is_rest(model, before, mask)


# ---- whose it is --------------------------------------------------------------------------------


def test_gradient_accumulation() -> None:
    torch.manual_seed(2)
    model = Blocks()
    optimizer, before, mask = sgd(model.parameters()), contents(model), every_third(model)
    train.protect(optimizer, model, mask)
    for _ in range(2):
        for _ in range(3):
            model(torch.randn(8, 5)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    found = moved(model, before)
    assert all(not np.intersect1d(found[name], mask[name]).size for name in before)
    assert all(found[name].size for name in before)


def test_a_copy_is_not_protected() -> None:
    model = Blocks()
    optimizer, before, mask = sgd(model.parameters()), contents(model), every_third(model)
    train.protect(optimizer, model, mask)
    other, its = copy.deepcopy((model, optimizer))
    run(other, its)
    assert is_rest(other, before, Mask({}))
    assert is_rest(model, before, Mask({n: (tuple(t.shape), range(t.numel())) for n, t in
                                        before.items()}))  # fmt: skip
    run(model, optimizer)
    assert is_rest(model, before, mask)
    with pytest.raises(CoverageError, match="made for another model, or for the one that this is"):
        train.protect(optimizer, other, mask)


def test_loading_a_state_keeps_it() -> None:
    model = Blocks()
    optimizer, before, mask = adamw(model.parameters()), contents(model), every_third(model)
    run(model, optimizer)
    saved = copy.deepcopy(optimizer.state_dict())
    model.load_state_dict(before)
    train.protect(optimizer, model, mask)
    optimizer.load_state_dict(saved)
    run(model, optimizer)
    assert is_rest(model, before, mask)


def test_a_host_notices_that_its_skill_was_overwritten() -> None:
    model = Blocks()
    optimizer = sgd(model.parameters())
    mask = every_third(model, "layers.0.weight")
    tuned = {name: tensor + 1 for name, tensor in contents(model).items()}
    host = attach(model)
    host.load(diff(model, tuned), name="a")
    train.protect(optimizer, model, mask)
    host.activate("a")
    optimizer.step()  # without gradients: nothing but the protected positions is written
    with pytest.raises(HostChangedError, match=r"layers\.0\.weight"):
        host.deactivate()
    host.detach(force=True)


# ---- what it refuses ----------------------------------------------------------------------------


def test_a_tensor_that_is_not_there() -> None:
    model = Blocks()
    mask = Mask({"layers.7.weight": ((4, 5), [0])})
    with pytest.raises(CoverageError, match=r"lacks 'layers\.7\.weight', which the mask names"):
        train.protect(sgd(model.parameters()), model, mask)


def test_another_shape() -> None:
    model = Blocks()
    optimizer = sgd(model.parameters())
    with pytest.raises(BaseMismatchError, match=r"shape \[5, 4\] in the mask and \[4, 5\] in the"):
        train.protect(optimizer, model, Mask({"layers.0.weight": ((5, 4), [0])}))
    assert not optimizer._optimizer_step_post_hooks


def test_what_is_no_mask() -> None:
    model = Blocks()
    with pytest.raises(GraftError, match="is not a Mask"):
        train.protect(sgd(model.parameters()), model, {"layers.0.weight": [0]})  # type: ignore[arg-type]


def test_it_says_what_it_holds() -> None:
    model = Blocks()
    protection = train.protect(sgd(model.parameters()), model, every_third(model))
    assert repr(protection) == "Protection(19 entries in 4 tensors)"
