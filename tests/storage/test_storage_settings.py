"""Files of settings, runs and data that are hostile or damaged, and names of tasks and rows."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_tasks import make_model, make_settings, make_tasks

from sapt_fast.commands.config_file import read_config
from sapt_fast.commands.evaluate import evaluate
from sapt_fast.continual.compare.compare import compare
from sapt_fast.continual.data.rows import read_task
from sapt_fast.continual.data.sources import Source
from sapt_fast.continual.run.loop import run_continual
from sapt_fast.continual.run.state import RunFolder, read_alone
from sapt_fast.continual.settings import ContinualSettings, parse_values
from sapt_fast.continual.stored_settings import differences
from sapt_fast.demo.tasks import CharTokenizer

LAUGHS = "a: &a [x, x, x, x, x, x, x, x]\n" + "".join(
    f"{chr(98 + n)}: &{chr(98 + n)} [{', '.join(['*' + chr(97 + n)] * 8)}]\n" for n in range(12)
)
MERGES = "a: &a {x: 1}\n" + "".join(
    f"{chr(98 + n)}: &{chr(98 + n)} {{<<: [{', '.join(['*' + chr(97 + n)] * 8)}]}}\n"
    for n in range(9)
)
YAML = {
    "merge keys": (MERGES, "more than 10000 values"),
    "merge keys inside each other": ("a: " + "{<<: " * 30 + "{}" + "}" * 30, "inside each other"),
    "a merge of itself": ("a: &a {<<: *a}", "inside each other"),
    "twice inside": ("a: {b: 1, b: 2}", "the key 'b' twice"),
    "laughs": (LAUGHS, "more than 10000 values"),
    "recursive": ("a: &a [*a]", "inside each other"),
    "deep": ("a: " + "[" * 400 + "]" * 400, "nested too deep|inside each other"),
    "python": ("a: !!python/object/apply:os.system [ls]", "no YAML"),
    "twice": ("seed: 1\nseed: 2", "the key 'seed' twice"),
    "twice by spelling": ("max-train: 1\nmax_train: 2", "an option twice"),
    "not UTF-8": (b"a: \xff", "not UTF-8"),
    "zeros": (b"\0" * 1000, "no YAML"),
    "large": ("a: " + "x" * 70_000, "at most"),
    "no timestamp": ("a: !!timestamp x", "no YAML"),
    "no bool": ("a: !!bool x", "no YAML"),
    "no int": ('a: !!int ""', "no YAML"),
    "a day": ("seed: {b: 2001-01-01}", "value of type date, .* quote"),
    "bytes": ("a: !!binary aGk=", "value of type bytes"),
    "set": ("a: [!!set {b}]", "value of type set"),
    "huge": ("a: 0x" + "f" * 60_000, "more than 64 bits"),
    "huge inside": ("a: {b: 1" + ":59" * 10_000 + "}", "more than 64 bits"),
    "half a character": (r'a: "\ud800"', "surrogates not allowed"),
    "date": ("seed: 2001-13-45", "config"),
}


class TestYaml:
    @pytest.mark.parametrize("name", YAML)
    def test_hostile(self, name, tmp_path):
        text, message = YAML[name]
        path = tmp_path / "x.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        known = {*"abcdefghijklmnop", "seed", "max_train"}
        with pytest.raises(ValueError, match=message) as error:
            read_config(path, known)
        assert str(path) in str(error.value)

    def test_pipes_and_huge_files(self, tmp_path):
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(ValueError, match="got a pipe"):
            read_config(tmp_path / "pipe", {"a"})
        with open(tmp_path / "huge", "wb") as file:
            file.truncate(2**34)
        with pytest.raises(ValueError, match="at most"):
            read_config(tmp_path / "huge", {"a"})

    def test_aliases_that_mean_something(self, tmp_path):
        (tmp_path / "x").write_text("set: &s {a.r: 4}\nother: *s\nmax-train: 3\n")
        found = read_config(tmp_path / "x", {"set", "other", "max_train"})
        assert found == {"set": ["a.r=4"], "other": ["a.r=4"], "max_train": 3}
        # what is merged into a mapping is no key that stands twice
        text = "x: {y: {<<: &b {a: 1, c: 3}, a: 2}}\nset: {<<: *b, a: 5}\n"
        (tmp_path / "x").write_text(text)
        assert sorted(read_config(tmp_path / "x", {"set", "x"})["set"]) == ["a=5", "c=3"]
        (tmp_path / "x").write_text("# nothing\n")
        with pytest.raises(ValueError, match="holds NoneType"):
            read_config(tmp_path / "x", {"set"})


@pytest.mark.parametrize(
    "content",
    [b"[" * 100_000, b'{"a":' * 100_000, b"\0" * 9000, b'{"a": "", "a": ""}', b"\xff"],
)
def test_data(content, tmp_path):
    task = tmp_path / "Long_Sequence" / "copa"
    task.mkdir(parents=True)
    (task / "train.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"train\.json"):
        read_task(tmp_path, "Long_Sequence", "copa")
    (task / "train.json").unlink()
    os.mkfifo(task / "train.json")
    with pytest.raises(ValueError, match="got a pipe"):
        read_task(tmp_path, "Long_Sequence", "copa")


@pytest.mark.parametrize("name", ["run.json", "results.json"])
@pytest.mark.parametrize(
    "content", [b"[" * 100_000, b"[]", b"{}", b'{"source": {"x": 1}}', b"\xff"]
)
def test_a_finished_run(name, content, tmp_path):
    run = {"source": {"model": "demo", "benchmark": "demo"}, "settings": {}}
    (tmp_path / "run.json").write_text(json.dumps(run))
    (tmp_path / "results.json").write_text("{}")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=r"run\.json"):
        evaluate(tmp_path)


@pytest.mark.parametrize("alone", [{}, 0.5, True, [1], [1, None], [1, "x"], [1, 10**400], [[1], 2]])
def test_scores_of_tasks_learned_alone(alone, tmp_path):
    path = tmp_path / "results.json"
    path.write_text(json.dumps({"alone": alone}))
    with pytest.raises(ValueError, match=r"results\.json"):
        read_alone(path, 2)
    path.write_text(json.dumps({"alone": [50, 1.5]}))
    assert read_alone(path, 2) == [50, 1.5]


@pytest.mark.parametrize("costs", [{"seconds": 3}, {"peaks": 3}, {"trained": "x"}, {"peaks": [[]]}])
def test_costs_of_a_run(costs, tmp_path):
    folder = RunFolder(tmp_path, ["a"])
    good = {"seconds": [1.5], "peaks": [None], "trained": [7]}
    (tmp_path / "state.json").write_text(json.dumps({**good, **costs}))
    with pytest.raises(ValueError, match=r"state\.json"):
        folder.read_costs()
    (tmp_path / "state.json").write_text(json.dumps(good))
    folder.read_costs()
    assert (folder.seconds, folder.peaks, folder.trained) == ([1.5], [None], [7])


def test_settings_that_a_stored_run_lacks_count_as_their_defaults():
    stored = {"settings": ContinualSettings(strategy="lwf").to_dict()}
    del stored["settings"]["limit_pseudo_samples"]
    stored["settings"]["strategy_options"] = {"strength": 1.0, "temperature": 2.0}
    now = ContinualSettings(strategy="lwf")
    assert differences(stored, {"settings": now.to_dict()}) == []
    changed = now.but(strategy_options={"old_classes": True}, limit_pseudo_samples=True)
    assert sorted(differences(stored, {"settings": changed.to_dict()})) == [
        "limit_pseudo_samples was False, now True",
        "strategy_options.old_classes was False, now True",
    ]


@pytest.mark.parametrize("stored", [True, 3, "x", [1], None])
def test_a_description_that_is_none(stored):
    assert len(differences(stored, {"a": 1})) == 1


@pytest.mark.parametrize("text", ["a=" + "[" * 100_000, "a=" + "9" * 5000])
def test_values_of_the_command_line(text):
    with pytest.raises(ValueError, match="set: a: "):
        parse_values([text], "set")


@pytest.mark.parametrize(
    "values",
    [{"lora_alpha": 10**400}, {"temperature": 10**400}, {"kl_ratio": float("nan")}, {"r": 10**12}],
)
def test_settings_beyond_floats(values):
    with pytest.raises(ValueError, match="got "):
        ContinualSettings.of(**values)
    with pytest.raises(ValueError, match="strength"):
        ContinualSettings(strategy="ewc", strategy_options={"strength": 10**400})


@pytest.mark.parametrize(
    "names",
    [("t0", "T0"), ("caf\u00e9", "cafe\u0301"), ("a", "x" * 216), ("a", "b\0"), ("a", "b ")],
)
def test_tasks_of_a_run_are_named_before_it_trains(names, tmp_path):
    tasks = [replace(task, name=name) for task, name in zip(make_tasks(2), names, strict=True)]
    with pytest.raises(ValueError, match="tasks: got the name"):
        run_continual(make_model("t5"), CharTokenizer(), tasks, tmp_path / "run", make_settings())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("names", [("a", "A"), ("Alone",), ("x" * 300,), ("a\nb",)])
def test_rows_of_a_comparison(names, tmp_path):
    rows = {name: make_settings() for name in names}
    with pytest.raises(ValueError, match="rows: got"):
        compare(Source("demo", "demo"), rows, Path(tmp_path / "out"), progress=False)
    assert not (tmp_path / "out").exists()
