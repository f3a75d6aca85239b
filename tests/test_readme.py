"""README.md: its figures are those of recorded results, its code runs, its wording is shared."""

import re
from pathlib import Path

import figures
import pytest
import torch
from tiny_models import tiny

BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
TAGLINE = (
    "sapt_fast runs a whole pool of LoRA adapters in one pass. "
    "Each input gets its own weighted mixture"
)


@pytest.mark.parametrize(
    ("page", "labels"), [(figures.README, figures.HIGHLIGHTS), (figures.SPEED, None)]
)
def test_the_tables_are_drawn_from_the_files_they_name(page: Path, labels: dict[str, str] | None):
    text = page.read_text()
    assert figures.rendered(text, labels) == text


def test_a_given_file_replaces_the_first_table_alone():
    page = figures.SPEED.read_text()
    first, second = (Path(match.group(2)) for match in figures.BLOCK.finditer(page))
    drawn = figures.rendered(page, path=second)
    assert [Path(match.group(2)) for match in figures.BLOCK.finditer(drawn)] == [second, second]
    assert figures.rendered(drawn, path=first) == page


def test_a_page_without_markers_raises():
    with pytest.raises(ValueError, match="page: got no results markers"):
        figures.rendered("no table")


def test_the_code_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    namespace = {
        "model": tiny("t5"),
        "base": tiny("t5"),
        "inputs": {"input_ids": torch.tensor([[4, 5, 6], [9, 8, 7]])},
        "weights": torch.tensor([[1.0, 0.0], [0.3, 0.7]]),
    }
    namespace["inputs"]["decoder_input_ids"] = torch.tensor([[0], [0]])
    quickstart, pools = BLOCK.findall(figures.README.read_text())
    exec(compile(quickstart, "README.md", "exec"), namespace)
    assert namespace["model"].sapt.attention.shape == (2, 2)
    exec(compile(pools, "README.md", "exec"), namespace)
    assert namespace["model"].sapt.tasks == ["reviews", "plurals"]


@pytest.mark.parametrize(
    "name", ["README.md", "docs/index.md", "mkdocs.yml", "pyproject.toml", "sapt_fast/__init__.py"]
)
def test_one_wording_says_what_the_package_is(name: str):
    assert TAGLINE in " ".join((figures.ROOT / name).read_text().split())


@pytest.mark.parametrize(
    "name", ["README.md", "CHANGELOG.md", "examples/README.md", "recipes/README.md"]
)
def test_the_links_lead_to_files(name: str):
    page = figures.ROOT / name
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text())
    assert all("://" in link or (page.parent / link).exists() for link in links)


def test_the_first_screens_stay_short():
    assert len(figures.README.read_text().splitlines()) <= 150
