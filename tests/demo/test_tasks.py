"""The character tokenizer and the generated rows."""

import random
import string

import pytest
import torch

from sapt_fast.demo.tasks import (
    DEMO_RULES,
    LONGEST_PAYLOAD,
    PRETRAINING_RULES,
    SHORTEST_PAYLOAD,
    CharTokenizer,
    make_demo_tasks,
    make_example,
    pretraining_batch,
    random_payload,
)


@pytest.fixture
def tokenizer():
    return CharTokenizer()


class TestCharTokenizer:
    @pytest.mark.parametrize("text", ["ENDS:kdjfa", "", "-", "aZ09:-"])
    def test_decode_inverts_encode(self, tokenizer, text):
        ids = tokenizer.encode(text)
        assert ids[-1] == tokenizer.eos_token_id
        assert len(ids) == len(text) + 1
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode(torch.tensor(ids)) == text

    def test_every_character_has_its_own_id(self, tokenizer):
        characters = string.ascii_letters + string.digits + ":-"
        ids = tokenizer.encode(characters, add_special_tokens=False)
        assert sorted(ids) == list(range(3, tokenizer.vocab_size))
        assert len(tokenizer) == tokenizer.vocab_size == 67

    def test_unknown_character(self, tokenizer):
        assert tokenizer.encode("é") == [tokenizer.unk_token_id, tokenizer.eos_token_id]
        assert tokenizer.decode(tokenizer.encode("aéb")) == "ab"
        assert tokenizer.decode([2], skip_special_tokens=False) == "<unk>"

    def test_pads_on_the_right(self, tokenizer):
        batch = tokenizer(["abc", "d"], padding=True, return_tensors="pt")
        assert batch["input_ids"].dtype == torch.int64
        assert batch["input_ids"].tolist() == [[3, 4, 5, 1], [6, 1, 0, 0]]
        assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
        assert tokenizer.batch_decode(batch["input_ids"]) == ["abc", "d"]

    def test_pads_to_max_length(self, tokenizer):
        batch = tokenizer(["abc"], padding="max_length", max_length=6)
        assert batch["input_ids"] == [[3, 4, 5, 1, 0, 0]]

    def test_truncation_keeps_the_end_token(self, tokenizer):
        batch = tokenizer("abcdef", truncation=True, max_length=4)
        assert batch["input_ids"] == [3, 4, 5, 1]

    def test_targets_become_labels(self, tokenizer):
        batch = tokenizer(["ab"], text_target=["c"])
        assert batch["input_ids"] == [[3, 4, 1]]
        assert batch["labels"] == [[5, 1]]
        assert tokenizer(text_target=["c"])["input_ids"] == [[5, 1]]

    def test_pad_takes_a_list_of_rows(self, tokenizer):
        batch = tokenizer.pad([tokenizer("a"), tokenizer("bc")], return_tensors="pt")
        assert batch["input_ids"].tolist() == [[3, 1, 0], [4, 5, 1]]

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({}, "expected one of them"),
            ({"text": ["a"], "return_tensors": "np"}, "'np'"),
            ({"text": ["a"], "padding": "longish"}, "'longish'"),
            ({"text": ["a"], "padding": "max_length"}, "max_length"),
        ],
    )
    def test_bad_arguments(self, tokenizer, arguments, message):
        with pytest.raises(ValueError, match=message):
            tokenizer(**arguments)


class TestRules:
    @pytest.mark.parametrize(
        ("name", "payload", "answer"),
        [
            ("last_first", "kdjfa", "ak"),
            ("reverse_drop_first", "kdjfa", "fjdk"),
            ("vowel_label", "kdjfa", "AB"),
            ("vowel_label", "kdjf", "CD"),
            ("max_min", "kdjfa", "ka"),
            ("next_of_first", "zd", "a"),
            ("consonants_reversed", "kdjfa", "fjdk"),
            ("consonants_reversed", "ae", "-"),
        ],
    )
    def test_demo_rule(self, name, payload, answer):
        assert DEMO_RULES[name].apply(payload) == answer

    def test_counts(self):
        assert len(PRETRAINING_RULES) == 24
        assert len(DEMO_RULES) == 6

    def test_no_demo_rule_was_pretrained(self):
        rng = random.Random(0)
        payloads = [random_payload(rng) for _ in range(300)]
        pretrained = {
            tuple(map(rule.apply, payloads)): name for name, rule in PRETRAINING_RULES.items()
        }
        assert len(pretrained) == len(PRETRAINING_RULES)
        for rule in DEMO_RULES.values():
            assert tuple(map(rule.apply, payloads)) not in pretrained

    def test_instructions_are_distinct(self):
        rules = [*PRETRAINING_RULES.values(), *DEMO_RULES.values()]
        instructions = [name for rule in rules for name in rule.instructions]
        assert len(set(instructions)) == len(instructions) == 24 * 3 + 6
        assert all(len(name) == 4 and name.isupper() for name in instructions)

    def test_payloads(self):
        rng = random.Random(0)
        payloads = [random_payload(rng) for _ in range(200)]
        assert {len(p) for p in payloads} == set(range(SHORTEST_PAYLOAD, LONGEST_PAYLOAD + 1))
        assert all(len(set(p)) == len(p) and p.islower() for p in payloads)


class TestRows:
    def test_row(self):
        example = make_example(DEMO_RULES["last_first"], "kdjfa", random.Random(0))
        assert example == ("ENDS:kdjfa", "ak")

    def test_pretraining_batch_depends_on_seed_and_step_alone(self):
        batch = pretraining_batch(0, 5, 16)
        assert batch == pretraining_batch(0, 5, 16)
        assert len(batch) == 16
        assert batch != pretraining_batch(0, 6, 16)
        assert batch != pretraining_batch(1, 5, 16)

    def test_demo_tasks_are_deterministic(self):
        assert make_demo_tasks(3) == make_demo_tasks(3)
        assert make_demo_tasks(3) != make_demo_tasks(4)

    def test_known_row(self):
        # Guards against a silent change of the rows behind the recorded results.
        assert make_demo_tasks(0)[0].train[0] == ("ENDS:qsdgm", "mq")

    def test_splits_are_disjoint(self):
        for task in make_demo_tasks(0):
            assert [len(task.train), len(task.dev), len(task.test)] == [512, 128, 128]
            sources = [row.source for row in (*task.train, *task.dev, *task.test)]
            assert len(set(sources)) == len(sources)
            assert all(source.startswith(f"{task.instruction}:") for source in sources)

    def test_targets_follow_the_rule(self):
        for task in make_demo_tasks(1, train_rows=20, dev_rows=5, test_rows=5):
            for source, target in (*task.train, *task.dev, *task.test):
                assert target == DEMO_RULES[task.name].apply(source.split(":")[1])

    def test_rows_survive_the_tokenizer(self, tokenizer):
        for task in make_demo_tasks(0, train_rows=5, dev_rows=1, test_rows=1):
            for text in (text for row in task.train for text in row):
                assert tokenizer.decode(tokenizer.encode(text)) == text

    @pytest.mark.parametrize("argument", ["train_rows", "dev_rows", "test_rows"])
    def test_row_counts_are_checked(self, argument):
        with pytest.raises(ValueError, match=f"{argument}: got 0, expected at least 1"):
            make_demo_tasks(0, **{argument: 0})
