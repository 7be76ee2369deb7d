"""Live weights: what vLLM computes with, and not a packed copy of it.

On a GPU dense layers compute with their parameters. On a CPU vLLM packs the weights of a layer when
it is loaded and drops the originals, so there is nothing that a graft could be put into.
`keep_weights_live` makes it compute with the parameters there too; importing
`hotgraft.serve.vllm.worker` calls it, which happens in each worker before it loads a model.
"""

from __future__ import annotations

from typing import Any

import torch

LINEAR = torch.nn.functional.linear


def keep_weights_live() -> None:
    """Let CPU layers that are loaded from now on keep their weights, and compute with them.

    Does nothing on other platforms.
    """
    from vllm.model_executor.layers import utils
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        utils.dispatch_cpu_unquantized_gemm = _keep


def _keep(layer: Any, remove_weight: bool) -> None:  # noqa: ARG001 - vLLM's signature
    layer.cpu_linear = LINEAR


def packed_layers(model: torch.nn.Module) -> list[str]:
    """The names of layers whose weights were packed: they compute with a copy of their own.

    Args:
        model: a model that vLLM has loaded.
    """
    return [
        name
        for name, layer in model.named_modules()
        if "cpu_linear" in vars(layer) and layer.cpu_linear is not LINEAR
    ]
