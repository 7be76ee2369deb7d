"""Shared by every test: property-based ones are seeded and keep no database; a host to work on."""

from collections.abc import Iterator

import pytest
from hosts import Workshop
from hypothesis import HealthCheck, settings

settings.register_profile(
    "hotgraft",
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=60,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("hotgraft")


@pytest.fixture(params=["cpu", "reference"])
def shop(request: pytest.FixtureRequest) -> Iterator[Workshop]:
    """A host with skills, on each backend; it must hold the base's bits when the test is over."""
    made = Workshop(request.param)
    yield made
    made.host.detach(force=True)
    assert made.is_base()
