"""A real vLLM engine: skills loaded and switched on all of its workers."""

from __future__ import annotations

import copy
import gc
import os
import weakref
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import checkpoints
import hotgraft
import pytest
import torch
from hotgraft.errors import FormatError, LayoutError, SkillInUseError
from hotgraft.placement import Order
from hotgraft.serve.vllm.worker import connect, rank_of
from safetensors.torch import load_file, save_file

EXTENSION = "hotgraft.serve.vllm.worker.Grafts"
PROMPTS = [{"prompt_token_ids": [1, 5 + i, 9, 2 * i + 3]} for i in range(4)]


def engine(folder: Path, ranks: int = 1, **more: Any) -> Any:
    from vllm import LLM

    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "0|1" if ranks > 1 else "nobind"
    return LLM(
        str(folder),
        skip_tokenizer_init=True,
        enforce_eager=True,
        dtype="bfloat16",
        max_model_len=64,
        tensor_parallel_size=ranks,
        enable_prefix_caching=False,
        **more,
    )


def answers(llm: Any) -> list[list[int]]:
    from vllm import SamplingParams

    sampling = SamplingParams(max_tokens=8, temperature=0, detokenize=False)
    found = llm.generate(PROMPTS, sampling, use_tqdm=False)
    return [list(answer.outputs[0].token_ids) for answer in found]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, a checkpoint of the same kind with other weights, and the graft between them."""
    found = tmp_path_factory.mktemp("worker")
    base = checkpoints.save("llama", found)
    state = load_file(base / "model.safetensors")
    other = checkpoints.tuned(state, density=0.2)
    (found / "tuned").mkdir()
    for file in base.glob("*.json"):
        (found / "tuned" / file.name).write_bytes(file.read_bytes())
    save_file(other, found / "tuned" / "model.safetensors", metadata={"format": "pt"})
    hotgraft.diff(state, other).save(found / "tuned.graft.safetensors")
    return found


@pytest.fixture(scope="module")
def tuned(folder: Path) -> list[list[int]]:
    """What a server says that only ever held the other weights."""
    found = engine(folder / "tuned", worker_extension_cls=EXTENSION)
    said = answers(found)
    found.llm_engine.engine_core.shutdown()
    return said


@pytest.fixture(scope="module", params=[1, 2])
def llm(
    tuned: list[list[int]],  # noqa: ARG001 - one engine after another
    folder: Path,
    request: pytest.FixtureRequest,
) -> Iterator[Any]:
    found = engine(
        folder / "llama",
        request.param,
        worker_extension_cls=EXTENSION,
        weight_transfer_config={"backend": "hotgraft"},
    )
    found.ranks = request.param
    yield found
    found.llm_engine.engine_core.shutdown()


def test_a_skill_is_the_model_it_came_from(tuned: list[list[int]], llm: Any, folder: Path) -> None:
    ranks = connect(llm)
    base = answers(llm)
    graft = folder / "tuned.graft.safetensors"
    assert ranks.load("tuned", graft).nnz == hotgraft.Graft.load(graft).nnz
    assert answers(llm) == base  # loading changes nothing
    ranks.activate("tuned")
    live = answers(llm)
    assert live != base
    if llm.ranks == 1:  # two ranks sum up in another order
        assert live == tuned
    with pytest.raises(SkillInUseError, match="rank 0: 'tuned' is live"):
        ranks.unload("tuned")
    assert ranks.verify() > 0
    broken = folder / "broken.graft.safetensors"
    broken.write_bytes(graft.read_bytes()[:-1] + b"\x55")
    with pytest.raises(FormatError, match=r"rank [01]: "):
        ranks.load("broken", broken)
    assert answers(llm) == live
    ranks.deactivate()
    assert answers(llm) == base
    ranks.unload("tuned")
    assert not ranks.skills


def test_other_methods_are_not_called(llm: Any) -> None:
    found = llm.collective_rpc("hotgraft", args=("close", ()))
    assert [answer["error"][0] for answer in found] == ["LookupError"] * llm.ranks


def test_vllm_takes_grafts_as_weight_updates(llm: Any, folder: Path) -> None:
    base = answers(llm)

    def update(*paths: Path, **more: Any) -> None:
        llm.collective_rpc("start_weight_update")
        for number, path in enumerate(paths):
            info = {"path": str(path), "name": f"part{number}", **more}
            llm.collective_rpc("update_weights", args=(info,))
        assert answers(llm) == before  # nothing is live before the end
        llm.collective_rpc("finish_weight_update")

    llm.collective_rpc("init_weight_transfer_engine", args=({},))
    graft = hotgraft.Graft.load(folder / "tuned.graft.safetensors")
    names = [name for name in graft.names if "layers.0" in name]
    parts = [
        hotgraft.Graft.from_entries({n: graft[n] for n in graft.names if (n in names) is first})
        for first in (True, False)
    ]
    paths = [folder / f"part{i}.graft.safetensors" for i in range(2)]
    for part, path in zip(parts, paths, strict=True):
        part.save(path)

    before = base
    update(paths[0])
    half = answers(llm)
    assert half != base
    before = half
    update(*paths)
    whole = answers(llm)
    before = whole
    if llm.ranks == 1:  # of several, vLLM leaves answers unread after an error
        broken = folder / "broken.graft.safetensors"
        broken.write_bytes(paths[1].read_bytes()[:-1] + b"\x55")
        with pytest.raises(FormatError, match="damaged"):
            update(paths[0], broken)
        assert answers(llm) == whole
    update(paths[1])
    assert answers(llm) != whole
    before = answers(llm)
    update()
    assert answers(llm) == base
    ranks = connect(llm)
    ranks.load("tuned", folder / "tuned.graft.safetensors")
    ranks.activate("tuned")
    assert answers(llm) == whole
    ranks.deactivate()
    ranks.unload("tuned")


@pytest.fixture(scope="module")
def packing(folder: Path) -> Iterator[Any]:
    """An engine in this process whose worker packs, of a model with a head of another data type."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        found = engine(
            folder / "llama",
            worker_cls="hotgraft.serve.vllm.worker.SkillWorker",
            weight_transfer_config={"backend": "hotgraft"},
            hf_overrides={"head_dtype": "float32"},
        )
    yield found
    found.llm_engine.engine_core.shutdown()


def model_of(llm: Any) -> Any:
    return llm.apply_model(lambda model: model)[0]


def test_a_head_of_another_type_is_not_packed(packing: Any, folder: Path) -> None:
    model = model_of(packing)
    packed = {name for name, tensor in model.named_parameters() if Order.of(tensor) is not None}
    assert "model.layers.0.mlp.down_proj.weight" in packed
    assert "lm_head.weight" not in packed
    hidden = torch.randn(3, 128).bfloat16()
    ranks = connect(packing)
    ranks.load("tuned", folder / "tuned.graft.safetensors")
    for skill, checkpoint in (((), "llama"), (("tuned",), "tuned")):
        ranks.activate(*skill)
        head = load_file(folder / checkpoint / "model.safetensors")["lm_head.weight"]
        torch.testing.assert_close(model.compute_logits(hidden), hidden.float() @ head.float().T)
    ranks.deactivate()
    ranks.unload("tuned")


def test_only_grafts_are_written_into_packed_weights(packing: Any, folder: Path) -> None:
    before = {name: tensor.clone() for name, tensor in model_of(packing).state_dict().items()}
    said = answers(packing)

    def update() -> None:
        info = {"path": str(folder / "tuned.graft.safetensors"), "name": "tuned"}
        packing.collective_rpc("start_weight_update")
        packing.collective_rpc("update_weights", args=(info,))
        packing.collective_rpc("finish_weight_update")

    transfer = packing.llm_engine.vllm_config.weight_transfer_config
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transfer, "backend", "nccl")
        with pytest.raises(LayoutError, match="are packed"):
            update()
    with pytest.raises(LayoutError, match="are packed"):
        packing.collective_rpc("reload_weights")
    now = model_of(packing).state_dict()
    assert all(torch.equal(tensor, now[name]) for name, tensor in before.items())
    assert answers(packing) == said
    packing.collective_rpc("init_weight_transfer_engine", args=({},))
    update()
    assert answers(packing) != said


class Toy(torch.nn.Linear):
    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        for name, tensor in weights:
            getattr(self, name).data.copy_(tensor)


def test_a_model_that_its_worker_drops_is_freed(tmp_path: Path) -> None:
    from vllm.config import VllmConfig

    toys = [Toy(4, 3), Toy(4, 3)]
    toys[1].load_state_dict(toys[0].state_dict())
    save_file(toys[0].state_dict(), tmp_path / "model.safetensors")
    config = VllmConfig()
    config.model_config = SimpleNamespace(  # type: ignore[assignment]
        model=str(tmp_path), model_weights="", revision=None
    )
    rank = rank_of(toys[0], config)
    assert rank_of(toys[0], config) is rank
    for other in (toys[1], copy.deepcopy(toys[0])):
        assert rank_of(other, config) is not rank
    base = {name: tensor.clone() for name, tensor in toys[0].state_dict().items()}
    rank.host.load(hotgraft.diff(base, Toy(4, 3)), name="other")
    rank.activate(("other",), "refuse", None)
    dropped = [weakref.ref(thing) for thing in (toys[0], rank)]
    del rank
    toys.pop(0)
    gc.collect()
    assert [thing() for thing in dropped] == [None, None]
