"""Causal language modelling: forms, what is learnt, and every row accounted for."""

import json

import datasets
import pytest
from lora_adapters_transformers.data.encoding import check_causal, encode_causal
from lora_adapters_transformers.data.tables import read_data
from lora_adapters_transformers.recipes import CausalLMData, CausalLMTraining
from small_tokenizers import CHATML, MARKED, make_tokenizer

from lora_adapters.errors import RequestError

PLAIN = make_tokenizer()
WITH_BOS = make_tokenizer(bos=True)
WITH_BOTH = make_tokenizer(bos=True, eos=True)
CHAT = make_tokenizer(chat_template=CHATML, eos_token="<|im_end|>")


def encode(rows, tokenizer, max_length=200, too_long="truncate", **data):
    table = datasets.Dataset.from_list(rows)
    training = CausalLMTraining(max_length=max_length, too_long=too_long)
    return encode_causal(table, CausalLMData(train="d.jsonl", **data), training, tokenizer)


def learnt(row, tokenizer):
    return tokenizer.decode([label for label in row["labels"] if label != -100])


def ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("tokenizer, begin", [(PLAIN, []), (WITH_BOS, [1]), (WITH_BOTH, [1])])
def test_plain_text_gets_one_beginning_and_one_end(tokenizer, begin):
    rows = encode([{"text": "Hello there"}, {"text": "ends itself</s>"}], tokenizer).rows
    assert rows[0]["input_ids"] == [*begin, *ids(tokenizer, "Hello there"), 2]
    assert rows[0]["labels"] == rows[0]["input_ids"]
    assert rows[0]["prompt_ids"] == []
    if tokenizer is not WITH_BOTH:
        assert rows[1]["input_ids"].count(2) == 1


@pytest.mark.parametrize("tokenizer, begin", [(PLAIN, []), (WITH_BOS, [1]), (WITH_BOTH, [1])])
def test_prompt_and_completion_meet_where_generating_begins(tokenizer, begin):
    row = encode([{"prompt": "Q: why ", "completion": "  because"}], tokenizer).rows[0]
    prompt, answer = [*begin, *ids(tokenizer, "Q: why ")], [*ids(tokenizer, "  because"), 2]
    assert row["input_ids"] == prompt + answer
    assert row["labels"] == [-100] * len(prompt) + answer
    assert row["prompt_ids"] == prompt
    assert (row["prompt_text"], row["answer_text"]) == ("Q: why ", "  because")


def test_loss_on_all():
    row = encode([{"prompt": "Q", "completion": "A"}], PLAIN, loss_on="all").rows[0]
    assert row["labels"] == row["input_ids"]
    assert row["prompt_ids"] == ids(PLAIN, "Q")


def test_templates_and_a_system_text():
    row = encode([{"q": "why", "a": 1}], PLAIN, prompt="Q: {q}\nA:", completion=" {a}", system="Be brief.").rows[0]
    assert row["prompt_text"] == "Be brief.\n\nQ: why\nA:"
    assert learnt(row, PLAIN) == " 1</s>"


def test_prompt_and_completion_through_the_chat_template():
    rows = [{"prompt": "why", "completion": "because"}]
    row = encode(rows, CHAT, system="Be brief.").rows[0]
    assert row["prompt_text"] == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nwhy<|im_end|>\n<|im_start|>assistant\n"
    )
    assert learnt(row, CHAT) == "because<|im_end|>"
    assert row["answer_text"] == "because"
    assert encode(rows, CHAT, chat_template=False).rows[0]["prompt_text"] == "why"
    with pytest.raises(RequestError, match="has no chat template"):
        encode(rows, PLAIN, chat_template=True)


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_chats(template):
    tokenizer = make_tokenizer(chat_template=template, eos_token="<|im_end|>")
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "one"},
        {"role": "user", "content": "b"},
        {"role": "assistant", "content": "two"},
    ]
    shared = [{"from": {"user": "human", "assistant": "gpt"}[m["role"]], "value": m["content"]} for m in messages]
    first = encode([{"messages": messages}], tokenizer, system="S")
    assert learnt(first.rows[0], tokenizer) == "one<|im_end|>two<|im_end|>"
    assert first.rows[0]["answer_text"] == "two"
    assert first.rows[0]["prompt_text"].endswith("<|im_start|>user\nb<|im_end|>\n<|im_start|>assistant\n")
    assert encode([{"conversations": shared}], tokenizer, system="S").rows[0] == first.rows[0]
    both = encode([{"prompt": messages[:3], "completion": messages[3:]}], tokenizer).rows[0]
    assert learnt(both, tokenizer) == "two<|im_end|>"


def test_chats_from_a_file_reach_the_template_with_their_own_keys(tmp_path):
    """No message gets keys that another has, and none its arguments: JSON is read as it was written."""
    template = "{% for m in messages %}{{ m | tojson }}\n{% endfor %}"
    tokenizer = make_tokenizer(chat_template=template)
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}]}
    other = {"role": "assistant", "tool_calls": [{"function": {"name": "g", "arguments": {"y": None}}}]}
    chats = [[{"role": "user", "content": "a"}, message] for message in (call, other)]
    file = tmp_path / "d.jsonl"
    file.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    data = CausalLMData(train=str(file))
    encoded = encode_causal(read_data(data, 0)[0], data, CausalLMTraining(), tokenizer)
    shown = [tokenizer.decode(ids).removesuffix("</s>") for ids in encoded.rows["input_ids"]]
    assert shown == ["".join(json.dumps(message) + "\n" for message in chat) for chat in chats]


def test_a_chat_that_has_a_system_message_keeps_it():
    messages = [{"role": r, "content": r[0]} for r in ("system", "user", "assistant")]
    row = encode([{"messages": messages}], CHAT, system="other").rows[0]
    assert row["prompt_text"].startswith("<|im_start|>system\ns<|im_end|>\n<|im_start|>user")


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_a_system_message_does_not_move_what_is_learnt(template):
    """Neither a greeting that opens a chat nor the assistant's turns in a prompt are learnt."""
    tokenizer = make_tokenizer(chat_template=template, eos_token="<|im_end|>")
    turns = [{"role": r, "content": c} for r, c in [("assistant", "Welcome"), ("user", "Why?"), ("assistant", "yes")]]
    for rows in ([{"messages": turns}], [{"prompt": turns[:2], "completion": turns[2:]}]):
        for system in (None, "S"):
            assert learnt(encode(rows, tokenizer, system=system).rows[0], tokenizer) == "yes<|im_end|>"


def test_a_single_token_is_nothing_to_learn():
    """Nothing comes before the first token that could predict it."""
    encoded = encode([{"text": "a"}, {"text": "ab"}], make_tokenizer(eos_token=None))
    assert encoded.facts.details["left out: nothing to learn"] == 1
    assert encoded.facts.details["answer tokens"] == len(encoded.rows[0]["input_ids"]) - 1


def test_tools_reach_the_template():
    template = "{% if tools %}{{ 'tools: ' + tools[0]['name'] + '\n' }}{% endif %}" + CHATML
    tokenizer = make_tokenizer(chat_template=template)
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    for tools in ([{"name": "clock"}], '[{"name": "clock"}]'):
        row = encode([{"messages": messages, "tools": tools}], tokenizer).rows[0]
        assert row["prompt_text"].startswith("tools: clock\n")


@pytest.mark.parametrize(
    "columns, form",
    [
        (["text"], "text (column text)"),
        (["question", "answer", "text"], "prompt + completion (columns question, answer)"),
        (["instruction", "output", "text"], "prompt + completion (columns instruction, output)"),
        (["instruction", "input", "output"], "prompt + completion (columns instruction, input, output)"),
        (["prompt", "completion", "text"], "prompt + completion (columns prompt, completion)"),
        (["prompt", "messages"], "messages (column messages)"),
        (["conversations", "id"], "messages (column conversations)"),
    ],
)
def test_the_form_is_found_from_the_columns(columns, form):
    assert check_causal(CausalLMData(train="x"), columns).name == form


def test_alpaca_with_and_without_input():
    rows = [
        {"instruction": "Add.", "input": "1, 2", "output": "3"},
        {"instruction": "Sing.", "input": "", "output": "la"},
    ]
    prompts = encode(rows, PLAIN).rows["prompt_text"]
    assert prompts == ["Add.\n\n1, 2\n\n", "Sing.\n\n"]
    assert "user\nAdd.\n\n1, 2<|im_end|>" in encode(rows, CHAT).rows["prompt_text"][0]


@pytest.mark.parametrize(
    "data, columns, message",
    [
        ({}, ["a", "b"], "can't tell what to train on from the columns a, b: give data.text"),
        ({"text": "txt"}, ["text"], "data.text: no column 'txt'; did you mean 'text'"),
        ({"prompt": "a", "completion": "{x}"}, ["a"], "data.completion: no column 'x'"),
        ({"messages": "mesages"}, ["messages"], "data.messages: no column 'mesages'; did you mean 'messages'"),
        ({"messages": "m", "chat_template": False}, ["m"], "messages always go through the chat template"),
        ({"text": "a", "system": "x"}, ["a"], "data.system: plain text has none"),
        ({"text": "a", "chat_template": True}, ["a"], "data.chat_template: plain text has none"),
    ],
)
def test_what_does_not_fit_is_said_before_any_model_is_loaded(data, columns, message):
    with pytest.raises(RequestError, match=message):
        check_causal(CausalLMData(train="x", **data), columns)


def test_every_row_is_accounted_for():
    rows = [
        {"prompt": "short", "completion": "yes"},
        {"prompt": "", "completion": "yes"},
        {"prompt": "why", "completion": None},
        {"prompt": "long " * 40, "completion": "yes"},
        {"prompt": "why", "completion": "long " * 40},
    ]
    encoded = encode(rows, PLAIN, max_length=24)
    facts = encoded.facts
    assert facts.rows == len(encoded.rows) == 2
    kept = list(encoded.rows)
    assert facts.details == {
        "form": "prompt + completion (columns prompt, completion)",
        "tokens": sum(len(row["input_ids"]) for row in kept),
        "answer tokens": sum(label != -100 for row in kept for label in row["labels"]),
        "rows too long": 2,
        "left out: empty": 2,
        "left out: answer cut off by max_length": 1,
    }
    assert len(kept[1]["input_ids"]) == 24
    assert 2 not in kept[1]["input_ids"], "a text that is cut does not end"
    assert (facts.name, facts.source) == ("train", "d.jsonl")


def test_too_long():
    rows = [{"text": "short"}, {"text": "long " * 40}]
    dropped = encode(rows, PLAIN, max_length=20, too_long="drop").facts
    assert (dropped.rows, dropped.details["rows too long"], dropped.details["left out: too long"]) == (1, 1, 1)
    with pytest.raises(
        RequestError, match=r"train data, row 2 has \d+ tokens, more than training.max_length 20: raise it"
    ):
        encode(rows, PLAIN, max_length=20, too_long="error")
    with pytest.raises(RequestError, match="no row is left to use; left out: 2 empty"):
        encode([{"text": ""}, {"text": None}], PLAIN, text="text")


def test_many_rows_keep_their_order():
    rows = [{"text": f"number {i}"} for i in range(2500)]
    encoded = encode(rows, PLAIN).rows
    assert [PLAIN.decode(ids[:-1]) for ids in encoded["input_ids"]] == [row["text"] for row in rows]


def test_a_chat_without_an_answer_is_left_out():
    rows = [
        {"messages": [{"role": "user", "content": "a"}]},
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": " "}]},
        {"messages": []},
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
    ]
    details = encode(rows, CHAT).facts.details
    assert details["left out: no answer of the assistant"] == 2
    assert details["left out: empty"] == 1


def test_names_of_sources():
    table = datasets.Dataset.from_list([{"text": "a"}])
    data = CausalLMData(train=["a.jsonl", "b.jsonl"], eval_fraction=0.1)
    of = [encode_causal(table, data, CausalLMTraining(), PLAIN, name=name).facts.source for name in ("train", "eval")]
    assert of == ["a.jsonl, b.jsonl", "a.jsonl, b.jsonl (0.1 held out)"]
