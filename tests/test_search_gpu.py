"""Searching on a GPU: gates are written and slopes are read there, and the base comes back."""

from __future__ import annotations

import pytest
import torch
from hosts import contents, holds
from hotgraft import diff, localize
from hotgraft.search.candidates import Candidates
from searching import QUICK, SEARCHES, batches, loss, pair

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("one_thread")]


def on_gpu(batch: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    return batch[0].cuda(), batch[1].cuda()


def test_slopes_are_those_of_the_cpu() -> None:
    model, base, tuned, _ = pair()
    pool = diff(base, tuned)
    with Candidates(model, pool) as here:
        here.write(torch.full((here.count,), 0.5))
        here.differentiate(loss, batches(1)[0], "one batch")
    model.cuda()
    with Candidates(model, pool) as there:
        there.write(torch.full((there.count,), 0.5))
        there.differentiate(loss, on_gpu(batches(1)[0]), "one batch")
        soft = {name: tensor.cpu() for name, tensor in contents(model).items()}
    torch.testing.assert_close(there.slopes, here.slopes)
    middle = {name: (base[name] + tuned[name]) / 2 for name in base}
    for name, tensor in soft.items():
        torch.testing.assert_close(tensor, middle[name])
    assert holds(model.cpu(), base)


@pytest.mark.parametrize("name", SEARCHES)
def test_every_search_gives_the_base_back(name: str) -> None:
    model, base, tuned, _ = pair()
    model.cuda()
    data = [on_gpu(batch) for batch in batches(4)]
    graft = localize(model, tuned, loss, data, count=9, scope="all", method=QUICK[name])
    assert graft.nnz == 9
    assert holds(model.cpu(), base)
