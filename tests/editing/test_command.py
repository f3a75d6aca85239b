"""`sapt-fast edit` from its help to its report, on the packaged demo model."""

import json
import sys

import pytest
from tiny_models import tiny
from typer.testing import CliRunner

from sapt_fast import cli
from sapt_fast.commands.edit import edit_command
from sapt_fast.editing.editors.registry import EDITORS, editor_type


def written(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def fails(capsys, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["sapt-fast", "edit", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error


def test_the_help_has_every_option_of_every_method():
    names = {p.name for p in cli.typer.main.get_command(cli.app).commands["edit"].params}
    for method in EDITORS:
        assert set(editor_type(method).Options.__dataclass_fields__) <= names
    assert edit_command.__doc__


def test_text_on_the_demo(tmp_path):
    edits = written(
        tmp_path / "edits.jsonl",
        {"prompt": "COPY:abcd", "target": "xyz", "locality": ["COPY:dog"]},
        {"prompt": "COPY:efgh", "target": "uvw", "paraphrases": ["COPY:hgfe"]},
    )
    upstream = written(tmp_path / "upstream.jsonl", {"prompt": "SORT:bca"})
    output = tmp_path / "run"
    common = (
        "edit", "--model", "demo", "--edits", edits, "--upstream", upstream, "--output",
        str(output), "--radius", "0.5", "--answer-tokens", "6", "--device", "cpu",
    )  # fmt: skip
    result = CliRunner().invoke(cli.app, common, catch_exceptions=False)
    assert result.exit_code == 0
    assert "grace after 2 edits" in result.output
    report = json.loads((output / "report.json").read_text())
    assert report["options"]["radius"] == 0.5
    assert report["points"][-1]["generated"] == {
        "success": 1.0, "retention": 1.0, "upstream": 1.0, "paraphrase": 0.0, "locality": 1.0,
    }  # fmt: skip
    assert report["source"]["model"] == "demo"


def test_token_ids_without_a_tokenizer(tmp_path):
    tiny("bert").save_pretrained(tmp_path / "model")
    edits = written(tmp_path / "edits.jsonl", {"prompt": [5, 6, 7], "target": 3})
    arguments = (
        "edit", "--model", str(tmp_path / "model"), "--edits", edits, "--method", "ft",
        "--lr", "0.01", "--target-modules", "classifier", "--output", str(tmp_path / "run"),
        "--no-progress", "--device", "cpu",
    )  # fmt: skip
    result = CliRunner().invoke(cli.app, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    assert "100.0 %" in result.output


def test_errors_are_one_line(tmp_path, capsys, monkeypatch):
    good = {"prompt": "abc", "target": "xyz"}
    edits = written(tmp_path / "edits.jsonl", good)
    bad = written(tmp_path / "bad.jsonl", good, {"prompt": "abc"})
    common = ("--model", "demo", "--output", str(tmp_path / "run"), "--device", "cpu")
    for arguments, message in (
        (("--edits", bad), "bad.jsonl, line 2: got no 'target'"),
        (("--edits", str(tmp_path / "none.jsonl")), "none.jsonl is missing"),
        (("--edits", edits, "--upstream", bad), "bad.jsonl, line 2"),
        (("--edits", edits, "--method", "magic"), "method: got 'magic'"),
        (("--edits", edits, "--method", "ft", "--ratio", "0.5"), "ratio: method 'ft' has no such"),
        (("--edits", edits, "--batch", "0"), "batch: got 0"),
        (("--edits", edits, "--chat"), "chat: the tokenizer has no chat template"),
        (("--edits", edits, "--text", edits), "not decoder-only"),
        (("--edits", edits, "--target-modules", "none"), "matches no module"),
        (("--edits", edits, "--dtype", "int8"), "dtype: got 'int8'"),
        (("--edits", edits, "--keys", "function"), "keys: got 'function', expected --encoder"),
        (("--edits", edits, "--encoder-pattern", "x"), "encoder_pattern: expected --encoder"),
        (("--edits", edits, "--encoder", str(tmp_path / "none")), "encoder: got"),
        (
            ("--edits", edits, "--method", "ft", "--encoder", str(tmp_path)),
            "keys: method 'ft' has no such option",
        ),
    ):
        if "bad.jsonl" in " ".join(arguments) and "--upstream" in arguments:
            arguments = (*arguments[:2], "--upstream", written(tmp_path / "bad.jsonl", good, 5))
        assert message in fails(capsys, monkeypatch, *common, *arguments)
    assert not (tmp_path / "run").exists()
