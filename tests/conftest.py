"""Settings of all tests: hypothesis draws the same examples every time; nothing goes to a hub."""

import os

from hypothesis import settings

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
settings.register_profile("ci", derandomize=True, deadline=None, database=None)
settings.load_profile("ci")
