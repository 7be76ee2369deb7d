"""Settings shared by every test: property-based tests are seeded and keep no database."""

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
