"""Worker: vLLM's worker with a host around its model.

`SkillWorker` is for `worker_cls`, and switches skills between steps by itself. `Grafts` is for
`worker_extension_cls`, where only the calls are wanted: `connect` makes them, on every rank.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from vllm.config import set_current_vllm_config
from vllm.platforms import current_platform

from hotgraft.errors import LayoutError
from hotgraft.serve.rank import Prepared, Rank
from hotgraft.serve.ranks import Ranks, error_of
from hotgraft.serve.vllm.live import (
    is_packed,
    keep_weights_live,
    pack,
    packed_layers,
    refuse,
    refuse_loading,
)
from hotgraft.serve.vllm.plugin import BACKEND
from hotgraft.serve.vllm.steps import SkillSteps
from hotgraft.weights import open_weights, sample

if current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker as Worker
else:
    from vllm.v1.worker.gpu_worker import Worker

METHODS = (
    "begin", "prepared", "keep", "withdraw", "release", "unload", "prepare", "activate", "verify",
)  # fmt: skip
"""Of `Rank`: what may be called."""

keep_weights_live()  # this module is imported before the model is loaded


class Grafts:
    """What a worker does with grafts; vLLM adds it to its worker class."""

    def hotgraft(self, method: str, args: tuple[Any, ...] = ()) -> dict[str, Any]:
        """Call a method of this worker's `Rank`. It never raises: an exception of one rank would
        leave vLLM with the answers of the others unread.

        Args:
            method: one of `METHODS`.
            args: its arguments.

        Returns:
            `{"value": ...}`, or `{"error": [kind, message]}`.
        """
        try:
            if method not in METHODS:
                raise LookupError(f"there is no method {method!r}; there are {', '.join(METHODS)}")
            value = getattr(self.hotgraft_rank, method)(*args)
        except Exception as error:
            return {"error": [type(error).__name__, str(error)]}
        return {"value": dataclasses.asdict(value) if isinstance(value, Prepared) else value}

    @property
    def hotgraft_rank(self) -> Rank:
        """The worker's model with a host, made when it is first asked for. Raises as `rank_of`."""
        worker: Any = self
        return rank_of(worker.get_model(), worker.vllm_config)


class SkillWorker(SkillSteps, Worker, Grafts):  # type: ignore[misc]
    """A worker that puts in the skill that the scheduler chose for a step."""

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """Load the model, and compare it with its checkpoint, tensor by tensor."""
        super().load_model(*args, **kwargs)
        config = self.vllm_config.model_config
        if config.enforce_eager:  # a compiled graph cannot hold packed ones
            pack(self.get_model(), head=config.head_dtype == config.dtype)
        rank_of(self.get_model(), self.vllm_config)
        refuse_loading(self.get_model())

    def reload_weights(self, *args: Any, **kwargs: Any) -> None:
        """As vLLM's; a LayoutError before it begins, where weights are packed."""
        if is_packed(self.get_model()):
            refuse()
        super().reload_weights(*args, **kwargs)

    def start_weight_update(self) -> None:
        """As vLLM's; a LayoutError before it begins, where weights are packed and would be written
        by another backend than hotgraft's.
        """
        transfer = self.vllm_config.weight_transfer_config
        if is_packed(self.get_model()) and getattr(transfer, "backend", None) != BACKEND:
            refuse()
        super().start_weight_update()

    @property
    def hotgraft_live(self) -> str | None:
        """What is live, as steps name it; of a set that no step names, all names in one."""
        return "+".join(self.hotgraft_rank.host.active) or None

    @hotgraft_live.setter
    def hotgraft_live(self, _: str | None) -> None:
        """The host knows: a call may have changed it since the last step."""

    def hotgraft_switch(self, skill: str | None) -> None:
        """Put in this skill's weights, and take out those of the live one."""
        self.hotgraft_rank.activate((skill,) if skill else (), "refuse", None)


def rank_of(model: Any, config: Any) -> Rank:
    """The host of a model that vLLM has loaded; one for each model.

    Args:
        model: the worker's.
        config: vLLM's, which names the checkpoint.

    Raises:
        LayoutError: its weights are packed, its loader cannot be traced, or there is no checkpoint.
    """
    rank: Rank | None = vars(model).get("_hotgraft_rank")  # there, so that both go together
    if rank is None:
        packed = packed_layers(model)
        if packed:
            raise LayoutError(
                f"vLLM packed the weights of {sample(packed)}, so there is nothing to put a graft "
                "into. Start it with worker_cls or worker_extension_cls from "
                "hotgraft.serve.vllm.worker, which keeps them as they are"
            )
        with (
            open_weights(checkpoint_of(config.model_config)) as weights,
            set_current_vllm_config(config),
        ):
            rank = vars(model)["_hotgraft_rank"] = Rank(model, model.load_weights, weights)
    return rank


def checkpoint_of(config: Any) -> Path:
    """The folder that a model was loaded from, by vLLM's configuration of it.

    Raises:
        LayoutError: it has no folder with safetensors files here.
    """
    name, revision = config.model_weights or config.model, config.revision
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, local_files_only=True))
    except (OSError, ValueError) as error:
        raise LayoutError(f"the checkpoint {name!r} is not a folder here: {error}") from error


def connect(engine: Any) -> Ranks:
    """The ranks of a vLLM engine.

    Args:
        engine: what has a `collective_rpc(method, args=...)`: an `LLM`, an engine or an executor.
    """

    def call(method: str, args: tuple[Any, ...]) -> list[Any]:
        return [
            _unpacked(found) for found in engine.collective_rpc("hotgraft", args=(method, args))
        ]

    return Ranks(call)


def _unpacked(answer: dict[str, Any]) -> Any:
    if "error" in answer:
        return error_of(*answer["error"])
    value = answer["value"]
    return Prepared(**value) if isinstance(value, dict) else value
