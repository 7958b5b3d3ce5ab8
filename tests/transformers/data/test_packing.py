"""Packing: rows whole and none lost, the same loss packed as alone, and models that mix documents refused."""

import datasets
import pytest
import torch
from helpers import llama
from hypothesis import given, settings
from hypothesis import strategies as st
from lora_adapters_transformers.data.packing import (
    best_fit,
    check_packing,
    collate_packed,
    pack,
    packing_facts,
    row_to_check,
)

from lora_adapters.errors import RequestError, UnsupportedError


def table(lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.randint(3, 32, (length,), generator=generator).tolist() for length in lengths]
    labels = [
        [token if i >= length // 2 else -100 for i, token in enumerate(row)]
        for row, length in zip(ids, lengths, strict=True)
    ]
    return datasets.Dataset.from_list(
        [{"input_ids": a, "labels": b, "text": "x"} for a, b in zip(ids, labels, strict=True)]
    )


def slow_best_fit(lengths, room):
    """The definition: the longest first, each into the fullest group that has room."""
    groups = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        free = [room - sum(lengths[i] for i in group) for group in groups]
        fitting = [i for i in range(len(groups)) if free[i] >= lengths[index]]
        if fitting:
            groups[min(fitting, key=lambda i: free[i])].append(index)
        else:
            groups.append([index])
    return groups


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 20), max_size=40))
def test_best_fit(lengths):
    groups = best_fit(lengths, 20)
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    sizes = [sum(lengths[i] for i in group) for group in groups]
    assert all(size <= 20 for size in sizes)
    # Groups with equal room may be taken in either order; how full they get is the same.
    assert sorted(sizes) == sorted(sum(lengths[i] for i in group) for group in slow_best_fit(lengths, 20))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 16), min_size=1, max_size=30), st.booleans())
def test_every_row_is_whole_in_one_packed_row(lengths, selected):
    rows = table(lengths)
    if selected:
        rows = rows.select(list(range(len(rows)))[::-1])
    packed = pack(rows, 16)
    assert packed.column_names == ["input_ids", "labels", "position_ids"]
    found = []
    for row in packed:
        assert len(row["input_ids"]) == len(row["labels"]) == len(row["position_ids"]) <= 16
        starts = [i for i, position in enumerate(row["position_ids"]) if position == 0]
        for a, b in zip(starts, [*starts[1:], len(row["input_ids"])], strict=True):
            assert row["position_ids"][a:b] == list(range(b - a))
            assert row["labels"][a] == -100
            found.append((row["input_ids"][a:b], row["labels"][a + 1 : b]))
    assert sorted(found) == sorted((row["input_ids"], row["labels"][1:]) for row in rows)
    assert packed[:] == pack(rows, 16)[:]


def test_facts_and_refusals():
    packed = pack(table([8, 8, 4, 6, 6]), 16)
    assert packing_facts(packed, 16) == {"packed rows": 2, "documents per row": 2.5, "fill %": 100.0}
    with pytest.raises(RequestError, match="a row has 17 tokens, more than 16"):
        pack(table([17]), 16)


def test_a_batch():
    batch = collate_packed(list(pack(table([9, 3, 7]), 12)), pad_token_id=5)
    assert batch["input_ids"].shape == batch["labels"].shape == batch["position_ids"].shape == (2, 12)
    assert batch["input_ids"].dtype == torch.long
    assert batch["input_ids"][1, 7:].tolist() == [5] * 5
    assert batch["labels"][1, 7:].tolist() == [-100] * 5
    assert batch["position_ids"][1].tolist() == [*range(7), *range(5)]
    assert "attention_mask" not in batch
    assert batch["use_cache"] is False


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_loss_and_gradients_of_a_batch_are_those_of_its_rows_alone(attention):
    rows = table([9, 3, 7, 12, 5, 1])
    model = llama(attn_implementation=attention)

    def summed(batch):
        logits = model(**{k: v for k, v in batch.items() if k != "labels"}).logits
        return torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum"
        )

    def gradients(loss):
        model.zero_grad()
        loss.backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    packed = summed(collate_packed(list(pack(rows, 16))))
    alone = sum(
        summed({name: torch.tensor([row[name]]) for name in ("input_ids", "labels")} | {"use_cache": False})
        for row in rows
        if len(row["input_ids"]) > 1
    )
    torch.testing.assert_close(packed, alone)
    torch.testing.assert_close(gradients(packed), gradients(alone), rtol=1e-4, atol=1e-5)


def small(kind, **settings):
    import transformers

    config = getattr(transformers, f"{kind}Config")(vocab_size=32, **settings)
    names = {"GPT2": "GPT2LMHeadModel"}
    torch.manual_seed(0)
    return getattr(transformers, names.get(kind, f"{kind}ForCausalLM"))(config)


GPT2 = dict(n_embd=32, n_layer=2, n_head=4, n_positions=64)
MAMBA = dict(hidden_size=32, num_hidden_layers=2, state_size=8)
OPT = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=64, word_embed_proj_dim=32)
BLOOM = dict(hidden_size=32, n_layer=2, n_head=4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [llama, lambda: small("GPT2", **GPT2)])
def test_models_that_keep_documents_apart_pass(make, dtype):
    model = make().to(dtype).train()
    model.get_input_embeddings().eval()
    modes = [module.training for module in model.modules()]
    check_packing(model, row_to_check(pack(table([9, 3, 7, 12, 5]), 16)))
    assert [module.training for module in model.modules()] == modes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind, settings", [("Mamba", MAMBA), ("OPT", OPT), ("Bloom", BLOOM)])
def test_models_that_mix_them_are_refused(kind, settings, dtype):
    model = small(kind, **settings).to(dtype)
    with pytest.raises(UnsupportedError, match=f"training.packing: {kind}ForCausalLM sees the other documents"):
        check_packing(model, row_to_check(pack(table([9, 3, 7, 12, 5]), 16)))


def test_a_model_whose_positions_go_on_is_refused(monkeypatch):
    """A GPT-2 that masks documents but numbers its positions through."""
    model = small("GPT2", **GPT2)
    embed = model.transformer.wpe.forward
    monkeypatch.setattr(model.transformer.wpe, "forward", lambda at: embed(torch.arange(at.shape[-1])[None]))
    with torch.no_grad():
        model.transformer.wpe.weight.mul_(20)
    with pytest.raises(UnsupportedError, match="reads a document in a packed row otherwise than alone"):
        check_packing(model, row_to_check(pack(table([9, 7]), 16)))


def test_one_document_can_not_be_checked():
    packed = pack(table([9, 9]), 16)
    assert row_to_check(packed) is None
    with pytest.raises(RequestError, match="at least two documents"):
        check_packing(llama(), packed[0])
