"""Skeletons as models write them."""
# ruff: noqa: RUF001

import pytest

from sapt_fast.generation.points import parse_points

CASES = {
    "1. Sleep early\n2. No coffee\n3. Dark room": ["Sleep early", "No coffee", "Dark room"],
    "Here it is:\n\n1) **Sleep early**:\n   - at ten\n2) No coffee\n\nGood luck!": [
        "Sleep early", "No coffee",
    ],
    "1. Sleep\n1.1 early\n1.2 late\n2. Eat": ["Sleep", "Eat"],
    "- a\n- b\n  - c\n- d": ["a", "b", "d"],
    "• a\n• b": ["a", "b"],
    "1. A 2. B 3. C": ["A", "B", "C"],
    "1. Save 20% by 2030 2. Eat": ["Save 20% by 2030", "Eat"],
    "1.\nSleep\n\n2.\nRun": ["Sleep", "Run"],
    "1. a\n1. b\n1. A\n5. c": ["a", "b", "c"],
    "**1. Foo**\n**2.** Bar": ["Foo", "Bar"],
    "### 1. Head\ntext\n### 2. Tail": ["Head", "Tail"],
    "1. One thing.\n2. And more:": ["One thing", "And more"],
    "(1) a\n(2) b": ["a", "b"],
    "I. One\nII. Two": ["One", "Two"],
    "a) x\nb) y": ["x", "y"],
    "一、早睡\n二、不喝咖啡": ["早睡", "不喝咖啡"],
    "第一点：早睡\n第二点：好": ["早睡", "好"],
    "① x\n② y": ["x", "y"],
    "１．あ\n２．い": ["あ", "い"],
    "٣. foo\n٤. bar": ["foo", "bar"],
    "1. only": ["only"],
    "1. ": [],
    "1. \n2. b": ["b"],
    "": [],
    "No list. 3.5 percent of it\nA man": [],
}  # fmt: skip


@pytest.mark.parametrize("text", CASES)
def test_titles(text):
    assert parse_points(text) == CASES[text]


def test_a_title_that_was_cut_is_left_out():
    assert parse_points("1. foo\n2. bar ba", complete=False) == ["foo"]
    assert parse_points("1. foo\n2. bar\n", complete=False) == ["foo", "bar"]
    assert parse_points("1. foo b", complete=False) == ["foo b"]
