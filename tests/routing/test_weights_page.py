"""The page on how weights reach the layers names, for every mode, tests that exist."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "concepts" / "weights.md"
MODES = {
    "greedy search",
    "sampling",
    "beams",
    "returned sequences",
    "assisted decoding",
    "chunked prefill",
    "static cache",
    "no cache",
    "encoder outputs given",
    "gradient checkpointing",
    "packed rows",
}
TABLE = """
| mode | how its weights travel | test |
|---|---|---|
"""


def named_tests(page: str) -> dict[str, list[str]]:
    """By mode, what the last column of its row names as file::test."""
    table = page.partition(TABLE)[2].partition("\n\n")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    return {mode: re.findall(r"`([^`]+)`", tests) for mode, _, tests in rows}


def missing(page: str) -> list[str]:
    """Modes without a row or a test, and tests that do not exist."""
    named = named_tests(page)
    absent = [mode for mode in MODES | set(named) if not named.get(mode)]
    return absent + [test for tests in named.values() for test in tests if not exists(test)]


def exists(test: str) -> bool:
    path, _, function = test.partition("::")
    if not (ROOT / path).is_file():
        return False
    body = ast.parse((ROOT / path).read_text()).body
    return any(isinstance(node, ast.FunctionDef) and node.name == function for node in body)


def test_every_mode_has_tests_that_exist():
    assert missing(PAGE.read_text()) == []


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("::test_chunked_prefill`", "::test_chunked`"),
        ("`tests/routing/test_packed_rows.py::", "`tests/test_packed_rows.py::"),
        ("| beams |", "| rays |"),
        ("`tests/routing/test_generation.py::test_encoder_outputs_by_hand`", "none"),
        (TABLE, "\n"),
    ],
    ids=["no_such_test", "no_such_file", "no_row", "no_test", "no_table"],
)
def test_what_is_missing_is_noticed(old, new):
    page = PAGE.read_text()
    assert old in page
    assert missing(page.replace(old, new))
