"""Shared by every test: property-based ones are seeded and keep no database; a host to work on."""

import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from hosts import Workshop, holds
from hypothesis import HealthCheck, settings
from libraries import Place

# These need vLLM, which has an environment of its own: pinned to other versions than ours.
collect_ignore = [] if find_spec("vllm") else ["serving"]

settings.register_profile(
    "hotgraft",
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=60,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("hotgraft")


def pytest_configure(config: pytest.Config) -> None:
    """Triton's kernels are compiled by the tests that need a GPU and interpreted by the others.

    It is settled when they are imported, which no test module has done yet.
    """
    wanted = config.option.markexpr
    if "gpu" not in wanted or "not gpu" in wanted:
        os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For work so small that it only waits for other threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


WORKSHOPS = [
    pytest.param(("cpu", "cpu"), id="cpu"),
    pytest.param(("reference", "cpu"), id="reference"),
    pytest.param(("triton", "cpu"), id="triton-interpreted"),
    pytest.param(("cuda", "cuda"), id="cuda", marks=pytest.mark.gpu),
    pytest.param(("triton", "cuda"), id="triton", marks=pytest.mark.gpu),
]


@pytest.fixture(params=WORKSHOPS)
def shop(request: pytest.FixtureRequest) -> Iterator[Workshop]:
    """A host with skills, on each backend; it must hold the base's bits when the test is over."""
    backend, device = request.param
    made = Workshop(backend, device=device)
    yield made
    made.host.detach(force=True)
    assert made.is_base()


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    """A model that holds the base's bits again when the test is over, and a folder of skills."""
    made = Place(tmp_path)
    yield made
    made.host.detach(force=True)
    assert holds(made.model, made.base)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what wants a second GPU where there is none."""
    if torch.cuda.device_count() >= 2:
        return
    left_out = [item for item in items if item.get_closest_marker("two_gpus")]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]
