"""Causal language modelling: rows to tokens, with the loss on the answers."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lora_adapters.errors import RequestError
from lora_adapters_transformers.data.chat import Chat, ChatEncoder, messages_of
from lora_adapters_transformers.data.encoded import IGNORED, Encoded, Rows, batches, source_of
from lora_adapters_transformers.data.plain import ended, ids_of, unended
from lora_adapters_transformers.data.templates import Template, unknown_column

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase

    from lora_adapters_transformers.recipes import CausalLMData, TextTraining

_TYPES = {
    "input_ids": "ids",
    "labels": "ids",
    "prompt_text": "text",
    "answer_text": "text",
    "prompt_ids": "ids",
}


@dataclass
class CausalForm:
    """How a row is read.

    Attributes:
        name: "text", "prompt + completion" or "messages", with what was found when nothing was named.
        text, prompt, completion: templates of the first two forms.
        messages: column of the third.
        extra: template of a further input after the prompt, which may be empty in a row.
        gap: what stands between prompt and completion without a chat template.
    """

    name: str
    text: Template | None = None
    prompt: Template | None = None
    completion: Template | None = None
    messages: str | None = None
    extra: Template | None = None
    gap: str = ""


def check_causal(data: CausalLMData, columns: Iterable[str]) -> CausalForm:
    """Return how rows with these columns are read, before any model is loaded.

    If the recipe names no form, it is found from the columns, in this order: messages or conversations; prompt and
    completion; instruction and output, with or without input; question and answer; text.

    Raises:
        RequestError: a column is unknown, no form is found, or settings contradict each other.
    """
    form = _form(data, list(columns))
    if form.messages and data.chat_template is False:
        raise RequestError("data.chat_template: messages always go through the chat template: leave it out")
    if form.text:
        for name in ("system", "chat_template"):
            if getattr(data, name):
                raise RequestError(f"data.{name}: plain text has none: give data.prompt and data.completion instead")
    return form


def _form(data: CausalLMData, columns: list[str]) -> CausalForm:
    if data.text is not None:
        return CausalForm("text", text=Template(data.text, columns, "data.text"))
    if data.prompt is not None and data.completion is not None:
        prompt = Template(data.prompt, columns, "data.prompt")
        return CausalForm(
            "prompt + completion", prompt=prompt, completion=Template(data.completion, columns, "data.completion")
        )
    if data.messages is not None:
        if data.messages not in columns:
            raise RequestError(unknown_column(data.messages, columns, "data.messages"))
        return CausalForm("messages", messages=data.messages)
    return _found_form(columns)


def _found_form(columns: list[str]) -> CausalForm:
    for name in ("messages", "conversations"):
        if name in columns:
            return CausalForm(f"messages (column {name})", messages=name)
    for prompt, completion, gap in [
        ("prompt", "completion", ""),
        ("instruction", "output", "\n\n"),
        ("question", "answer", "\n"),
    ]:
        if prompt in columns and completion in columns:
            extra = Template("input", columns) if prompt == "instruction" and "input" in columns else None
            shown = f"prompt + completion (columns {prompt}{', input' if extra else ''}, {completion})"
            templates = Template(prompt, columns), Template(completion, columns)
            return CausalForm(shown, prompt=templates[0], completion=templates[1], extra=extra, gap=gap)
    if "text" in columns:
        return CausalForm("text (column text)", text=Template("text", columns))
    raise RequestError(
        f"data: can't tell what to train on from the columns {', '.join(sorted(columns))}: "
        "give data.text, or data.prompt and data.completion, or data.messages"
    )


@dataclass
class _Made:
    """One row between reading and counting; `learnt` says which tokens have a loss."""

    row: int
    ids: list[int]
    learnt: list[bool]
    prompt_text: str = ""
    answer_text: str = ""
    prompt_ids: list[int] = field(default_factory=list)


def encode_causal(
    rows: datasets.Dataset,
    data: CausalLMData,
    training: TextTraining,
    tokenizer: PreTrainedTokenizerBase,
    *,
    name: str = "train",
) -> Encoded:
    """Return rows for a causal language model, in the order of the data.

    Columns: `input_ids` and `labels` (lists of int, equally long; a label is its own token, or -100 where there is no
    loss; the model shifts them), `prompt_text` and `answer_text` ("" for plain text), and `prompt_ids`, the tokens to
    generate an answer from, never cut (empty for plain text). In a chat these are of its last answer.

    Text gets what the tokenizer adds itself, and an end token. Prompt and completion without a chat template are
    tokenized apart and joined, so that training sees the same prompt as generating. Rows longer than
    `training.max_length` lose their end, or are dropped; rows with nothing left to learn are left out and counted.

    Args:
        name: "train" or "eval".

    Raises:
        RequestError: columns, messages or template don't fit, or no row is left.
    """
    form = check_causal(data, rows.column_names)
    made = Rows(name, _TYPES, training.max_length, training.too_long)
    encode = _encoder(form, data, tokenizer)
    tokens = answers = 0
    for batch in batches(rows):
        for item in encode(batch, made):
            if not made.keeps(len(item.ids), item.row):
                continue
            ids = item.ids[: made.max_length]
            labels = [token if flag else IGNORED for token, flag in zip(ids, item.learnt, strict=False)]
            learnt = sum(label != IGNORED for label in labels[1:])  # nothing predicts the first
            if not learnt:
                made.leave_out("answer cut off by max_length" if len(item.ids) > len(ids) else "nothing to learn")
                continue
            tokens, answers = tokens + len(ids), answers + learnt
            made.add(
                input_ids=ids,
                labels=labels,
                prompt_text=item.prompt_text,
                answer_text=item.answer_text,
                prompt_ids=item.prompt_ids,
            )
    details = {"form": form.name, "tokens": tokens, "answer tokens": answers}
    return made.finish(source_of(data, name), details)


def _encoder(form: CausalForm, data: CausalLMData, tokenizer: PreTrainedTokenizerBase) -> Any:
    """Return the function that encodes a batch of this form."""
    learn_all = data.loss_on == "all"
    if form.text:
        return lambda batch, made: _texts(form.text, batch, made, tokenizer)
    use_template = data.chat_template
    if use_template is None:
        use_template = tokenizer.chat_template is not None
    if form.messages or use_template:
        encoder = ChatEncoder(tokenizer, learn_all)
        return lambda batch, made: _chats(form, data, batch, made, encoder)
    return lambda batch, made: _pairs(form, data, batch, made, tokenizer)


def _texts(template: Template | None, batch: list, made: Rows, tokenizer: PreTrainedTokenizerBase) -> list[_Made]:
    assert template is not None
    filled = [(number, template.fill(row)) for number, row in batch]
    kept = [(number, text) for number, text in filled if text is not None]
    for _ in range(len(filled) - len(kept)):
        made.leave_out("empty")
    ids = ids_of(tokenizer, [text for _, text in kept])
    return [
        _Made(number, one, [True] * len(one))
        for (number, _), one in zip(kept, [ended(one, tokenizer) for one in ids], strict=True)
    ]


def _pairs(
    form: CausalForm, data: CausalLMData, batch: list, made: Rows, tokenizer: PreTrainedTokenizerBase
) -> list[_Made]:
    kept = []
    for number, row in batch:
        pair = _pair(form, row)
        if pair is None:
            made.leave_out("empty")
        else:
            system = "" if data.system is None else f"{data.system}\n\n"
            kept.append((number, system + pair[0] + form.gap, pair[1]))
    prompts = [unended(ids, tokenizer) for ids in ids_of(tokenizer, [prompt for _, prompt, _ in kept])]
    completions = ids_of(tokenizer, [completion for _, _, completion in kept], special=False)
    result = []
    for (number, prompt, answer), before, after in zip(kept, prompts, completions, strict=True):
        after = ended(after, tokenizer)
        learnt = [data.loss_on == "all"] * len(before) + [True] * len(after)
        result.append(_Made(number, before + after, learnt, prompt, answer, before))
    return result


def _pair(form: CausalForm, row: dict[str, Any]) -> tuple[str, str] | None:
    assert form.prompt is not None
    assert form.completion is not None
    prompt, completion = form.prompt.fill(row), form.completion.fill(row)
    if prompt is None or completion is None:
        return None
    extra = form.extra.fill(row) if form.extra else None
    return prompt if extra is None else f"{prompt}\n\n{extra}", completion


def _chats(form: CausalForm, data: CausalLMData, batch: list, made: Rows, encoder: ChatEncoder) -> list[_Made]:
    chats = []
    for number, row in batch:
        chat = _chat(form, number, row)
        if chat is None:
            made.leave_out("empty")
            continue
        if data.system is not None and chat.messages[0]["role"] != "system":
            chat.messages.insert(0, {"role": "system", "content": data.system})
            chat.first += bool(chat.first)
        if not chat.turns:
            made.leave_out("no answer of the assistant")
            continue
        chats.append(chat)
    return [
        _Made(
            chat.row,
            tokens.input_ids,
            tokens.learnt,
            tokens.prompt_text,
            str(chat.messages[chat.turns[-1]].get("content", "")),
            tokens.prompt_ids,
        )
        for chat, tokens in zip(chats, encoder.encode(chats), strict=True)
    ]


def _chat(form: CausalForm, number: int, row: dict[str, Any]) -> Chat | None:
    tools = _tools(row.get("tools"), number)
    if form.messages:
        messages = messages_of(row[form.messages], number, form.messages)
        if messages is None:
            return None
        return Chat(number, messages, first=int(messages[0]["role"] == "assistant"), tools=tools)
    assert form.prompt is not None
    assert form.completion is not None
    if all(isinstance(row.get(template.text), list) for template in (form.prompt, form.completion)):
        before = messages_of(row[form.prompt.text], number, form.prompt.text)
        after = messages_of(row[form.completion.text], number, form.completion.text)
        return Chat(number, before + after, first=len(before), tools=tools) if before and after else None
    pair = _pair(form, row)
    if pair is None:
        return None
    return Chat(number, [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}])


def _tools(value: Any, row: int) -> list[Any] | None:
    """Return the descriptions of tools that a chat brings in its column `tools`, as a list or JSON text of one."""
    try:
        tools = json.loads(value) if isinstance(value, str) and value.strip() else value
    except ValueError as e:
        raise RequestError(f"row {row}: column 'tools' is no JSON: {e}") from e
    return list(tools) if isinstance(tools, list) and tools else None
