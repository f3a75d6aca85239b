"""Plans repeat the launches of an ordinary call; see `plan_cases` for what is compared."""

from pathlib import Path

import pytest
from uninterpreted import printed

pytest.importorskip("triton")


def test_a_plan_launches_what_an_ordinary_call_launches() -> None:
    lines = printed(str(Path(__file__).with_name("plan_cases.py"))).splitlines()
    assert len(lines) >= 36
    assert all(line.endswith(" ok") for line in lines)
