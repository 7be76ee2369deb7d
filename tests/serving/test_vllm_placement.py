"""Traced placement in real vLLM models: what `load_weights` of a patched checkpoint would give."""

from __future__ import annotations

import copy
from pathlib import Path

import checkpoints
import hotgraft
import pytest
import ranks
import torch
from hotgraft.errors import LayoutError
from hotgraft.host import Host
from hotgraft.placement import Order, trace
from hotgraft.weights import open_weights
from safetensors.torch import load_file, save_file

COUNTS = (1, 2)
State = dict[str, torch.Tensor]
REPACKED = "experts"


def compare(rank: int, count: int, folder: Path) -> None:
    """Every architecture: place a graft, and load what it makes of the checkpoint."""
    from hotgraft.serve.vllm.live import keep_weights_live, packed_layers

    keep_weights_live()
    for name in checkpoints.ARCHITECTURES:
        meeting = folder / f"meet-{name}-{count}"
        with ranks.vllm_model(folder / name, rank, count, meeting) as model:
            assert packed_layers(model) == []
            with open_weights(folder / name) as weights:
                found = trace(model, model.load_weights, weights.specs)
                found.verify(weights)
            state = load_file(folder / name / "model.safetensors")
            assert set(found.regions) == set(state)
            # vLLM repacks experts for the CPU, at the same shape.
            assert set(found.refused) == {n for n in state if REPACKED in n}
            if found.refused:
                experts = {n: state[n] for n in found.refused}
                with pytest.raises(LayoutError, match=r"experts.*repacked"):
                    found.place(hotgraft.diff(experts, checkpoints.tuned(experts)), model)
            old = {n: t for n, t in state.items() if n not in found.refused}
            new = checkpoints.tuned(old)
            graft = hotgraft.diff(old, new)
            placed, which = found.place(graft, model)

            before = bits(model)
            host = hotgraft.attach(model)
            host.load(placed, name="tuned")
            host.activate("tuned")
            live = bits(model)
            host.detach(force=True)
            assert_equal(bits(model), before, name)
            model.load_weights(new.items())
            assert_equal(live, bits(model), name)
            model.load_weights(old.items())
            compare_packed(model, folder / name, graft, before, live)
            save_file({"which": torch.from_numpy(which)}, folder / f"{name}-{count}-{rank}")


def compare_packed(
    model: torch.nn.Module, checkpoint: Path, graft: hotgraft.Graft, before: State, live: State
) -> None:
    """The same with packed weights, seen as they were loaded."""
    from hotgraft.serve.vllm.live import pack, packed_layers, refuse_loading

    known = hotgraft.fingerprint(model)
    pack(model)
    assert packed_layers(model) == []
    assert packed_names(model), "oneDNN packed nothing here"
    with open_weights(checkpoint) as weights:
        found = trace(model, model.load_weights, weights.specs)
        found.verify(weights)
    placed, which = found.place(graft, model)
    assert which.any()
    assert_equal(bits(model), before, checkpoint.name)
    assert hotgraft.fingerprint(model) == known
    with pytest.raises(LayoutError, match="another order"):
        hotgraft.attach(model)
    host = Host(model)
    host.load(placed, name="tuned")
    host.activate("tuned")
    assert_equal(bits(model), live, checkpoint.name)
    host.detach(force=True)
    assert_equal(bits(model), before, checkpoint.name)
    refuse_loading(model)
    with pytest.raises(LayoutError, match="packed"):
        model.load_weights([])


def packed_names(model: torch.nn.Module) -> set[str]:
    return {name for name, tensor in model.named_parameters() if Order.of(tensor) is not None}


def bits(model: torch.nn.Module) -> State:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def raw(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def assert_equal(a: State, b: State, name: str) -> None:
    differing = [n for n in a if not torch.equal(raw(a[n]), raw(b[n]))]
    assert not differing, f"{name}: {differing}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("toys")
    for name in checkpoints.ARCHITECTURES:
        checkpoints.save(name, found)
    return found


@pytest.mark.parametrize("count", COUNTS)
def test_placed_bits_are_loaded_bits(folder: Path, count: int) -> None:
    ranks.run(compare, folder, count)
    for name in checkpoints.ARCHITECTURES:
        held = [load_file(folder / f"{name}-{count}-{rank}")["which"] for rank in range(count)]
        assert torch.stack(held).any(0).all(), name  # no entry is without a place


def look_for_packed(rank: int, count: int, folder: Path) -> None:
    """As vLLM loads on a CPU by default."""
    from hotgraft.serve.vllm.live import packed_layers

    with ranks.vllm_model(folder / "llama", rank, count, folder / "meet-packed") as model:
        assert "lm_head" in packed_layers(model)
        assert "model.layers.0.self_attn.qkv_proj" in packed_layers(model)


def test_packed_weights_are_seen(folder: Path) -> None:
    ranks.run(look_for_packed, folder, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 96), (5, 96), (2, 40, 96)])
def test_packed_weights_are_computed_with_as_they_are_at_the_moment(
    dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    from hotgraft.serve.vllm.live import Packed

    x, weight, bias = (torch.randn(s).to(dtype) for s in (shape, (64, 96), (64,)))
    packed = Packed.of(weight)
    assert packed is not None
    error = 1e-4 if dtype == torch.float32 else 0.02
    for _ in range(2):
        for more in (None, bias):
            wanted = torch.nn.functional.linear(x, weight, more)
            torch.testing.assert_close(packed(x, weight, more), wanted, atol=4 * error, rtol=error)
        packed.memory.mul_(-1)  # as a graft changes it: in place
        weight.mul_(-1)
    with pytest.raises(LayoutError, match="neither copied nor pickled"):
        copy.deepcopy(packed)


def test_memory_outlives_who_packed_it() -> None:
    from hotgraft.serve.vllm.live import Packed

    memory = Packed.of(torch.full((64, 96), 3.0)).memory
    others = [Packed.of(torch.zeros(64, 96)) for _ in range(8)]
    assert (memory == 3).all()
    assert len(others) == 8
