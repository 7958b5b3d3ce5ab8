"""Small tokenizers made offline: byte-level BPE trained on a text of the standard library, with chat templates."""

from functools import cache

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
MARKED = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# As Qwen3's: thinking stays in the last answer, and is dropped from earlier ones.
THINKING = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% set said = message['content'].split('</think>')[-1] | trim %}"
    "{% if loop.last %}{% set thought = message['content'].split('</think>')[0] if '</think>' in message['content'] "
    "else '<think>' %}{{ thought | trim + '\n\n</think>\n\n' + said }}{% else %}{{ said }}{% endif %}"
    "{% else %}{{ message['content'] }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# No end token, and a prompt that ends in a blank, which a token of the answer may swallow.
BARE = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
LLAMA2 = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% else %}{{ ' ' + message['content'] + ' ' + eos_token }}"
    "{% endif %}{% endfor %}"
)
_SPECIAL = [
    "<pad>",
    "<s>",
    "</s>",
    "<|im_start|>",
    "<|im_end|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
]


@cache
def _trained(vocabulary: int, metaspace: str | None) -> str:
    import argparse
    import inspect

    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    if metaspace is None:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=metaspace)
        tokenizer.decoder = decoders.Metaspace(prepend_scheme=metaspace)
        alphabet = [chr(code) for code in [10, *range(33, 127)]]
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=_SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(inspect.getsource(argparse).splitlines(keepends=True), trainer)
    return tokenizer.to_str()


def make_tokenizer(
    folder=None, chat_template=None, bos=False, eos=False, eos_token="</s>", vocabulary=512, metaspace=None
):
    """Return a fast tokenizer; saved to `folder`, if given, so that AutoTokenizer loads it.

    metaspace: "first", "always" or "never": blanks are marked as in Llama 2 and T5, not bytes as in GPT-2; ASCII only.
    bos, eos: it adds <s> before and </s> after each text itself. eos_token: such as "<|im_end|>" for ChatML.
    The pad token has id 0, <s> 1 and </s> 2.
    """
    from tokenizers import Tokenizer, processors
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer.from_str(_trained(vocabulary, metaspace))
    if bos or eos:
        single = f"{'<s> ' if bos else ''}$A{' </s>' if eos else ''}"
        pair = f"{single} $B:1{' </s>:1' if eos else ''}"
        inner.post_processor = processors.TemplateProcessing(
            single=single, pair=pair, special_tokens=[("<s>", 1), ("</s>", 2)]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token=eos_token,
        chat_template=chat_template,
    )
    if folder is not None:
        tokenizer.save_pretrained(folder)
    return tokenizer
