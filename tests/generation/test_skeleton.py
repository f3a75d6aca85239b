"""Points of a batch are those of each point alone, and the prefix is read once."""

import pytest
import torch
from written_answers import Written, tokenizer
from tiny_models import patched, tiny

from sapt_fast.generation import (
    Done,
    PointDone,
    PointToken,
    SkeletonDone,
    SkeletonSettings,
    SkeletonToken,
    skeleton_of_thought,
    stream_skeleton_of_thought,
)
from sapt_fast.generation.prompts import opening, point_messages

LIST = " Red\n2. A big tree\n3. Go\n4. Sun and so on"
TITLES = ["Red", "A big tree", "Go", "Sun and so on"]
LONG = {"max_position_embeddings": 1024}


def settings(text=LIST, **changed):
    options = {"max_point_tokens": 12, "skeleton_processors": [Written(text)]}
    return SkeletonSettings(**{**options, **changed})


def make(family, patch=False):
    model = tiny(family, **({} if family == "t5" else LONG if family != "gpt2" else {"n_positions": 1024}))
    return patched(model) if patch else model


def alone(model, tokens, prompts, number, title, question="Why?", new=12):
    """What generate writes for one point."""
    messages = point_messages(prompts, question, "1." + LIST, number, title)
    text = tokens.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    ids = torch.tensor([tokens(text + opening(prompts, number, title)).input_ids])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new)
    return tokens.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral", "gemma"])
@pytest.mark.parametrize("batch", [4, 3, 1])
def test_points_are_those_of_generate(family, batch):
    model, tokens = make(family), tokenizer()
    answer = skeleton_of_thought(model, tokens, "Why?", settings=settings(batch=batch))
    assert [title for title, _ in answer.points] == TITLES
    for number, (title, text) in enumerate(answer.points, 1):
        assert text == alone(model, tokens, settings().prompts, number, title)
