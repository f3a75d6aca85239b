"""Sequential runs: what they write, and that an interrupted one ends with the same bits."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from safetensors.torch import load_file
from tiny_models import tiny

import sapt_fast
from sapt_fast.editing import report as reporting
from sapt_fast.editing import run as running
from sapt_fast.editing.answers import Examiner
from sapt_fast.editing.data import Reader
from sapt_fast.editing.editors.grace import GraceEditor
from sapt_fast.editing.run import run_edits
from sapt_fast.editing.settings import EditingSettings
from sapt_fast.editing.state import RunFolder

RECORDS = [
    {
        "prompt": [5 + 4 * i, 6 + 4 * i, 7 + 4 * i],
        "target": [40 + i, 50 + i],
        "paraphrases": [[5 + 4 * i, 8 + 4 * i]],
        "locality": [[60 + i, 61]],
    }
    for i in range(6)
]
UPSTREAM = [[70, 71, 72], [73, 74], {"prompt": [75, 76], "target": [1]}]
SETTINGS = EditingSettings(every=2, save_every=2, eval_batch=8, answer_tokens=3)
GRACE = {"replacement": "per_token", "radius": 1e-3, "cold": True}


@pytest.fixture(scope="module")
def model():
    return tiny("llama", initializer_range=0.3)


@pytest.fixture(autouse=True)
def plain_figures(request, monkeypatch):
    """Leaves the curves out, which take half the time of a run here, but for the report's test."""
    if "whole" not in request.fixturenames:
        monkeypatch.setattr(reporting, "curves", lambda points: Figure())


def run(model, folder, settings=SETTINGS, records=RECORDS, **options):
    reader = Reader(model)
    given = {"options": GRACE, "upstream": reader.probes(UPSTREAM), **options}
    return run_edits(model, reader.edits(records), folder, settings, **given)


def codebook(folder):
    return load_file(folder / "saved" / "state" / "tensors.safetensors")


def same(folder, expected):
    got = codebook(folder)
    return got.keys() == expected.keys() and all(torch.equal(got[k], expected[k]) for k in got)


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory):
    """The folder and the report of a run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, run(model, folder, text=tuple(range(3, 30)))


def test_the_report(whole, model):
    folder, content = whole
    assert json.loads((folder / "report.json").read_text()) == content
    assert [point["edits"] for point in content["points"]] == [0, 2, 4, 6]
    first, last = content["points"][0], content["points"][-1]
    assert first["generated"]["retention"] is None
    assert last["generated"]["success"] == last["generated"]["retention"] == 1.0
    assert last["generated"]["locality"] == 1.0
    assert last["forced"]["retention"] == 1.0
    assert first["perplexity"] == last["perplexity"] > 1
    right = Examiner(model, 1, 3).answers([(75, 76)]) == [(1,)]
    assert first["generated"]["upstream"] == (1.0 if right else pytest.approx(2 / 3))
    assert [record["outcome"] for record in content["records"]] == ["made"] * 6
    assert content["size"]["keys"] == 6
    text = (folder / "report.md").read_text()
    assert "# 6 edits by grace" in text
    assert "| retention of all edits (ERR) | 100.0 % | 100.0 % |" in text
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_the_edits_can_be_loaded(whole, model):
    folder, _ = whole
    loaded = sapt_fast.load_pretrained(
        tiny("llama", initializer_range=0.3), folder / "saved" / "edited"
    )
    (row,) = Reader(model).edits(RECORDS[3:4])
    assert Examiner(loaded, 1, 3).answers([row.prompt]) == [row.target]
    assert not hasattr(model, "grace"), "the run leaves the model as it was"


class Interruption(BaseException):
    pass


def interrupt_at(monkeypatch, moment):
    """Raises at the n-th of all edits, questions, saves, and reports."""
    left = [moment]

    def watched(own):
        def call(*args, **kwargs):
            left[0] -= 1
            if left[0] == 0:
                raise Interruption
            return own(*args, **kwargs)

        return call

    for owner, name in (
        (GraceEditor, "edit"),
        (Examiner, "answers"),
        (RunFolder, "save"),
        (running, "write_report"),
    ):
        monkeypatch.setattr(owner, name, watched(getattr(owner, name)))
    return left


# One before the first edits are saved, at call 9; one after each of the saves; and the report.
CALLS = 22
SPANS = ((2, 8), (10, 14), (16, 20), (22, 22))
MOMENTS = [random.Random(7).randint(*span) for span in SPANS]


@pytest.mark.parametrize("moment", MOMENTS)
def test_an_interrupted_run_ends_with_the_same_codebook(
    model, whole, tmp_path, monkeypatch, moment
):
    folder, content = whole
    with monkeypatch.context() as patched:
        interrupt_at(patched, moment)
        with pytest.raises(Interruption):
            run(model, tmp_path)
    assert not hasattr(model, "grace")
    resumed = run(model, tmp_path)
    assert same(tmp_path, codebook(folder))
    for name in ("outcome", "generated", "forced"):
        assert [r[name] for r in resumed["records"]] == [r[name] for r in content["records"]]
    for point, expected in zip(resumed["points"], content["points"], strict=True):
        assert point == {k: v for k, v in expected.items() if k != "perplexity"}


def test_the_number_of_moments(model, tmp_path, monkeypatch):
    left = interrupt_at(monkeypatch, 1000)
    run(model, tmp_path)
    assert 1000 - left[0] == CALLS


def test_killed_and_resumed(tmp_path):
    script = Path(__file__).parents[1] / "killed_edits.py"
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path)], capture_output=True, text=True
    )
    codes = json.loads(done.stdout.splitlines()[-1])
    assert codes == {"whole": 0, "killed": -9, "resumed": 0}, done.stderr
    expected = codebook(tmp_path / "whole")
    assert expected["log:edits"].shape[0] == 3
    assert same(tmp_path / "killed", expected)
    report = json.loads((tmp_path / "killed" / "report.json").read_text())
    assert report["resumed"]


def test_a_finished_run_is_only_reported_again(model, whole, tmp_path, monkeypatch):
    first = run(model, tmp_path, records=RECORDS[:2])
    (tmp_path / "report.md").unlink()
    monkeypatch.setattr(GraceEditor, "edit", None)
    assert run(model, tmp_path, records=RECORDS[:2]) == first
    assert (tmp_path / "report.md").exists()


def test_batches_order_and_limit(model, tmp_path):
    settings = EditingSettings(batch=2, limit=4, order_seed=3, every=1, answer_tokens=3)
    content = run(model, tmp_path, settings)
    shuffled = [f"edits[{i}]" for i in range(6)]
    random.Random(3).shuffle(shuffled)
    assert [record["place"] for record in content["records"]] == shuffled[:4]
    assert [point["edits"] for point in content["points"]] == [0, 2, 4]


def test_a_fact_that_changes(model, tmp_path):
    changed = [*RECORDS[:2], {**RECORDS[0], "target": [80, 81]}]
    content = run(model, tmp_path, records=changed)
    assert content["points"][-1]["generated"]["retention"] == 1.0
    batch = EditingSettings(batch=3)
    with pytest.raises(ValueError, match=r"edits\[0\] and edits\[2\] have the same prompt"):
        run(model, tmp_path / "batch", batch, records=changed)
    assert not (tmp_path / "batch").exists()


class ByCounts:
    """Looks up by the counts of tokens; `encoder` identifies it."""

    encoder = torch.nn.Linear(1, 1)

    def __call__(self, texts):
        return torch.stack([torch.bincount(text, minlength=97) for text in texts]).float()


def test_keys_by_a_function(model, tmp_path):
    options = {"keys": "function", "radius": 0.5, "replacement": "per_token"}
    with pytest.raises(ValueError, match="keys: got 'function', expected look_up_by"):
        run(model, tmp_path / "new", options=options)
    content = run(model, tmp_path / "new", options=options, look_up_by=ByCounts())
    assert content["encoder"]["class"] == "Linear"
    assert content["points"][-1]["generated"]["retention"] == 1.0
    other = ByCounts()
    rows = Reader(model).edits(RECORDS)
    assert running._keys_of(other, rows) == running._keys_of(ByCounts(), rows)
    assert running._keys_of(lambda texts: 2 * other(texts), rows[:1]) != running._keys_of(
        lambda texts: other(texts), rows[:1]
    )
    other.encoder = torch.nn.Linear(1, 1)
    with pytest.raises(ValueError, match="different settings"):
        run(model, tmp_path / "new", options=options, look_up_by=other)


def test_a_baseline_that_forgets(model, tmp_path):
    content = run(model, tmp_path, method="ft", options={"learning_rate": 0.03})
    last = content["points"][-1]["generated"]
    assert last["success"] == 1.0
    assert last["retention"] < 1.0
    assert content["edited"] is None


def test_bad_input_changes_nothing(model, whole, tmp_path):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    folder, _ = whole
    for arguments, message in (
        ({"method": "magic"}, "method: got 'magic'"),
        ({"options": {"radius": -1.0}}, "radius"),
        ({"options": {"target_modules": ("none",)}}, "matches no module"),
        ({"settings": EditingSettings(seed=1)}, None),
        ({"text": (5,)}, "text: got 1 tokens"),
    ):
        place = folder if message is None else tmp_path / "new"
        with pytest.raises(ValueError, match=message or "different settings: .*seed was 0, now 1"):
            run(model, place, **arguments)
        assert not (tmp_path / "new").exists()
    with pytest.raises(ValueError, match="rows: got none"):
        run_edits(model, [], tmp_path / "new")
    with pytest.raises(FileExistsError, match="holds a run"):
        run(model, folder, resume=False)
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(FileExistsError, match=r"contains notes\.txt"):
        run(model, tmp_path)
    for name in ("batch", "every", "save_every", "eval_batch", "answer_tokens", "limit"):
        with pytest.raises(ValueError, match=f"{name}: got 0"):
            EditingSettings(**{name: 0})
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("name", ["progress.json", "tensors.safetensors"])
def test_damage_is_found(model, tmp_path, name):
    run(model, tmp_path, records=RECORDS[:1])
    file = tmp_path / "saved" / "state" / name
    data = bytearray(file.read_bytes())
    data[-20] ^= 1
    file.write_bytes(data)
    with pytest.raises(ValueError, match=name):
        run(model, tmp_path, records=RECORDS[:1])
