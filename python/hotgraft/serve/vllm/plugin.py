"""Plugin: what vLLM is told of hotgraft when it starts (entry point `vllm.general_plugins`)."""

from __future__ import annotations

BACKEND = "hotgraft"


def register() -> None:
    """Make the weight-transfer backend known; nothing of it is imported before it is asked for.

    vLLM calls this in each of its processes, perhaps more than once.
    """
    from vllm.distributed.weight_transfer import WeightTransferEngineFactory as Factory

    if BACKEND not in Factory._registry:
        Factory.register_engine(BACKEND, "hotgraft.serve.vllm.transfer", "GraftTransfer")
