"""Everything here needs the compiled kernels; where they are absent the tests are skipped with the reason."""

from __future__ import annotations

import pytest

from secateur.runtime import native


@pytest.fixture(autouse=True)
def _kernels():
    if reason := native.missing():
        pytest.skip(reason)
