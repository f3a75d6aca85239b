"""The Python code in the documentation runs, each page from its first line to its last."""

import re
from pathlib import Path

import pytest
import torch
import transformers
import typer
from tiny_tasks import save_byte_model

import sapt_fast
from sapt_fast import dispatch, ops
from sapt_fast.cli import app
from sapt_fast.continual.settings import ContinualSettings
from sapt_fast.pools.experts import ExpertBank
from sapt_fast.pools.row_optimizers import RowAdam

DOCS = Path(__file__).parents[1] / "docs"
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
PAGES = (
    "start/quickstart.md",
    "methods/sapt.md",
    "methods/sapt-prompt.md",
    "methods/peft.md",
)
VARIABLES = re.compile(r"SAPT_FAST_[A-Z_]+")


@pytest.fixture
def page(tmp_path, monkeypatch):
    """Runs a page's code on a tiny model in the place of any that it loads by name."""
    save_byte_model(tmp_path / "model")
    for name in ("AutoModelForSeq2SeqLM", "AutoTokenizer"):
        auto = getattr(transformers, name)
        load = auto.from_pretrained
        monkeypatch.setattr(auto, "from_pretrained", lambda _, load=load: load(tmp_path / "model"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")

    def run(name):
        namespace = {}
        code = "\n".join(BLOCK.findall((DOCS / name).read_text()))
        exec(compile(code, name, "exec"), namespace)
        return namespace

    return run


@pytest.mark.parametrize("name", PAGES)
def test_the_code_of_a_page_runs(page, name):
    left = page(name)
    assert left["answers"].shape[0] == 2
    assert left["model"].sapt.tasks == ["reviews", "plurals"]


@pytest.mark.parametrize(
    "name",
    [
        "methods/l2p.md",
        "methods/prefix_prompts.md",
        "methods/others.md",
        "methods/gated.md",
        "methods/editing.md",
        "concepts/methods.md",
        "deploy/points.md",
        "train/editing.md",
    ],
)
def test_the_code_of_a_methods_page_runs(page, name):
    assert "model" in page(name)


def test_the_code_on_indexes_runs(page):
    left = page("concepts/indexes.md")
    assert (left["rows"] == -1).sum(1).tolist() == [1, 1]


def test_the_figures_on_banks_are_those_of_the_pages_code(page):
    left = page("deploy/memory_experts.md")
    lines = (DOCS / "deploy" / "memory_experts.md").read_text().splitlines()
    assert sorted(left["table"]) == sorted(x for x in lines if x.startswith(("| 8 |", "| 64 |")))
    bank = ExpertBank(1000, 1, 16, 16, dtype=torch.bfloat16)
    optimizer, ids = RowAdam(bank), torch.arange(64) * 999 // 63  # some on every page of a map
    optimizer.step(ids, bank.rows(ids))
    stored = left["stored"](1, 1000, 64, 1, 16)
    ends = 2 * 256  # each map has one more page
    assert bank.nbytes + optimizer.state_bytes - ends == sum(stored.values()) - stored["keys"]


def test_the_reference_has_every_public_name():
    text = "\n".join(path.read_text() for path in (DOCS / "api").glob("*.md"))
    named = {line.rpartition(".")[2] for line in text.splitlines() if line.startswith("::: ")}
    assert {*sapt_fast.__all__, *ops.__all__} - {"__version__"} <= named


def test_the_page_on_kernels_names_every_op_and_backend():
    text = (DOCS / "reference" / "kernels.md").read_text()
    for name in (*dispatch.ops(), *dispatch.BACKENDS):
        assert f"`{name}`" in text


def test_the_page_on_variables_names_every_variable():
    text = (DOCS / "reference" / "variables.md").read_text()
    sources = Path(sapt_fast.__file__).parent.rglob("*.py")
    variables = {name for path in sources for name in VARIABLES.findall(path.read_text())}
    for name in (*variables, *dispatch.BACKENDS):
        assert f"`{name}`" in text


def test_the_page_on_the_command_line_names_every_command():
    text = (DOCS / "reference" / "cli.md").read_text()
    for name in typer.main.get_command(app).commands:
        assert f"`sapt-fast {name}`" in text


def test_every_option_that_the_pages_give_to_a_command_exists():
    commands = typer.main.get_command(app).commands
    for page in sorted(DOCS.rglob("*.md")):
        text = page.read_text().replace("\\\n", " ")
        for name, rest in re.findall(r"^sapt-fast ([\w-]+)(.*)$", text, re.MULTILINE):
            options = [[*p.opts, *p.secondary_opts] for p in commands[name].params]
            known = {"--help", *(option for names in options for option in names)}
            given = set(re.findall(r" (--[a-z0-9-]+)", rest.partition("#")[0]))
            assert given <= known, f"{page.name}: sapt-fast {name} has no {sorted(given - known)}"


def test_the_tables_of_original_flags_names_options_and_settings_that_exist():
    page = (DOCS / "train" / "original.md").read_text()
    rows = page.partition("## Flags")[2].partition("## Quirks")[0]
    cells = [line.split("|") for line in rows.splitlines() if line.startswith("| `--")]
    train = typer.main.get_command(app).commands["train"]
    known = {option for parameter in train.params for option in parameter.opts}
    assert len(cells) > 25
    for _, original, ours, python, _ in cells:
        assert set(re.findall(r"`(--[a-z0-9-]+)", ours)) <= known, original
        fields = set(re.findall(r"`[A-Za-z]*\.([a-z_]+)`", python))
        assert fields <= {*ContinualSettings.names(), "model", "max_train", "max_eval"}, original
