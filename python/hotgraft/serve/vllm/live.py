"""Live weights: what vLLM computes with, and not a packed copy of it.

On a GPU dense layers compute with their parameters. On a CPU vLLM packs the weights of a layer when
it is loaded and drops the originals, so there is nothing that a graft could be put into.
`keep_weights_live` makes it compute with the parameters there too; importing
`hotgraft.serve.vllm.worker` calls it, which happens in each worker before it loads a model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

PRODUCT: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
"""oneDNN's product of one matrix and another's transpose, where torch is built with it."""

EXCHANGED = {torch.bfloat16: range(1, 2), torch.float32: range(4, 1 << 30)}
"""The numbers of rows for which `linear` exchanges the two sides, by data type."""


def keep_weights_live() -> None:
    """Let CPU layers that are loaded from now on keep their weights, and compute with them.

    Does nothing on other platforms.
    """
    from vllm.model_executor.layers import utils
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        utils.dispatch_cpu_unquantized_gemm = _keep


def _keep(layer: Any, remove_weight: bool) -> None:  # noqa: ARG001 - vLLM's signature
    layer.cpu_linear = linear


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`torch.nn.functional.linear`, by the faster of two ways that read the weights in place.

    For some numbers of rows torch's own way rearranges the weights in each call. oneDNN's product
    of weights and rows, instead of rows and weights, takes the weights as they lie and rearranges
    the rows. `bench/serving/overhead.py` measures both beside vLLM's packed weights.
    """
    rows = x.numel() // weight.shape[1]
    exchange = PRODUCT is not None and rows in EXCHANGED.get(weight.dtype, ())
    if not exchange or torch.compiler.is_compiling():
        return functional.linear(x, weight, bias)
    flat = x.reshape(rows, -1).contiguous()
    out = PRODUCT(weight, flat, None, "none", [], "").t()
    out = out.contiguous() if bias is None else torch.add(out, bias).contiguous()
    return out.view(*x.shape[:-1], -1)


def packed_layers(model: torch.nn.Module) -> list[str]:
    """The names of layers whose weights were packed: they compute with a copy of their own.

    Args:
        model: a model that vLLM has loaded.
    """
    return [
        name
        for name, layer in model.named_modules()
        if "cpu_linear" in vars(layer) and layer.cpu_linear not in (linear, functional.linear)
    ]
