"""Settings of all tests: hypothesis draws the same examples every time and has no deadline."""

from hypothesis import settings

settings.register_profile("ci", derandomize=True, deadline=None, database=None)
settings.load_profile("ci")
