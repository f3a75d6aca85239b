"""Edits are read and checked before anything runs; errors name the line."""

import json

import pytest
from tiny_models import tiny

from sapt_fast.demo.backbone import load_backbone
from sapt_fast.demo.tasks import CharTokenizer
from sapt_fast.editing.data import EditRow, Probe, Reader, digest, require_agreement

TOKENIZER = CharTokenizer()


@pytest.fixture(scope="module")
def reader():
    return Reader(load_backbone(), TOKENIZER)


def ids(text):
    return tuple(TOKENIZER.encode(text))


def written(tmp_path, *lines):
    path = tmp_path / "edits.jsonl"
    path.write_text("".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines))
    return path


def test_text_and_tokens(reader, tmp_path):
    path = written(
        tmp_path,
        {
            "prompt": "abc",
            "target": "de",
            "paraphrases": ["cab", [5, 6]],
            "locality": ["x", [7], {"prompt": "y", "target": "z"}, {"prompt": "v"}],
        },
        "",
        {"prompt": [5, 6], "target": [8, 9]},
        {"prompt": [5, 6], "target": [8, 1]},
    )
    first, second, third = reader.edits(path)
    assert first == EditRow(
        ids("abc"),
        ids("de"),
        (ids("cab"), (5, 6)),
        (Probe(ids("x")), Probe((7,)), Probe(ids("y"), ids("z")), Probe(ids("v"))),
        f"{path}, line 1",
    )
    assert second.target == (8, 9, 1), "the end token is added"
    assert third.target == (8, 1), "but not twice"
    assert third.place.endswith("line 4")


def test_probes(reader, tmp_path):
    path = written(tmp_path, {"prompt": "abc"}, {"prompt": [5], "target": "de"})
    assert reader.probes(path) == [Probe(ids("abc")), Probe((5,), ids("de"))]


def test_classes():
    rows = Reader(tiny("bert")).edits([{"prompt": [5, 6], "target": 3}])
    assert rows[0].target == (3,)
    with pytest.raises(ValueError, match=r"edits\[0\]: target: got 5, expected a class, 0 to 4"):
        Reader(tiny("bert")).edits([{"prompt": [5, 6], "target": 5}])


def test_zsre_of_the_code_of_grace(reader, tmp_path):
    path = written(
        tmp_path,
        {
            "input": "who",
            "prediction": "no",
            "alternatives": ["no"],
            "filtered_rephrases": ["ohw", "how"],
            "output": [{"answer": "me", "provenance": []}, {"answer": "you"}],
        },
    )
    (row,) = reader.edits(path)
    assert (row.prompt, row.target) == (ids("who"), ids("me"))
    assert row.paraphrases == (ids("ohw"), ids("how"))


def test_zsre_of_mend(reader, tmp_path):
    entry = {
        "subject": "s", "src": "who", "pred": "x", "rephrase": "how", "alt": "y",
        "answers": ["me"], "loc": "nq", "loc_ans": "z", "cond": "c",
    }  # fmt: skip
    path = written(tmp_path, json.dumps([entry]))
    (row,) = reader.edits(path)
    assert (row.prompt, row.target, row.paraphrases) == (ids("who"), ids("me"), (ids("how"),))
    assert row.locality == (Probe(ids("nq")),)


GOOD = {"prompt": "abc", "target": "de"}


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("{", "line 2: broken JSON"),
        ("5", "line 2: got '5', expected a JSON object"),
        ({"prompt": "abc"}, "line 2: got no 'target'"),
        ({**GOOD, "paraphrase": []}, "line 2: got 'paraphrase', expected among"),
        ({**GOOD, "paraphrases": "abc"}, "line 2: paraphrases: got 'abc', expected a list"),
        ({**GOOD, "target": ""}, "line 2: target: got ''"),
        ({**GOOD, "target": []}, "line 2: target: got shape"),
        ({**GOOD, "target": None}, "line 2: target: got null"),
        ({**GOOD, "prompt": [500]}, "line 2: prompt: got token 500"),
        ({**GOOD, "paraphrases": ["abc", []]}, r"line 2: paraphrases\[1\], prompt: got shape"),
        ({**GOOD, "locality": [{"text": "abc"}]}, r"line 2: locality\[0\], got the keys text"),
        ({**GOOD, "locality": [{"prompt": "a", "target": ""}]}, r"locality\[0\], target: got ''"),
        ({"input": "a", "output": []}, "line 2: output: expected a list of answers"),
        ({"src": "a", "answers": []}, "line 2: answers: got"),
    ],
)
def test_bad_lines_are_named(reader, tmp_path, bad, message):
    with pytest.raises((ValueError, TypeError), match=message):
        reader.edits(written(tmp_path, GOOD, bad))


def test_other_bad_input(reader, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.jsonl is missing"):
        reader.edits(tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match="got no line"):
        reader.edits(written(tmp_path, ""))
    with pytest.raises(ValueError, match="no chat template"):
        Reader(reader.model, TOKENIZER, chat=True)
    with pytest.raises(ValueError, match=r"edits\[0\]: prompt: got text, but there is no"):
        Reader(reader.model).edits([GOOD])
    with pytest.raises(ValueError, match="prompt and target: got 129 tokens, expected at most 128"):
        Reader(tiny("llama")).edits([{"prompt": [5] * 127, "target": [6]}])


def test_chat(reader):
    class Chatting(CharTokenizer):
        chat_template = "there is one"

        def apply_chat_template(self, messages, add_generation_prompt, tokenize, return_dict):
            assert (add_generation_prompt, tokenize, return_dict) == (True, True, False)
            assert [message["role"] for message in messages] == ["user"]
            return [40, *self.encode(messages[0]["content"]), 41]

    made = Reader(reader.model, Chatting(), chat=True)
    (row,) = made.edits([{"prompt": "ab", "target": "cd", "paraphrases": ["ba", [5]]}])
    assert row.prompt == (40, *ids("ab"), 41)
    assert row.target == ids("cd")
    assert row.paraphrases == ((40, *ids("ba"), 41), (5,))


def test_contradictions_within_a_batch():
    rows = [EditRow((5,), (6,), place="a"), EditRow((7,), (6,)), EditRow((5,), (8,), place="b")]
    require_agreement(rows, 1)
    require_agreement(rows, 2)
    with pytest.raises(ValueError, match="a and b have the same prompt and different targets"):
        require_agreement(rows, 3)


def test_the_digest_ignores_where_an_edit_was():
    here, there = EditRow((5,), (6,), place="a"), EditRow((5,), (6,), place="b")
    assert digest([here]) == digest([there]) != digest([EditRow((5,), (7,))])
