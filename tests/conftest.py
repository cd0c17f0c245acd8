"""Settings shared by all tests: one thread (results repeat bit for bit at one thread count) and a fixed seed."""

from __future__ import annotations

import signal

import pytest
import torch
from hypothesis import HealthCheck, settings

settings.register_profile("secateur", deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
settings.load_profile("secateur")
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts what runs in the background deaf to Ctrl-C


@pytest.fixture(autouse=True)
def _same_seed_and_threads():
    torch.set_num_threads(1)
    torch.manual_seed(0)
