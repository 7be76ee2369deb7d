"""Orders: matrices that a server keeps in another order than their loader wrote them in."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from hotgraft.errors import LayoutError
from hotgraft.placement.memory import Offsets
from hotgraft.weights import sample

_ATTRIBUTE = "_hotgraft_order"
_ROWS = 1024  # at a time


class Order(NamedTuple):
    """Where the elements of a matrix lie: row i, column j at `rows[i] + columns[j]`.

    Whoever rearranges a parameter's elements says so by `put_on`; its shape stays, and coordinates
    of the loader are those of the matrix as it was.

    Example:
        >>> order = Order(np.array([0, 1]), np.array([0, 2, 4]))  # a transposed one
        >>> order.plain(torch.tensor([[1, 4, 2], [5, 3, 6]])).tolist()
        [[1, 2, 3], [4, 5, 6]]
        >>> order.positions(np.array([1, 3])).tolist()
        [2, 1]
    """

    rows: Offsets
    columns: Offsets

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Order | None:
        """The order of a parameter; None where it is as it was loaded."""
        return getattr(tensor, _ATTRIBUTE, None)

    def put_on(self, tensor: torch.Tensor) -> None:
        """Say that a parameter has this order, which goes with the object."""
        setattr(tensor, _ATTRIBUTE, self)

    def positions(self, offsets: Offsets) -> Offsets:
        """Where elements are, by their positions in C order in the matrix as it was."""
        row, column = np.divmod(offsets, len(self.columns))
        found: Offsets = self.rows[row] + self.columns[column]
        return found

    def plain(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy of the parameter as it was loaded."""
        flat = tensor.detach().reshape(-1)
        rows, columns = torch.from_numpy(self.rows), torch.from_numpy(self.columns)
        found = flat.new_empty(len(rows), len(columns))
        for at in range(0, len(rows), _ROWS):
            part = slice(at, at + _ROWS)
            found[part] = flat[rows[part, None] + columns]
        return found


def refuse_rearranged(model: torch.nn.Module) -> None:
    """Raises `LayoutError` for a model some of whose parameters have an `Order`."""
    rearranged = [name for name, p in model.named_parameters() if Order.of(p) is not None]
    if rearranged:
        raise LayoutError(
            f"the elements of {sample(rearranged)} are in another order than the checkpoint's "
            "(packed for a CPU), so a graft would hit others; load grafts by the server's own calls"
        )
