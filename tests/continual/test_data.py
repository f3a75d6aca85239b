import json
import shutil
from pathlib import Path

import pytest

from sapt_fast.continual.data.orders import ORDERS, resolve_order
from sapt_fast.continual.data.rows import Example, TaskData, list_tasks, read_split, read_task

DATA = Path(__file__).parents[1] / "data"
BENCHMARK = DATA / "CL_Benchmark"
SST2 = "task363_sst2_polarity_classification"
GLUCOSE = "task748_glucose_reverse_cause_event_detection"
SAMSUM = "task1572_samsum_summary"
ALL = [
    ("SuperNI", SST2),
    ("SuperNI", GLUCOSE),
    ("SuperNI", SAMSUM),
    ("Long_Sequence", "copa"),
    ("Long_Sequence", "qqp"),
]


@pytest.fixture
def root(tmp_path):
    """A copy of the benchmark that a test may break."""
    shutil.copytree(BENCHMARK, tmp_path / "CL_Benchmark")
    return tmp_path / "CL_Benchmark"


def raw(benchmark, task, split, root=BENCHMARK):
    return json.loads((root / benchmark / task / f"{split}.json").read_text(encoding="utf-8"))


def rewrite(path, change):
    content = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(change(content)), encoding="utf-8")


class TestPrompts:
    def test_superni(self):
        row = read_split(BENCHMARK, "SuperNI", SST2)[0]
        assert row.prompt == (
            "Definition: In this task, you are given sentences from movie reviews. The task is to "
            'classify a sentence as "POS" if the sentiment of the sentence is positive or as "NEG" '
            "if the sentiment of the sentence is negative\n\n"
            "Now complete the following example -\n"
            "Input: One of the most important and exhilarating forms of animated filmmaking since "
            "old Walt doodled Steamboat Willie .\n"
            "Output: "
        )
        assert (row.task, row.output, row.outputs) == (SST2, "POS", ("POS",))

    def test_long_sequence_strips_the_definition_and_lists_no_options(self):
        row = read_split(BENCHMARK, "Long_Sequence", "qqp")[1]
        assert row.prompt == (
            'Whether the "first sentence" and the "second sentence" have the same meaning? '
            "Choose one from the option: yes or no.\n"
            "first sentence: What are benefits of listening Indian classical music?\n"
            "second sentence: What are the benefits of listening to classical music?\n"
            "Output: "
        )
        assert row.output == "no"

    def test_long_sequence_without_definition(self):
        row = read_split(BENCHMARK, "Long_Sequence", "copa")[0]
        assert row.prompt == f"{row.input}\nOutput: "
        assert read_task(BENCHMARK, "Long_Sequence", "copa").definition == ""

    def test_input_is_taken_verbatim(self, root):
        text = " {0} {brace} %s \\n\n"

        def change(content):
            content["Instances"][0]["input"] = text
            content["Definition"] = [" Keep {0} braces. ", "second, unused"]
            return content

        rewrite(root / "SuperNI" / SST2 / "train.json", change)
        row = read_split(root, "SuperNI", SST2)[0]
        assert row.input == text
        assert row.prompt == (
            "Definition: Keep {0} braces.\n\nNow complete the following example -\n"
            f"Input: {text}\nOutput: "
        )

    def test_definition_may_be_one_string(self, root):
        def change(content):
            return {**content, "Definition": "Say it."}

        rewrite(root / "SuperNI" / SST2 / "train.json", change)
        assert read_split(root, "SuperNI", SST2)[0].prompt.startswith("Definition: Say it.\n\n")


class TestRows:
    @pytest.mark.parametrize(("suite", "task"), ALL)
    def test_every_row_is_read_in_order(self, suite, task):
        instances = raw(suite, task, "train")["Instances"]
        rows = read_split(BENCHMARK, suite, task)
        assert [row.input for row in rows] == [instance["input"] for instance in instances]
        for row, instance in zip(rows, instances, strict=True):
            output = instance["output"]
            assert row.outputs == ((output,) if isinstance(output, str) else tuple(output))
            assert row.output in row.outputs

    def test_target_of_several_outputs_is_drawn_by_the_seed(self):
        def targets(seed):
            return [row.output for row in read_split(BENCHMARK, "SuperNI", GLUCOSE, seed=seed)]

        assert targets(3) == targets(3)
        row = read_split(BENCHMARK, "SuperNI", GLUCOSE)[0]
        assert len(row.outputs) == 2
        assert {targets(seed)[0] for seed in range(20)} == set(row.outputs)

    def test_rows_are_frozen(self):
        row = read_split(BENCHMARK, "SuperNI", SST2)[0]
        with pytest.raises(AttributeError):
            row.output = "NEG"

    def test_pseudo_samples_keep_their_generated_definition_and_empty_outputs(self):
        rows = read_split(DATA / "generated_data", "SuperNI", SST2)
        definition = raw("SuperNI", SST2, "train", DATA / "generated_data")["Definition"][0]
        assert rows[0].prompt.startswith(f"Definition: {definition}\n\nNow complete")
        assert rows[0].outputs == ("",)
        assert len(rows) == 6

    def test_benchmark_in_any_case(self):
        assert read_task(BENCHMARK, "long_sequence", "copa").benchmark == "Long_Sequence"
        assert list_tasks(BENCHMARK, "superni") == tuple(sorted((SST2, GLUCOSE, SAMSUM)))


class TestSplits:
    @pytest.mark.parametrize(("suite", "task"), ALL)
    def test_dev_from_train_is_disjoint_and_complete(self, suite, task):
        whole = read_split(BENCHMARK, suite, task)
        data = read_task(BENCHMARK, suite, task, dev_size=5)
        train, dev = {row.input for row in data.train}, {row.input for row in data.dev}
        assert len(data.dev) == 5
        assert not train & dev
        assert train | dev == {row.input for row in whole}
        assert not dev & {row.input for row in data.test}
        assert list(data.train) == [row for row in whole if row.input in train]

    def test_split_repeats_by_seed_and_not_by_limits(self):
        def dev(**options):
            return read_task(BENCHMARK, "SuperNI", SST2, dev_size=8, **options).dev

        assert dev(seed=1) == dev(seed=1) == dev(seed=1, max_train=3)
        assert {row.input for row in dev(seed=1)} != {row.input for row in dev(seed=2)}

    @pytest.mark.parametrize(("size", "rows"), [(0.25, 10), (0.1, 4), (0.001, 1), (39, 39)])
    def test_dev_size(self, size, rows):
        data = read_task(BENCHMARK, "Long_Sequence", "copa", dev_size=size)
        assert (len(data.dev), len(data.train)) == (rows, 40 - rows)

    def test_rows_with_one_input_stay_together(self, root):
        def change(content):
            return {**content, "Instances": content["Instances"][:6] * 3}

        rewrite(root / "Long_Sequence" / "copa" / "train.json", change)
        for seed in range(5):
            data = read_task(root, "Long_Sequence", "copa", dev_size=7, seed=seed)
            assert len(data.dev) == 6
            assert not {row.input for row in data.dev} & {row.input for row in data.train}

    def test_released_dev_is_the_file_and_warns_of_the_test_rows(self, caplog):
        data = read_task(BENCHMARK, "SuperNI", SST2, dev="released")
        assert data.dev == read_split(BENCHMARK, "SuperNI", SST2, "dev")
        assert {row.input for row in data.dev} == {row.input for row in data.test}
        assert data.train == read_split(BENCHMARK, "SuperNI", SST2)
        assert "shares rows with test.json" in caplog.text

    def test_limits_keep_file_order(self):
        data = read_task(BENCHMARK, "SuperNI", SST2, max_train=7, max_eval=2)
        assert (len(data.train), len(data.dev), len(data.test)) == (7, 2, 2)
        order = {
            row.input: index for index, row in enumerate(read_split(BENCHMARK, "SuperNI", SST2))
        }
        kept = [order[row.input] for row in data.train]
        assert kept == sorted(kept)
        assert kept != list(range(7))


class TestLabels:
    def test_labels(self):
        assert read_task(BENCHMARK, "Long_Sequence", "copa").labels == ("A", "B")
        assert read_task(BENCHMARK, "SuperNI", SST2).labels is None

    def test_released_fault_of_qqp_is_mended(self):
        labels = json.loads((BENCHMARK / "Long_Sequence/qqp/labels.json").read_text())
        assert labels == ["False", "True"]
        assert read_task(BENCHMARK, "Long_Sequence", "qqp").labels == ("no", "yes")

    def test_missing_file(self, root):
        (root / "Long_Sequence/copa/labels.json").unlink()
        with pytest.raises(FileNotFoundError, match=r"copa/labels\.json does not exist"):
            read_task(root, "Long_Sequence", "copa")

    def test_training_output_absent_from_labels(self, root):
        (root / "Long_Sequence/copa/labels.json").write_text('["A", "C"]')
        with pytest.raises(ValueError, match=r"train rows .* absent from labels.json: 'B'; .*'C'"):
            read_task(root, "Long_Sequence", "copa")

    def test_some_test_outputs_absent_are_kept_and_logged(self, root, caplog):
        def change(content):
            content["Instances"][0]["output"] = "-"
            return content

        rewrite(root / "Long_Sequence/copa/test.json", change)
        assert len(read_task(root, "Long_Sequence", "copa").test) == 8
        assert "1 of 8 test rows" in caplog.text

    def test_all_test_outputs_absent(self, root):
        def change(content):
            return {
                **content,
                "Instances": [{**row, "output": "-"} for row in content["Instances"]],
            }

        rewrite(root / "Long_Sequence/copa/test.json", change)
        with pytest.raises(ValueError, match="8 of 8 test rows"):
            read_task(root, "Long_Sequence", "copa")

    @pytest.mark.parametrize("content", ["[]", '["A", ""]', '["A", "A"]', '{"A": 1}', "[1]"])
    def test_malformed(self, root, content):
        (root / "Long_Sequence/copa/labels.json").write_text(content)
        with pytest.raises(ValueError, match=r"labels\.json"):
            read_task(root, "Long_Sequence", "copa")


class TestBadInput:
    def test_unknown_task_names_the_near_ones(self):
        with pytest.raises(FileNotFoundError, match=f"'task363'.*near matches: {SST2}"):
            read_task(BENCHMARK, "SuperNI", "task363")
        with pytest.raises(FileNotFoundError, match=r"'cpoa'.*near matches: copa"):
            read_task(BENCHMARK, "Long_Sequence", "cpoa")
        with pytest.raises(FileNotFoundError, match="there are: copa, qqp"):
            read_task(BENCHMARK, "Long_Sequence", "zzzzzz")
        with pytest.raises(FileNotFoundError, match="no task"):
            read_task(BENCHMARK, "Long_Sequence", "../SuperNI")

    def test_unknown_root(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="SuperNI is no folder"):
            read_task(tmp_path, "SuperNI", SST2)

    @pytest.mark.parametrize("suite", ["glue", "", None])
    def test_unknown_benchmark(self, suite):
        with pytest.raises(
            ValueError, match=r"benchmark: got .*, expected one of SuperNI, Long_Sequence"
        ):
            read_task(BENCHMARK, suite, SST2)

    @pytest.mark.parametrize("split", ["train", "test"])
    def test_half_a_file(self, root, split):
        path = root / "SuperNI" / SST2 / f"{split}.json"
        text = path.read_text(encoding="utf-8")
        path.write_text(text[: len(text) // 2], encoding="utf-8")
        with pytest.raises(
            ValueError, match=rf"{split}\.json: broken JSON at line \d+, column \d+"
        ):
            read_task(root, "SuperNI", SST2)

    def test_not_utf8(self, root):
        (root / "SuperNI" / SST2 / "test.json").write_bytes(b'{"Definition": "\xff"}')
        with pytest.raises(ValueError, match=r"test\.json: not UTF-8 at byte 16"):
            read_task(root, "SuperNI", SST2)

    def test_missing_split_file(self, root):
        (root / "SuperNI" / SST2 / "dev.json").unlink()
        read_task(root, "SuperNI", SST2)
        with pytest.raises(FileNotFoundError, match=r"dev\.json does not exist"):
            read_task(root, "SuperNI", SST2, dev="released")

    @pytest.mark.parametrize("key", ["Definition", "Instances"])
    def test_missing_key(self, root, key):
        def change(content):
            return {name: value for name, value in content.items() if name != key}

        rewrite(root / "SuperNI" / SST2 / "test.json", change)
        with pytest.raises(ValueError, match=rf"test\.json: no '{key}'; it has .*'Categories'"):
            read_task(root, "SuperNI", SST2)

    @pytest.mark.parametrize(
        ("key", "value", "message"),
        [
            ("Instances", [], "'Instances' is empty"),
            ("Instances", {"input": "x"}, "'Instances': got dict, expected a list"),
            ("Instances", ["x"], r"Instances\[0\]: got str, expected an object"),
            ("Instances", [{"input": "x"}], r"Instances\[0\] has no 'output'"),
            ("Instances", [{"input": 3, "output": "x"}], "'input': got int, expected a string"),
            ("Instances", [{"input": "x", "output": []}], "'output' is an empty list"),
            (
                "Instances",
                [{"input": "x", "output": [1]}],
                r"'output': got \[1\], expected a string or a list",
            ),
            ("Definition", [], "'Definition' is empty; a SuperNI task needs one"),
            ("Definition", 3, "'Definition': got 3, expected a string or a list"),
        ],
    )
    def test_malformed_field(self, root, key, value, message):
        rewrite(root / "SuperNI" / SST2 / "train.json", lambda content: {**content, key: value})
        with pytest.raises(ValueError, match=rf"train\.json.*{message}"):
            read_task(root, "SuperNI", SST2)

    def test_not_an_object(self, root):
        rewrite(root / "SuperNI" / SST2 / "train.json", lambda content: [content])
        with pytest.raises(ValueError, match="expected a JSON object, got list"):
            read_split(root, "SuperNI", SST2)

    @pytest.mark.parametrize("size", [0, -1, 0.0, 1.0, 1.5, True, "8", float("nan")])
    def test_dev_size(self, size):
        with pytest.raises(ValueError, match=r"dev_size: got .*, expected an int"):
            read_task(BENCHMARK, "SuperNI", SST2, dev_size=size)

    @pytest.mark.parametrize("size", [32, 33, 1000])
    def test_dev_size_leaves_no_training_rows(self, size):
        with pytest.raises(ValueError, match="leaves train or dev empty"):
            read_task(BENCHMARK, "SuperNI", SST2, dev_size=size)

    @pytest.mark.parametrize("option", ["max_train", "max_eval"])
    @pytest.mark.parametrize("value", [0, -3, 2.0, True])
    def test_limits(self, option, value):
        with pytest.raises(ValueError, match=option):
            read_task(BENCHMARK, "SuperNI", SST2, **{option: value})

    def test_dev_and_split_names(self):
        with pytest.raises(
            ValueError, match="dev: got 'test', expected 'from_train' or 'released'"
        ):
            read_task(BENCHMARK, "SuperNI", SST2, dev="test")
        with pytest.raises(ValueError, match="split: got 'validation', expected one of"):
            read_split(BENCHMARK, "SuperNI", SST2, "validation")


class TestOrders:
    def test_published_orders_are_permutations(self):
        assert all(len(set(tasks)) == len(tasks) == 15 for tasks in ORDERS.values())
        assert set(ORDERS["superni-1"]) == set(ORDERS["superni-2"])
        assert set(ORDERS["long_sequence-3"]) == set(ORDERS["long_sequence-4"])

    def test_first_and_last(self):
        ends = {name: (tasks[0], tasks[-1]) for name, tasks in ORDERS.items()}
        assert ends == {
            "superni-1": (SAMSUM, "task875_emotion_classification"),
            "superni-2": (GLUCOSE, "task875_emotion_classification"),
            "long_sequence-3": ("mnli", "yahoo"),
            "long_sequence-4": ("yelp", "wic"),
        }

    @pytest.mark.parametrize("order", ["superni-2", 2, "2", list(ORDERS["superni-2"])])
    def test_by_name_number_and_list(self, order):
        assert resolve_order(order) == ORDERS["superni-2"]

    def test_own_order(self):
        assert resolve_order("sst2, copa") == resolve_order(["sst2", "copa"]) == ("sst2", "copa")
        assert resolve_order("copa") == ("copa",)

    @pytest.mark.parametrize("order", ["copa,qqp,copa", ["copa", "qqp", "copa"]])
    def test_repeated_task(self, order):
        with pytest.raises(ValueError, match="order: got 'copa' more than once"):
            resolve_order(order)

    @pytest.mark.parametrize("order", ["", [], "copa,,qqp", [""]])
    def test_empty(self, order):
        with pytest.raises(ValueError, match="at least one task"):
            resolve_order(order)

    @pytest.mark.parametrize("order", [0, 5, -1, "9"])
    def test_unknown_number(self, order):
        with pytest.raises(ValueError, match=r"order: got .*, expected one of superni-1"):
            resolve_order(order)

    @pytest.mark.parametrize("order", [None, True, 1.0, [1], {"copa"}])
    def test_types(self, order):
        with pytest.raises(TypeError, match=r"order: got .*, expected"):
            resolve_order(order)


def test_digests_stay_what_they_were():
    """Runs of earlier versions resume by them."""
    first = Example("task", "h\u00e9llo", "Input: h\u00e9llo\nOutput: ", "a", ("b", "a"))
    second = Example("task", 'x "y"', "p", "c", ("c",))
    task = TaskData(
        "task", "SuperNI", "Say it.", (first, second), (first,), (second,), labels=("a", "b")
    )
    counts = {"benchmark": "SuperNI", "train": 2, "dev": 1, "test": 1}
    assert task.describe() == {**counts, "digest": "827a7530460bc0de"}
    assert task.digest_of_prompts() == "218f97d94d9ec23d"
