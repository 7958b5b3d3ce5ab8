"""What a model writes after a prompt."""

from __future__ import annotations

from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

from lora_adapters.errors import RequestError
from lora_adapters.runs.measuring import evaluating

from .positions import limits


def chat_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str, data: Any | None) -> list[int]:
    """Return the ids of a prompt: through the chat template where the recipe's data goes through it, else as it is.

    Args:
        tokenizer: the model's.
        prompt: text of the user.
        data: the recipe's data section, or None for the bare prompt.
    """
    chats = data is not None and (data.messages or (data.text is None and data.chat_template is not False))
    if chats and tokenizer.chat_template is not None:
        system = [{"role": "system", "content": data.system}] if data is not None and data.system else []
        text = tokenizer.apply_chat_template(
            [*system, {"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])  # type: ignore[arg-type]
    ids = list(tokenizer(prompt)["input_ids"])  # type: ignore[arg-type]
    return ids[:-1] if ids[-1:] == [tokenizer.eos_token_id] else ids


def write(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    ids: list[int],
    autocast: torch.dtype | None,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    beams: int = 1,
) -> str:
    """Return what the model writes for one row of token ids: a decoder goes on from them, a seq2seq model answers.

    Args:
        temperature: 0 takes the likeliest token.
        top_p: nucleus to sample from.
        beams: beams of a search; 1 is none.

    Raises:
        RequestError: the prompt leaves no room in the model's positions; an answer is at most as long as they allow.
    """
    room, targets = limits(model)
    if model.config.is_encoder_decoder:
        room = targets
    elif room is not None:
        room -= len(ids)
    if room is not None and room < 1:
        raise RequestError(f"The prompt has {len(ids)} tokens, which leaves the model no room to answer: shorten it.")
    max_new_tokens = max_new_tokens if room is None else min(max_new_tokens, room)
    ends = model.generation_config.eos_token_id
    # A chat template may end answers with a token of its own, which the checkpoint lists; rows without one end in this.
    ends = {*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id} - {None}
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=temperature > 0,
        temperature=temperature if temperature > 0 else None,
        top_p=top_p if temperature > 0 else None,
        num_beams=beams,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=sorted(ends) or None,
        bos_token_id=model.generation_config.bos_token_id,
        decoder_start_token_id=getattr(model.generation_config, "decoder_start_token_id", None),
    )
    with evaluating(model, autocast) as device:
        prompt = torch.tensor([ids], device=device)
        made = model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), generation_config=settings)
    written = made[0] if model.config.is_encoder_decoder else made[0, prompt.shape[1] :]
    return str(tokenizer.decode(written, skip_special_tokens=True)).strip()
