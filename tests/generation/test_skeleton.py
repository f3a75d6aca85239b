"""Points of a batch are those of each point alone, and the prefix is read once."""

import pytest
import torch
from peft import LoraConfig, XLoraConfig, get_peft_model
from tiny_models import WIDTH, fill, patched
from tiny_prompts import bare, prompted
from written_answers import Written, tokenizer

import sapt_fast
from sapt_fast.generation import (
    ContextTooShortError,
    Done,
    PlainToken,
    PointDone,
    PointToken,
    SkeletonDone,
    SkeletonPrompts,
    SkeletonSettings,
    SkeletonToken,
    skeleton_of_thought,
    stream_skeleton_of_thought,
)
from sapt_fast.generation.forwards import Forwards
from sapt_fast.generation.prompts import opening, point_messages, skeleton_messages
from sapt_fast.generation.rows import EqualLengths, OwnLengths, rows_of
from sapt_fast.methods.grace import GraceConfig

LIST = " Red\n2. A big tree\n3. Go\n4. Sun and so on"
TITLES = ["Red", "A big tree", "Go", "Sun and so on"]
PROMPTS = SkeletonPrompts(
    skeleton="Skeleton: {question}", point="Point {number}", encoder="{question} {skeleton}"
)
POSITIONS = {"gpt2": {"n_positions": 512}, "t5": {}}
NEW = 9


def settings(text=LIST, **changed):
    options = {"max_point_tokens": NEW, "skeleton_processors": [Written(text)], "prompts": PROMPTS}
    return SkeletonSettings(**{**options, **changed})


def make(family, **changed):
    positions = POSITIONS.get(family, {"max_position_embeddings": 512})
    return bare(family, **{**positions, **changed})


def xlora(folder):
    """A patched X-LoRA model whose experts differ from token to token."""
    for k in range(2):
        expert = get_peft_model(
            make("llama", use_cache=False), LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
        )
        _randomise(expert, k, "lora_")
        expert.save_pretrained(folder / str(k))
    config = XLoraConfig(
        task_type="CAUSAL_LM",
        hidden_size=WIDTH,
        adapters={str(k): str(folder / str(k)) for k in range(2)},
        xlora_depth=1,
    )
    model = get_peft_model(make("llama", use_cache=False), config).eval()
    _randomise(model, 8, "xlora_classifier")
    return sapt_fast.patch(model)


@torch.no_grad()
def _randomise(model, seed, part):
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if part in name:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)


def skeleton_prompt(model, tokens, question="Why?"):
    messages = skeleton_messages(PROMPTS, question)
    if model.config.is_encoder_decoder:
        text = messages[-1]["content"]
    else:
        text = tokens.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        text += "1."
    return torch.tensor([tokens(text).input_ids])


def alone(model, tokens, number, title, question="Why?", new=NEW):
    """What `generate` writes for one point."""
    begin = opening(PROMPTS, number, title)
    skeleton = "1." + LIST
    if model.config.is_encoder_decoder:
        ids = tokens(PROMPTS.encoder.format(question=question, skeleton=skeleton)).input_ids
        start = torch.tensor([[0, *tokens(begin).input_ids]])
        inputs = {"decoder_input_ids": start, "input_ids": torch.tensor([ids])}
    else:
        messages = point_messages(PROMPTS, question, skeleton, number, title)
        text = tokens.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        start = torch.tensor([tokens(text + begin).input_ids])
        inputs = {"input_ids": start}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    out = model.generate(**inputs, do_sample=False, max_new_tokens=new)
    return tokens.decode(out[0, start.shape[1] :], skip_special_tokens=True)


def assert_alone(model, answer):
    assert [title for title, _ in answer.points] == TITLES
    assert len({text for _, text in answer.points}) > 2  # the model tells the points apart
    for number, (title, text) in enumerate(answer.points, 1):
        assert text == alone(model, tokenizer(), number, title)


@pytest.mark.parametrize(
    ("family", "batch"),
    [("llama", "auto"), ("llama", 3), ("llama", 1), ("gpt2", "auto"), ("mistral", 3), ("t5", 3)],
)
def test_points_are_those_of_generate(family, batch):
    model = make(family)
    kind = EqualLengths if family in ("mistral", "t5") else OwnLengths
    assert isinstance(rows_of(Forwards(model)), kind)
    assert_alone(
        model, skeleton_of_thought(model, tokenizer(), "Why?", settings=settings(batch=batch))
    )


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_a_patched_model_keeps_the_weights_of_its_question(family):
    model, tokens = fill(patched(make(family)), deviation=0.1), tokenizer()
    answer = skeleton_of_thought(model, tokens, "Why?", settings=settings(batch=3))
    with torch.no_grad():
        weights = model.sapt.route(skeleton_prompt(model, tokens))
    assert weights.max() < 0.9
    with model.sapt.fixed(weights):
        assert_alone(model, answer)


def test_an_xlora_model(tmp_path):
    model = xlora(tmp_path)
    assert isinstance(rows_of(Forwards(model)), OwnLengths)
    assert_alone(model, skeleton_of_thought(model, tokenizer(), "Why?", settings=settings(batch=3)))


def forwards_of(model):
    """[rows, tokens] of each forward of a model."""
    sizes = []
    model.register_forward_pre_hook(
        lambda _, args, kwargs: sizes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    return sizes


def test_the_prefix_is_read_once():
    model, tokens = make("llama"), tokenizer()
    sizes = forwards_of(model)
    answer = skeleton_of_thought(model, tokens, "Why?", settings=settings())
    prompt = skeleton_prompt(model, tokens).shape[1]
    assert sizes[0] == (1, prompt)
    steps = len(LIST) + 1  # the last token that is read ends the skeleton
    assert set(sizes[1:steps]) == {(1, 1)}
    # The skeleton's tokens are not read again, only what all points have in common after it.
    common = len("|\n<user>Point ")
    assert sizes[steps] == (1, common)
    endings = [f"{n}|\n<assistant>{n}. {title}:" for n, title in enumerate(TITLES, 1)]
    assert sizes[steps + 1] == (4, max(map(len, endings)))
    assert {length for _, length in sizes[steps + 2 :]} == {1}
    assert answer.prefill_tokens == prompt + common + sum(map(len, endings))


@pytest.mark.parametrize("family", ["llama", "mistral"])
@torch.no_grad()
def test_logits_are_those_of_whole_texts(family):
    rows = rows_of(Forwards(make(family)))
    prompts = [[5, 6, 7, 8], [5, 6, 9], [5, 6, 10, 11, 12, 13]]
    texts = [list(prompt) for prompt in prompts]

    def check(logits, texts):
        for got, text in zip(logits, texts, strict=True):
            expected = model(torch.tensor([text])).logits[0, -1]
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)

    model = make(family)
    rows.open(prompts, 3, 6)
    logits, unread = rows.add(prompts)
    texts = [text[: len(text) - len(rest)] for text, rest in zip(texts, unread, strict=True)]
    check(logits, texts)
    for step in range(4):
        new = [rest.pop(0) if rest else 20 + step for rest in unread]
        for text, token in zip(texts, new, strict=True):
            text.append(token)
        check(rows.step(new), texts)
    rows.keep([0, 2])
    texts = [texts[0], texts[2]]
    if rows.joins:
        logits, _ = rows.add([prompts[1]])
        texts.append(list(prompts[1]))
        check(logits, texts[2:])
    for text in texts:
        text.append(30)
    check(rows.step([30] * len(texts)), texts)


def test_sampling_does_not_depend_on_the_batch():
    model, tokens = make("llama"), tokenizer()
    sampled = {"do_sample": True, "temperature": 1.5, "seed": 3}
    answers = [
        skeleton_of_thought(model, tokens, "Why?", settings=settings(**sampled, **batch))
        for batch in ({"batch": 4}, {"batch": 1}, {"batch": 2, "order": "longest first"})
    ]
    assert answers[0].points == answers[1].points == answers[2].points
    texts = [text for _, text in answers[0].points]
    assert len(set(texts)) == len(texts)
    torch.manual_seed(1)
    other = {**sampled, "seed": None}
    drawn = skeleton_of_thought(model, tokens, "Why?", settings=settings(**other))
    torch.manual_seed(1)
    again = skeleton_of_thought(model, tokens, "Why?", settings=settings(**other))
    assert drawn.points == again.points != answers[0].points


def test_a_model_with_prompts():
    model, tokens = prompted(make("llama")), tokenizer()
    answer = skeleton_of_thought(model, tokens, "Why?", settings=settings(batch=3))
    with torch.no_grad(), model.sapt.fixed(model.sapt.route(skeleton_prompt(model, tokens))):
        assert_alone(model, answer)


def test_an_edited_model_reads_each_prompt_whole():
    model, tokens = make("llama"), tokenizer()
    sapt_fast.patch(model, GraceConfig(target_modules=["model.layers.1.mlp.down_proj"]))
    text = tokens.apply_chat_template(
        point_messages(PROMPTS, "Why?", "1." + LIST, 2, "A big tree"),
        add_generation_prompt=True, tokenize=False,
    )  # fmt: skip
    model.grace.edit(tokens(text + "2. A big tree:").input_ids, tokens("z").input_ids)
    answer = skeleton_of_thought(model, tokens, "Why?", settings=settings())
    assert_alone(model, answer)
    assert any("one point at a time" in note for note in answer.notes)
    sapt_fast.unpatch(model)
    assert answer.points[1][1] != alone(model, tokens, 2, "A big tree")


def test_static_steps():
    model = make("llama")
    answer = skeleton_of_thought(
        model, tokenizer(), "Why?", settings=settings(static_cache=True, batch=3)
    )
    assert_alone(model, answer)
    with pytest.raises(ValueError, match="static_cache: got True"):
        skeleton_of_thought(make("mistral"), tokenizer(), "?", settings=settings(static_cache=True))


def test_weights_of_each_point():
    """A batch mixes as each point alone after the prefix, by its own weights."""
    model, tokens = fill(patched(make("llama")), deviation=0.2), tokenizer()
    together, apart = (
        skeleton_of_thought(model, tokens, "Why?", settings=settings(routing="point", batch=batch))
        for batch in (3, 1)
    )
    question = skeleton_of_thought(model, tokens, "Why?", settings=settings())
    assert together.points == apart.points != question.points


@pytest.mark.parametrize(
    ("skeleton", "reason"),
    [("ne", "the skeleton has no point"), (" Red", "the skeleton has one point")],
)
def test_fewer_than_two_points_are_answered_plainly(skeleton, reason):
    model, tokens = make("llama"), tokenizer()
    if reason.endswith("no point"):
        given = settings(
            skeleton, max_plain_tokens=6, prompts=SkeletonPrompts(skeleton_opening="No")
        )
    else:
        given = settings(skeleton, max_plain_tokens=6)
    events = list(stream_skeleton_of_thought(model, tokens, "Why?", settings=given))
    answer = events[-1].answer
    assert (answer.mode, answer.reason, answer.points) == ("plain", reason, ())
    ids = tokens.apply_chat_template(
        [{"role": "user", "content": "Why?"}], add_generation_prompt=True, return_tensors="pt"
    )["input_ids"]
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=6
    )
    expected = tokens.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    assert "".join(e.text for e in events if isinstance(e, PlainToken)) == expected
    direct = skeleton_of_thought(
        model, tokens, "Why?", settings=given, mode="plain", reason="asked"
    )
    assert (direct.text, direct.reason) == (expected.strip(), "asked")


def test_the_stream_tells_all():
    """Pieces of every text add up to it; the last event has the answer."""
    events = list(
        stream_skeleton_of_thought(make("llama"), tokenizer(), "Why?", settings=settings(batch=3))
    )
    answer = events[-1].answer
    assert isinstance(events[-1], Done)
    told = "".join(e.text for e in events if isinstance(e, SkeletonToken))
    assert told == answer.skeleton == "1." + LIST
    assert SkeletonDone(tuple(TITLES)) in events
    for index, (_, text) in enumerate(answer.points):
        pieces = [e.text for e in events if isinstance(e, PointToken) and e.index == index]
        assert "".join(pieces) == text
        assert PointDone(index, text) in events
    assert answer.text == "\n\n".join(
        f"{n}. {title}:{text}".strip() for n, (title, text) in enumerate(answer.points, 1)
    )


def test_a_stop_inside_points_ends_each_for_itself():
    model, tokens = make("llama"), tokenizer()
    whole = skeleton_of_thought(model, tokens, "Why?", settings=settings())
    stop = whole.points[1][1][2:4]  # two tokens, of which the first alone is held back
    cut = skeleton_of_thought(model, tokens, "Why?", settings=settings(stop=[stop, ""], batch=2))
    assert cut.points[1][1] == whole.points[1][1].partition(stop)[0]
    for (_, got), (_, text) in zip(cut.points, whole.points, strict=True):
        assert got == text.partition(stop)[0]


def test_a_short_context_is_named():
    model, tokens = make("llama", max_position_embeddings=130), tokenizer()
    given = settings(max_point_tokens=200)
    answer = skeleton_of_thought(model, tokens, "Why?", settings=given)
    assert "context: a point has room for" in answer.notes[-1]
    assert_alone(model, skeleton_of_thought(model, tokens, "Why?", settings=settings(batch=2)))
    model.config.max_position_embeddings = 60
    with pytest.raises(ContextTooShortError, match="for a point, expected fewer than the 60"):
        skeleton_of_thought(model, tokens, "Why?", settings=settings())
    with pytest.raises(ContextTooShortError, match="for the skeleton"):
        skeleton_of_thought(model, tokens, "Why?" * 50, settings=settings())


def test_a_tokenizer_without_template_and_pad():
    model, tokens = make("llama"), tokenizer(template=None)
    assert tokens.pad_token is None
    model.generation_config.num_beams = 2
    answer = skeleton_of_thought(model, tokens, "Why?", settings=settings())
    assert [title for title, _ in answer.points] == TITLES
    assert answer.notes == (
        "not applied: num_beams of the generation config",
        "the tokenizer has no chat template: prompts are plain text",
    )


def test_bad_input_is_named():
    model, tokens = make("llama"), tokenizer()
    bad = {
        "question: got ' '": {"question": " "},
        "question: got None": {"question": None},
        "mode: got 'fast'": {"mode": "fast"},
        "model: got a model in training mode": {"model": make("llama").train()},
        "model: got Linear": {"model": torch.nn.Linear(2, 2)},
    }
    for message, changed in bad.items():
        options = {"model": model, "tokenizer": tokens, "question": "Why?", **changed}
        with pytest.raises(ValueError, match=message):
            skeleton_of_thought(**options)
    with pytest.raises(ValueError, match="routing: got 'point' for a model without"):
        skeleton_of_thought(model, tokens, "Why?", settings=settings(routing="point"))
    for name, value in {
        "batch": 0, "order": "random", "routing": "all", "temperature": 0, "top_p": 2, "seed": -1,
        "stop": "a", "max_points": 0, "min_tokens": -1,
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=f"{name}: got"):
            SkeletonSettings(**{name: value})
    with pytest.raises(ValueError, match=r"point: got the fields \['titel'\]"):
        SkeletonPrompts(point="{titel}")
