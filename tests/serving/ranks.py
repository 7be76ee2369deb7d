"""A vLLM model in each of some processes, loaded as vLLM loads it, without an engine around it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp


def run(work: Callable[..., None], folder: Path, ranks: int, *args: Any) -> None:
    """Call `work(rank, ranks, folder, *args)` in as many processes; raises if one does."""
    os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
    mp.spawn(_start, (work, folder, ranks, *args), nprocs=ranks)


def _start(rank: int, work: Callable[..., None], folder: Path, ranks: int, *args: Any) -> None:
    torch.set_num_threads(1)
    work(rank, ranks, folder, *args)


@contextmanager
def vllm_model(checkpoint: Path, rank: int, ranks: int, meeting: Path) -> Iterator[torch.nn.Module]:
    """A rank's part of a model, loaded and processed."""
    from vllm.config import set_current_vllm_config
    from vllm.distributed.parallel_state import (
        destroy_distributed_environment,
        destroy_model_parallel,
        ensure_model_parallel_initialized,
        init_distributed_environment,
    )
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader import get_model

    # As vLLM's CPU worker does.
    torch.accelerator.empty_cache = lambda: None
    os.environ["VLLM_DIST_IDENT"] = meeting.name
    config = EngineArgs(
        model=str(checkpoint),
        skip_tokenizer_init=True,
        enforce_eager=True,
        dtype="bfloat16",
        max_model_len=64,
        tensor_parallel_size=ranks,
        distributed_executor_backend="mp" if ranks > 1 else None,
    ).create_engine_config()
    with set_current_vllm_config(config):
        init_distributed_environment(ranks, rank, f"file://{meeting}", rank, "gloo")
        ensure_model_parallel_initialized(ranks, 1)
        try:
            yield get_model(vllm_config=config)
        finally:
            destroy_model_parallel()
            destroy_distributed_environment()
