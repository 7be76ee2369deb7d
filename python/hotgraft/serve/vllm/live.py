"""Live weights: what vLLM computes with, and not a packed copy of it.

On a GPU dense layers compute with their parameters. On a CPU vLLM packs the weights of a layer when
it is loaded and drops the originals, so there is nothing that a graft could be put into.
`keep_weights_live` makes it compute with the parameters there too; importing
`hotgraft.serve.vllm.worker` calls it, which happens in each worker before it loads a model.

Packed weights are faster where few rows meet many weights. `pack` keeps that: it lets oneDNN pack a
layer's weights into memory that then is the parameter's, and the parameter's `Order` says which
element lies where.
"""

from __future__ import annotations

import collections
import ctypes
import functools
from typing import Any, NoReturn

import numpy as np
import torch
from torch.nn import functional

from hotgraft.errors import LayoutError
from hotgraft.placement import Order

MKLDNN: Any = torch.ops.mkldnn
DTYPES = (torch.float32, torch.bfloat16)
ROWS = 16
"""How many rows oneDNN is told to pack for. Any number can be multiplied then."""

_BASE = 255  # digits of numbers that all data types can tell apart


class Packed:
    """The product with a matrix that oneDNN has packed; make one with `of`."""

    def __init__(self, weight: torch.Tensor, order: Order) -> None:
        self._matrix, self.memory = _packed(weight)
        """What it computes with: writing into the memory changes the matrix."""
        self.order = order

    @classmethod
    def of(cls, weight: torch.Tensor) -> Packed | None:
        """Pack a copy of a matrix; None where oneDNN is not there, or leaves gaps in its memory.

        Args:
            weight: float32 or bfloat16[outputs, inputs].
        """
        if weight.ndim != 2 or weight.dtype not in DTYPES or not _can_pack():
            return None
        order = _order(*weight.shape, weight.dtype)
        found = None if order is None else cls(weight, order)
        if found is None or not torch.equal(
            _bytes(found.order.plain(found.memory)), _bytes(weight)
        ):
            return None
        return found

    def __reduce__(self) -> NoReturn:
        raise LayoutError(
            "a model with packed weights can be neither copied nor pickled; copy its state_dict(), "
            "which has the weights as they were loaded"
        )

    def __call__(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,  # noqa: ARG002 - vLLM's signature; it is the packed one
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        """As `torch.nn.functional.linear`."""
        found: torch.Tensor = MKLDNN._linear_pointwise(x, self._matrix, bias, "none", [], "")
        return found


def keep_weights_live() -> None:
    """Let CPU layers that are loaded from now on keep their weights, and compute with them.

    Does nothing on other platforms.
    """
    from vllm.model_executor.layers import utils
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        utils.dispatch_cpu_unquantized_gemm = _keep


def pack(model: torch.nn.Module, *, head: bool = True) -> None:
    """Let layers that compute with their own weights on a CPU have them packed, and still live.

    Nothing that does not know of their order may write into them: `load_weights` of this model is
    an error from then on, once it has been traced (`refuse_loading`). `state_dict()` has the
    weights as they were loaded.

    Args:
        model: what vLLM has loaded under `keep_weights_live`.
        head: whether the head is packed too; vLLM reads one of another data type by itself.
    """
    from vllm.model_executor.layers.linear import ColumnParallelLinear, RowParallelLinear
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    # Of these the product alone reads the weights, where they are not tied to an embedding.
    kinds = (ColumnParallelLinear, RowParallelLinear, *([ParallelLMHead] if head else []))
    users = collections.Counter(id(p) for m in model.modules() for p in m._parameters.values())
    for layer in model.modules():
        if isinstance(layer, kinds) and users[id(getattr(layer, "weight", None))] == 1:
            _pack(layer)


def is_packed(model: torch.nn.Module) -> bool:
    """Whether a parameter of a model is in another order than its checkpoint's."""
    return any(Order.of(parameter) is not None for parameter in model.parameters())


def refuse_loading(model: torch.nn.Module) -> None:
    """Let a model with packed weights be loaded no more: its loader knows nothing of their order.

    Args:
        model: what `load_weights` shall be an error of, if it has packed weights.
    """

    if is_packed(model):
        vars(model)["load_weights"] = refuse


def refuse(*_: Any, **__: Any) -> NoReturn:
    """Raises `LayoutError`: weights are packed, and somebody wants to write them in place."""
    raise LayoutError(
        "the weights of this model are packed, so vLLM's loader cannot write them in place; "
        "load grafts, or start vLLM with worker_extension_cls="
        "'hotgraft.serve.vllm.worker.Grafts', which leaves them as they are"
    )


def _keep(layer: Any, remove_weight: bool) -> None:  # noqa: ARG001 - vLLM's signature
    layer.cpu_linear = functional.linear


def _pack(layer: Any) -> None:
    weight, product = layer.weight, vars(layer).get("cpu_linear")
    absorbed = getattr(layer, "_cpu_skip_gemm_dispatch", False)  # vLLM reads these elsewhere
    if product is not functional.linear or absorbed or weight.is_meta:
        return
    packed = Packed.of(weight.detach())
    if packed is not None:
        weight.data = packed.memory.view(weight.shape)
        packed.order.put_on(weight)
        layer.cpu_linear = packed
        layer.register_state_dict_post_hook(_say_as_loaded)


def _say_as_loaded(
    layer: torch.nn.Module,
    state: dict[str, Any],
    prefix: str,
    _: Any,
) -> None:
    weight = layer.weight
    assert isinstance(weight, torch.Tensor)
    order = Order.of(weight)
    if order is not None and f"{prefix}weight" in state:
        state[f"{prefix}weight"] = order.plain(weight)


def _can_pack() -> bool:
    return hasattr(MKLDNN, "_reorder_linear_weight")  # not in every build of torch


@functools.lru_cache
def _order(rows: int, columns: int, dtype: torch.dtype) -> Order | None:
    """How oneDNN packs such matrices; None where it leaves gaps."""
    down = _places(torch.arange(rows)[:, None], (rows, columns), dtype)
    along = _places(torch.arange(columns)[None], (rows, columns), dtype)
    if down is None or along is None:
        return None
    return Order(down, along - along[0])


def _places(numbers: torch.Tensor, shape: tuple[int, int], dtype: torch.dtype) -> Any:
    """Where the numbered elements of a matrix end when it is packed."""
    count = numbers.numel()
    found = np.zeros(count, np.int64)
    at = np.zeros(0, np.int64)
    digit = 1
    while digit == 1 or digit < count:
        marks = torch.zeros(shape, dtype=dtype)
        marks[: numbers.shape[0], : numbers.shape[1]] = numbers // digit % _BASE + 1
        _, memory = _packed(marks)
        at = memory.nonzero().flatten().numpy()
        if memory.numel() != marks.numel() or len(at) != count:
            return None
        found += (memory[at].float().numpy().astype(np.int64) - 1) * digit
        digit *= _BASE
    places = np.zeros(count, np.int64)
    places[found] = at
    return places


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().view(torch.uint8)


def _packed(weight: torch.Tensor) -> tuple[Any, torch.Tensor]:
    """A matrix of oneDNN's, and its elements in the order of its memory, which they keep alive."""
    matrix: Any = MKLDNN._reorder_linear_weight(weight, ROWS)
    size = int(MKLDNN._nbytes(matrix))

    class Memory(ctypes.c_uint8 * size):  # type: ignore[misc]
        pass

    memory: Any = Memory.from_address(MKLDNN.data_ptr(matrix))
    memory.matrix = matrix
    return matrix, torch.frombuffer(memory, dtype=weight.dtype)


def packed_layers(model: torch.nn.Module) -> list[str]:
    """The names of layers that compute with a packed copy of their own, not their parameters.

    Args:
        model: a model that vLLM has loaded.
    """
    return [
        name
        for name, layer in model.named_modules()
        if "cpu_linear" in vars(layer)
        and layer.cpu_linear is not functional.linear
        and not _computes_with(layer.cpu_linear, layer.weight)
    ]


def _computes_with(product: Any, weight: torch.Tensor) -> bool:
    """Whether the memory that is multiplied with is the parameter's."""
    return isinstance(product, Packed) and product.memory.data_ptr() == weight.data_ptr()
