"""Masks of chats: what is learnt is what the assistant said and its end token, and prompts are what generating sees."""

from itertools import groupby

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from lora_adapters_transformers.data.chat import Chat, ChatEncoder, messages_of
from small_tokenizers import BARE, CHATML, LLAMA2, LLAMA3, MARKED, THINKING, make_tokenizer

from lora_adapters.errors import RequestError

CHATML_TOKENIZER = make_tokenizer(chat_template=CHATML, eos_token="<|im_end|>")
MARKED_TOKENIZER = make_tokenizer(chat_template=MARKED, eos_token="<|im_end|>")
THINKING_TOKENIZER = make_tokenizer(chat_template=THINKING, eos_token="<|im_end|>")
LLAMA3_TOKENIZER = make_tokenizer(chat_template=LLAMA3, eos_token="<|eot_id|>", bos=True)
BARE_TOKENIZER = make_tokenizer(chat_template=BARE)

texts = st.text(st.characters(codec="utf-8", exclude_characters="<"), max_size=30)
said = texts.filter(str.strip)
words = st.lists(st.sampled_from(["the", "parser", "Hello", "é🙂", "42", "\n\n", "  x"]), min_size=1, max_size=6).map(
    " ".join
)


@st.composite
def chats(draw, content=said):
    messages = [{"role": "system", "content": draw(content)}] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        messages += [{"role": "user", "content": draw(content)}, {"role": "assistant", "content": draw(content)}]
    if draw(st.booleans()):
        messages.append({"role": "user", "content": draw(content)})
    return messages


def user_and(answer, question="Why?"):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def runs(tokens, tokenizer):
    """The texts of the runs of learnt tokens."""
    pairs = groupby(zip(tokens.learnt, tokens.input_ids, strict=True), key=lambda pair: pair[0])
    return [tokenizer.decode([token for _, token in group]) for flag, group in pairs if flag]


def answers(messages):
    return [message["content"] for message in messages if message["role"] == "assistant"]


@settings(max_examples=80, deadline=None)
@given(chats())
@example(user_and("\nan answer that begins with a line break"))
@example(user_and("  and blanks"))
def test_chatml(messages):
    tokens = ChatEncoder(CHATML_TOKENIZER).encode([Chat(1, messages)])[0]
    whole = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages)
    assert CHATML_TOKENIZER.decode(tokens.input_ids) == whole
    assert runs(tokens, CHATML_TOKENIZER) == [f"{answer}<|im_end|>" for answer in answers(messages)]


@settings(max_examples=80, deadline=None)
@given(chats())
def test_llama3_with_a_template_that_trims(messages):
    tokens = ChatEncoder(LLAMA3_TOKENIZER).encode([Chat(1, messages)])[0]
    assert runs(tokens, LLAMA3_TOKENIZER) == [f"{answer.strip()}<|eot_id|>" for answer in answers(messages)]
    assert tokens.input_ids.count(LLAMA3_TOKENIZER.bos_token_id) == 1


@settings(max_examples=80, deadline=None)
@given(chats(content=words.filter(lambda text: text[0].isalnum())))
def test_prefixes_and_generation_marks_agree(messages):
    """Two independent ways to the mask: ours from prefixes, transformers' from the marks in the template."""
    by_prefix = ChatEncoder(CHATML_TOKENIZER).encode([Chat(1, messages)])[0]
    by_marks = ChatEncoder(MARKED_TOKENIZER).encode([Chat(1, messages)])[0]
    assert ChatEncoder(MARKED_TOKENIZER).marked
    assert not ChatEncoder(CHATML_TOKENIZER).marked
    assert by_prefix == by_marks


@settings(max_examples=80, deadline=None)
@given(chats())
def test_a_template_without_end_tokens_gets_one_at_the_end(messages):
    tokens = ChatEncoder(BARE_TOKENIZER).encode([Chat(1, messages)])[0]
    last_is_answer = messages[-1]["role"] == "assistant"
    whole = "".join(f"{m['role']}: {m['content']}\n" for m in messages)
    assert BARE_TOKENIZER.decode(tokens.input_ids) == whole + ("</s>" if last_is_answer else "")
    expected = [f"{answer}\n" for answer in answers(messages)]
    if last_is_answer:
        expected[-1] += "</s>"
    assert runs(tokens, BARE_TOKENIZER) == expected


@pytest.mark.parametrize(
    "tokenizer", [CHATML_TOKENIZER, MARKED_TOKENIZER, LLAMA3_TOKENIZER, BARE_TOKENIZER, THINKING_TOKENIZER]
)
@pytest.mark.parametrize("question", ["Why?", "ends in blanks  ", "\n"])
@pytest.mark.parametrize("answer", ["yes", " yes", "\n\nyes", "é"])
def test_the_prompt_in_training_is_the_prompt_when_generating(tokenizer, question, answer):
    """The tokens before the first that is learnt are those of the rendered prompt: BARE's ends in a blank, which the
    tokenizer would join with the answer."""
    messages = user_and(answer, question)
    tokens = ChatEncoder(tokenizer).encode([Chat(1, messages)])[0]
    prompt = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True, tokenize=False)
    assert tokens.prompt_text == prompt
    assert tokens.prompt_ids == tokenizer(prompt, add_special_tokens=False)["input_ids"]
    if tokenizer is not MARKED_TOKENIZER:  # its mask is transformers' own, of the whole text's tokens
        first = tokens.learnt.index(True)
        assert tokens.input_ids[:first] == tokens.prompt_ids


def test_a_template_that_rewrites_earlier_turns_is_refused():
    messages = user_and("<think>\nhm\n</think>\n\nfirst") + user_and("second")
    encoder = ChatEncoder(THINKING_TOKENIZER)
    with pytest.raises(RequestError, match=r"row 7: .* writes earlier messages differently .* data\.loss_on: all"):
        encoder.encode([Chat(7, messages)])
    single = encoder.encode([Chat(1, messages[:2])])[0]
    assert runs(single, THINKING_TOKENIZER) == ["<think>\nhm\n\n</think>\n\nfirst<|im_end|>"]
    everything = ChatEncoder(THINKING_TOKENIZER, learn_all=True).encode([Chat(1, messages)])[0]
    assert all(everything.learnt)
    assert "hm" not in THINKING_TOKENIZER.decode(everything.input_ids)


def test_only_turns_from_first_on_are_learnt():
    messages = user_and("one") + user_and("two") + user_and("three")
    for tokenizer in (CHATML_TOKENIZER, MARKED_TOKENIZER):
        tokens = ChatEncoder(tokenizer).encode([Chat(1, messages, first=2)])[0]
        assert runs(tokens, tokenizer) == ["two<|im_end|>", "three<|im_end|>"]


def test_a_chat_that_opens_with_the_assistant():
    messages = [{"role": "assistant", "content": "Welcome"}, *user_and("yes")]
    for tokenizer in (CHATML_TOKENIZER, MARKED_TOKENIZER):
        tokens = ChatEncoder(tokenizer).encode([Chat(1, messages, first=1)])[0]
        assert runs(tokens, tokenizer) == ["yes<|im_end|>"]


@pytest.mark.parametrize("tokenizer", [CHATML_TOKENIZER, LLAMA3_TOKENIZER, BARE_TOKENIZER])
def test_a_slow_tokenizer_gives_what_a_fast_one_does(tokenizer):
    """Slow ones have no offsets and go by the tokens of prefixes."""
    chats = [Chat(1, user_and("one") + user_and("two\n")), Chat(2, user_and("  three"))]
    fast, slow = ChatEncoder(tokenizer), ChatEncoder(tokenizer)
    slow.boundaries.fast = False
    assert slow.encode(chats) == fast.encode(chats)


@pytest.mark.parametrize("scheme", ["first", "always", "never"])
def test_a_tokenizer_that_marks_blanks_as_llama2_does(scheme):
    """Its template has no end token of a turn's own; what is learnt is each answer and </s>, and the text is unchanged."""
    tokenizer = make_tokenizer(chat_template=LLAMA2, metaspace=scheme)
    messages = user_and("the parser") + user_and("more args")
    tokens = ChatEncoder(tokenizer).encode([Chat(1, messages)])[0]
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    assert tokens.input_ids == tokenizer(whole, add_special_tokens=False)["input_ids"]
    assert [run.strip() for run in runs(tokens, tokenizer)] == ["the parser </s>", "more args </s>"]
    assert tokens.input_ids[: len(tokens.prompt_ids)] == tokens.prompt_ids


@pytest.mark.parametrize("scheme", ["first", "always", "never"])
def test_such_a_tokenizer_with_a_prompt_that_ends_in_a_blank(scheme):
    tokenizer = make_tokenizer(chat_template=BARE, metaspace=scheme)
    messages = user_and("the parser") + user_and("more args")
    tokens = ChatEncoder(tokenizer).encode([Chat(1, messages)])[0]
    prompts = [tokenizer.apply_chat_template(messages[:n], add_generation_prompt=True, tokenize=False) for n in (1, 3)]
    ids = [tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in prompts]
    assert [run.strip() for run in runs(tokens, tokenizer)] == ["the parser", "more args\n</s>"]
    assert tokens.input_ids[: tokens.learnt.index(True)] == ids[0]
    assert tokens.prompt_ids == ids[1]


def test_refusals():
    with pytest.raises(RequestError, match="has no chat template: take a model that was tuned for chats"):
        ChatEncoder(make_tokenizer())
    strict = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + CHATML
    )
    encoder = ChatEncoder(make_tokenizer(chat_template=strict))
    with pytest.raises(
        RequestError, match="row 3: the tokenizer's chat template refuses it: System role not supported"
    ):
        encoder.encode([Chat(3, [{"role": "system", "content": "x"}, *user_and("y")])])


def test_messages_in_every_naming():
    expected = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert messages_of([{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], 1, "m") == expected
    assert messages_of([{"role": "User", "content": "a"}, {"role": "model", "content": "b"}], 1, "m") == expected
    assert messages_of('[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]', 1, "m") == expected
    arrow = [{"role": "user", "content": "a", "name": None}, {"role": "assistant", "content": "b", "tool_calls": None}]
    assert messages_of(arrow, 1, "m") == expected
    for nothing in (None, [], ""):
        assert messages_of(nothing, 1, "m") is None


@pytest.mark.parametrize(
    "value, message",
    [
        ("hello", "row 2: column 'm' holds text, where a list of messages is needed"),
        ([1], "no list of messages"),
        ({"role": "user"}, "no list of messages"),
        ([{"role": "wizard", "content": "x"}], "message with role 'wizard'; roles are system"),
        ([{"content": "x"}], "roles are"),
        ([{"role": "user", "content": [{"type": "image"}]}], "content is no text"),
        ([{"role": "user"}], "content is no text"),
    ],
)
def test_messages_that_are_none(value, message):
    with pytest.raises(RequestError, match=message):
        messages_of(value, 2, "m")
