"""`sapt-fast edit` from its help to its report, on the packaged demo model."""

import json
import sys

import pytest
from tiny_models import tiny
from typer.testing import CliRunner

import sapt_fast
from sapt_fast import cli
from sapt_fast.commands.edit import edit_command
from sapt_fast.demo.backbone import load_backbone
from sapt_fast.demo.tasks import CharTokenizer
from sapt_fast.editing.data import Reader
from sapt_fast.editing.editors.registry import EDITORS, editor_type
from sapt_fast.methods.edits.projector import ProjectedKeys
from sapt_fast.sites.features import HiddenMean


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
        (("--edits", edits, "--encoder", str(tmp_path / "none")), "encoder: got"),
    ):
        if "bad.jsonl" in " ".join(arguments) and "--upstream" in arguments:
            arguments = (*arguments[:2], "--upstream", written(tmp_path / "bad.jsonl", good, 5))
        assert message in fails(capsys, monkeypatch, *common, *arguments)
    assert not (tmp_path / "run").exists()


def test_keys_from_a_file_of_groups(tmp_path):
    """A projection of the model's own low blocks finds the wordings that it was trained on."""
    edits = written(
        tmp_path / "edits.jsonl",
        {"prompt": "COPY:abcd", "target": "xyz", "locality": ["SORT:abcd"]},
        {"prompt": "COPY:efgh", "target": "uvw"},
    )
    groups = written(
        tmp_path / "groups.jsonl",
        {"same": ["COPY:abce", "COPY:ecba"], "others": ["SORT:abce"]},
        {"same": ["COPY:fghk", "COPY:khgf"], "others": ["SORT:fghk"]},
    )
    run = tmp_path / "run"
    arguments = [
        "edit", "--model", "demo", "--edits", edits, "--output", str(run), "--device", "cpu",
        "--key-groups", groups, "--key-width", "16", "--key-layer", "1", "--radius", "0.5",
        "--no-teacher-forcing", "--answer-tokens", "4",
    ]  # fmt: skip
    for _ in range(2):  # the second time, a finished run resumes, so the keys are the same
        result = CliRunner().invoke(cli.app, arguments, catch_exceptions=False)
        assert result.exit_code == 0
    report = json.loads((run / "report.json").read_text())
    assert report["options"]["keys"] == "function"
    last = report["points"][-1]["generated"]
    assert (last["retention"], last["locality"]) == (1.0, 1.0)

    model = load_backbone()
    sapt_fast.load_pretrained(model, run / "saved" / "edited")
    keys = ProjectedKeys(HiddenMean(model, layer=1), width=16).load(run / "keys.safetensors")
    model.grace.look_up_by(keys)
    tokens = Reader(model, CharTokenizer()).probes(["COPY:dcba"])[0].prompt
    assert model.grace.which(tokens).edit == 0


def test_bad_keys_change_nothing(tmp_path, capsys, monkeypatch):
    edits = written(tmp_path / "edits.jsonl", {"prompt": "abc", "target": "xyz"})
    prompts = written(tmp_path / "prompts.jsonl", {"prompt": "abd"}, {"prompt": "bcd"})
    groups = written(tmp_path / "groups.jsonl", {"same": ["ab", "ba"]}, {"same": ["cd", "dc"]})
    bad = written(tmp_path / "bad.jsonl", {"same": ["ab", "ba"]}, {"same": ["cd"]})
    file = str(tmp_path / "none")
    common = ("--model", "demo", "--edits", edits, "--output", str(tmp_path / "run"))
    for arguments, message in (
        (("--keys", "function"), "keys: got 'function', expected one of --encoder, --key-prompts"),
        (("--keys", "last", "--encoder", file), "keys: got 'last' with --encoder"),
        (("--encoder-pattern", "x"), "encoder_pattern: expected --encoder or --key-prompts"),
        (("--method", "ft", "--encoder", file), "encoder: method 'ft' has no keys to choose"),
        (("--method", "ft", "--key-groups", groups), "expected grace or melo"),
        (("--key-prompts", prompts, "--encoder", file), "key_prompts: got --encoder too"),
        (("--key-prompts", prompts, "--key-groups", groups), "key_prompts: got --key-groups too"),
        (("--key-groups", groups, "--encoder", file, "--key-layer", "2"), "key_layer: got --enc"),
        (("--key-width", "8"), "key_width: expected --key-prompts or --key-groups with it"),
        (("--key-prompts", file), "none is missing"),
        (("--key-prompts", prompts), "key_width: got 64 for 2 vectors"),
        (("--key-prompts", prompts, "--key-layer", "99"), "key_layer: got 99"),
        (("--key-prompts", prompts, "--encoder-pattern", "("), "encoder_pattern: got '('"),
        (("--key-groups", bad), "bad.jsonl, line 2: same: got \"['cd']\""),
        (("--key-groups", groups, "--key-width", "9999"), "key_width: got 9999"),
        (("--key-groups", groups, "--key-width", "0"), "key_width: got 0"),
    ):
        assert message in fails(capsys, monkeypatch, *common, "--device", "cpu", *arguments)
    assert not (tmp_path / "run").exists()
