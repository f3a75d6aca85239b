"""float32 products are compared in full, whatever the machine's image sets."""

import checks
import pytest


@pytest.fixture(autouse=True)
def full_float32():
    with checks.without_tf32():
        yield
