"""Chats through a tokenizer's template, with a mask of the tokens that the assistant wrote.

A template that marks them with {% generation %} says so itself. Elsewhere the chat is rendered up to each assistant turn,
as it is before generating, and up to its end; both must be prefixes of the whole chat, or the mask could be wrong.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lora_adapters.errors import RequestError
from lora_adapters_transformers.data.boundaries import Boundaries

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")
_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "bot": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "function": "tool",
    "observation": "tool",
}
_KNOWN = ("system", "developer", "user", "assistant", "tool", "ipython")


@dataclass
class Chat:
    """Messages as templates take them. Turns of the assistant from index `first` on are learnt."""

    row: int
    messages: list[dict[str, Any]]
    first: int = 0
    tools: list[Any] | None = None

    @property
    def turns(self) -> list[int]:
        """Indices of the assistant's turns that are learnt: not blank ones, nor one that opens a chat without a prompt."""
        later = range(max(self.first, 1), len(self.messages))
        return [i for i in later if self.messages[i]["role"] == "assistant" and _says_something(self.messages[i])]


def _says_something(message: Mapping[str, Any]) -> bool:
    return bool(str(message.get("content", "")).strip() or message.get("tool_calls"))


@dataclass
class ChatTokens:
    """A chat as tokens; `learnt[i]` says whether token i was written by the assistant in a turn to learn."""

    input_ids: list[int]
    learnt: list[bool]
    prompt_text: str
    prompt_ids: list[int]


def messages_of(value: Any, row: int, column: str) -> list[dict[str, Any]] | None:
    """Return the messages of a cell: a list, or JSON text of one, in either naming. None if there are none.

    Raises:
        RequestError: it holds something else, or a role that no template knows.
    """
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except ValueError as e:
            raise RequestError(f"row {row}: column {column!r} holds text, where a list of messages is needed") from e
    if value is None or value == "" or value == []:
        return None
    if not isinstance(value, list) or not all(isinstance(message, Mapping) for message in value):
        raise RequestError(f"row {row}: column {column!r} is no list of messages with role and content")
    return [_message(message, row, column) for message in value]


def _message(message: Mapping[str, Any], row: int, column: str) -> dict[str, Any]:
    # Arrow gives each mapping the keys of all others, with None.
    made = {key: value for key, value in message.items() if value is not None}
    if "role" not in made and "from" in made:
        made = {"role": made.pop("from"), "content": made.pop("value", None), **made}
    role = str(made.get("role", "")).lower()
    made["role"] = _ROLES.get(role, role)
    if made["role"] not in _KNOWN:
        raise RequestError(
            f"row {row}: column {column!r} has a message with role {made.get('role')!r}; roles are {', '.join(_KNOWN)}"
        )
    if not isinstance(made.get("content"), str) and "tool_calls" not in made:
        raise RequestError(f"row {row}: column {column!r} has a message whose content is no text")
    return made


class ChatEncoder:
    """Turns chats into tokens with one tokenizer's template.

    Raises:
        RequestError: the tokenizer has no chat template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, learn_all: bool = False) -> None:
        if tokenizer.chat_template is None:
            raise RequestError(
                f"the tokenizer of {tokenizer.name_or_path or 'this model'} has no chat template: take a model that was "
                "tuned for chats, or give data.prompt and data.completion"
            )
        self.tokenizer, self.learn_all = tokenizer, learn_all
        self.marked = bool(_MARKS.search(tokenizer.get_chat_template()))
        ends = {str(token) for token in tokenizer.added_tokens_decoder.values()}
        self.boundaries = Boundaries(tokenizer)
        self._ends = tuple(sorted(ends | {tokenizer.eos_token or ""} - {""}))

    def render(self, chat: Chat, stop: int | None = None, prompt: bool = False) -> str:
        """Return the chat, or its messages before `stop`, as text; with `prompt`, ready for the assistant's answer.

        Raises:
            RequestError: the template refuses the chat.
        """
        import jinja2

        try:
            return self.tokenizer.apply_chat_template(  # type: ignore[return-value]
                chat.messages[:stop], tools=chat.tools, tokenize=False, add_generation_prompt=prompt
            )
        except jinja2.TemplateError as e:
            raise RequestError(f"row {chat.row}: the tokenizer's chat template refuses it: {e}") from e

    def tokenize(self, texts: list[str]) -> list[list[int]]:
        """Return the ids of rendered texts, which hold their special tokens already."""
        if not texts:
            return []
        return self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]  # type: ignore[return-value]

    def encode(self, chats: list[Chat]) -> list[ChatTokens]:
        """Return tokens and masks; each chat must have a turn to learn.

        Raises:
            RequestError: the template refuses a chat, or the answers can't be told from the rest of it.
        """
        prompts = [self.render(chat, chat.turns[-1], prompt=True) for chat in chats]
        if not self.marked and not self.learn_all:
            return self._by_prefixes(chats, prompts)
        if self.learn_all:
            pairs = [(ids, [True] * len(ids)) for ids in self.whole_ids(chats)]
        else:
            pairs = [self._by_marks(chat) for chat in chats]
        made = zip(pairs, prompts, self.tokenize(prompts), strict=True)
        return [ChatTokens(ids, learnt, prompt, prompt_ids) for (ids, learnt), prompt, prompt_ids in made]

    def whole_ids(self, chats: list[Chat]) -> list[list[int]]:
        """Return the tokens of whole chats, ended."""
        wholes = [self.render(chat) for chat in chats]
        return [self._ended(whole, ids) for whole, ids in zip(wholes, self.tokenize(wholes), strict=True)]

    def _by_marks(self, chat: Chat) -> tuple[list[int], list[bool]]:
        import jinja2

        try:
            out: Any = self.tokenizer.apply_chat_template(
                chat.messages,
                tools=chat.tools,
                tokenize=True,
                return_dict=True,
                return_assistant_tokens_mask=True,
                tokenizer_kwargs={"verbose": False},
            )
        except jinja2.TemplateError as e:
            raise RequestError(f"row {chat.row}: the tokenizer's chat template refuses it: {e}") from e
        learnt = [bool(flag) for flag in out["assistant_masks"]]
        return out["input_ids"], self._later_runs(chat, learnt) if chat.first else learnt

    @staticmethod
    def _later_runs(chat: Chat, learnt: list[bool]) -> list[bool]:
        """Clear the runs of turns before `first`."""
        runs = [i for i, flag in enumerate(learnt) if flag and not (i and learnt[i - 1])]
        earlier = sum(m["role"] == "assistant" for m in chat.messages[: chat.first])
        if len(runs) != earlier + sum(m["role"] == "assistant" for m in chat.messages[chat.first :]):
            raise RequestError(
                f"row {chat.row}: the chat template marks {len(runs)} answers, not one for each assistant turn: "
                "give the prompt without assistant turns"
            )
        start = runs[earlier]
        return [flag and i >= start for i, flag in enumerate(learnt)]

    def _by_prefixes(self, chats: list[Chat], prompts: list[str]) -> list[ChatTokens]:
        wholes = [self.render(chat) for chat in chats]
        made = []
        for chat, whole, prompt, tokens in zip(chats, wholes, prompts, self.boundaries.of(wholes), strict=True):
            spans = self._spans(chat, whole)
            places = tokens.places(spans)
            learnt = [False] * len(tokens.ids)
            for start, end in places:
                learnt[start:end] = [True] * (end - start)
            ids = self._ended(whole, tokens.ids) if spans[-1][1] == len(whole) else tokens.ids
            learnt += [True] * (len(ids) - len(learnt))
            prompt_ids = self.boundaries.ids_of(prompt) if tokens.parted else ids[: places[-1][0]]
            made.append(ChatTokens(ids, learnt, prompt, prompt_ids))
        return made

    def _spans(self, chat: Chat, whole: str) -> list[tuple[int, int]]:
        """Return where in the rendered chat each turn to learn begins and ends, its end token included."""
        spans = []
        for turn in chat.turns:
            before, after = self.render(chat, turn, prompt=True), self.render(chat, turn + 1)
            if not whole.startswith(before) or not whole.startswith(after) or len(after) < len(before):
                raise RequestError(
                    f"row {chat.row}: the tokenizer's chat template writes earlier messages differently once the chat goes "
                    "on (as those that drop earlier thinking), so that the answers can't be told from the rest: use chats "
                    "with one answer each, set data.loss_on: all, or give the tokenizer a template with {% generation %}"
                )
            # What follows the end token, a line break in most templates, is the template's and never generated.
            written = after.rstrip()
            end = len(written) if written.endswith(self._ends) and len(written) > len(before) else len(after)
            spans.append((len(before), end))
        return spans

    def _ended(self, whole: str, tokens: list[int]) -> list[int]:
        """Add the end token if the template ends the chat with none: without one the model would not learn to stop."""
        eos = self.tokenizer.eos_token_id
        return tokens if eos is None or whole.rstrip().endswith(self._ends) else [*tokens, eos]
