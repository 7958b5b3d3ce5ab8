"""Reward models: pairs of a better and a worse answer to tokens, in the columns that TRL's RewardTrainer takes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from lora_adapters.errors import RequestError
from lora_adapters_transformers.data.chat import Chat, ChatEncoder, messages_of
from lora_adapters_transformers.data.encoded import Encoded, Rows, batches, source_of
from lora_adapters_transformers.data.plain import ended, ids_of
from lora_adapters_transformers.data.templates import Template

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase

    from lora_adapters_transformers.recipes import RewardData, RewardTraining

_TYPES = {
    "chosen_ids": "ids",
    "rejected_ids": "ids",
    "prompt_text": "text",
    "chosen_text": "text",
    "rejected_text": "text",
}
Pair = tuple[Any, Any]


def check_reward(data: RewardData, columns: Iterable[str]) -> tuple[Template | None, Template, Template]:
    """Return the templates of prompt, better and worse answer, before any model is loaded.

    Raises:
        RequestError: a column is unknown, or both answers are the same one.
    """
    columns = list(columns)
    prompt = None if data.prompt is None else Template(data.prompt, columns, "data.prompt")
    chosen, rejected = (Template(getattr(data, key), columns, f"data.{key}") for key in ("chosen", "rejected"))
    if chosen.text == rejected.text:
        raise RequestError(f"data.chosen and data.rejected are both {chosen.text!r}: name two columns")
    return prompt, chosen, rejected


def encode_reward(
    rows: datasets.Dataset,
    data: RewardData,
    training: RewardTraining,
    tokenizer: PreTrainedTokenizerBase,
    *,
    name: str = "train",
) -> Encoded:
    """Return rows for TRL's RewardTrainer, in the order of the data.

    Columns: `chosen_ids` and `rejected_ids` (lists of int, at most `max_length`), `prompt_text`, `chosen_text`,
    `rejected_text`. Chat messages go through the tokenizer's chat template, and so do a prompt and answers of plain text
    if it has one; else the texts are joined and ended. A pair that is too long loses the end of both answers, or is
    dropped; pairs with nothing to tell apart are left out and counted.

    Raises:
        RequestError: a column is unknown or holds something else, there is no chat template for messages, or no row is left.
    """
    templates = check_reward(data, rows.column_names)
    made = Rows(name, _TYPES, training.max_length, training.too_long)
    encode = _Encoder(templates, tokenizer)
    tokens = 0
    for batch in batches(rows):
        for number, ids, texts in encode(batch, made):
            if ids[0] == ids[1]:
                made.leave_out("chosen and rejected are the same")
                continue
            if not made.keeps(max(map(len, ids)), number):
                continue
            cut = [one[: made.max_length] for one in ids]
            if cut[0] == cut[1]:
                made.leave_out("the same when cut to max_length")
                continue
            tokens += sum(map(len, cut))
            made.add(
                chosen_ids=cut[0],
                rejected_ids=cut[1],
                prompt_text=texts[0],
                chosen_text=texts[1],
                rejected_text=texts[2],
            )
    details = {"form": encode.form, "tokens": tokens}
    return made.finish(source_of(data, name), details)


class _Encoder:
    """Reads pairs of either form; `form` says which it met."""

    def __init__(self, templates: tuple[Template | None, Template, Template], tokenizer: Any) -> None:
        self.prompt, self.chosen, self.rejected = templates
        self.tokenizer = tokenizer
        self.form = ""

    def __call__(self, batch: list, made: Rows) -> list[tuple[int, list[list[int]], tuple[str, str, str]]]:
        plain, chats = [], []
        for number, row in batch:
            if isinstance(row.get(self.chosen.text), list):
                pair = self._messages(row, number)
                kind = chats
            else:
                pair, kind = self._texts(row, number)
                kind = chats if kind == "chat" else plain
            if pair is None:
                made.leave_out("empty")
            else:
                kind.append((number, *pair))
        self.form = "messages" if chats else "text"
        done = self._ids_of_plain(plain) + self._ids_of_chats(chats)
        return sorted(done, key=lambda item: item[0])

    def _messages(self, row: dict[str, Any], number: int) -> tuple[Pair, tuple[str, str, str]] | None:
        both = [messages_of(row[t.text], number, t.text) for t in (self.chosen, self.rejected)]
        before: list[dict[str, Any]] | None = []
        if self.prompt is not None:
            value = row.get(self.prompt.text)
            if isinstance(value, list):
                before = messages_of(value, number, self.prompt.text)
            else:
                text = self.prompt.fill(row)
                before = None if text is None else [{"role": "user", "content": text}]
        if both[0] is None or both[1] is None or before is None:
            return None
        chosen, rejected = before + both[0], before + both[1]
        same = 0
        while same < min(len(chosen), len(rejected)) and chosen[same] == rejected[same]:
            same += 1
        shown = [_shown(chosen[:same]), _shown(chosen[same:]), _shown(rejected[same:])]
        return (Chat(number, chosen), Chat(number, rejected)), (shown[0], shown[1], shown[2])

    def _texts(self, row: dict[str, Any], number: int) -> tuple[Any, str]:
        chosen, rejected = self.chosen.fill(row), self.rejected.fill(row)
        prompt = "" if self.prompt is None else self.prompt.fill(row)
        if chosen is None or rejected is None or prompt is None:
            return None, "plain"
        shown = (prompt, chosen, rejected)
        if prompt and self.tokenizer.chat_template is not None:
            turns = [
                [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
                for answer in (chosen, rejected)
            ]
            return ((Chat(number, turns[0]), Chat(number, turns[1])), shown), "chat"
        return ((prompt + chosen, prompt + rejected), shown), "plain"

    def _ids_of_plain(self, rows: list) -> list:
        ids = ids_of(self.tokenizer, [text for _, pair, _ in rows for text in pair])
        return self._paired(rows, [ended(one, self.tokenizer) for one in ids])

    def _ids_of_chats(self, rows: list) -> list:
        if not rows:
            return []
        return self._paired(rows, ChatEncoder(self.tokenizer).whole_ids([chat for _, pair, _ in rows for chat in pair]))

    @staticmethod
    def _paired(rows: list, ids: list[list[int]]) -> list:
        return [(row[0], ids[2 * i : 2 * i + 2], row[2]) for i, row in enumerate(rows)]


def _shown(messages: list[dict[str, Any]]) -> str:
    if len(messages) == 1 and messages[0]["role"] == "assistant":
        return str(messages[0].get("content", ""))
    return "\n".join(f"{message['role']}: {message.get('content', '')}" for message in messages)
