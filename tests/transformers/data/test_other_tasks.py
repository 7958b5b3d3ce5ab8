"""Classification, seq2seq and reward data: tokens, labels, what is cut and what is left out."""

import datasets
import pytest
from lora_adapters_transformers.data.encoding import (
    check_classification,
    check_reward,
    check_seq2seq,
    encode_classification,
    encode_reward,
    encode_seq2seq,
)
from lora_adapters_transformers.recipes import (
    ClassificationData,
    RewardData,
    RewardTraining,
    Seq2SeqData,
    Seq2SeqTraining,
    TextTraining,
)
from small_tokenizers import CHATML, make_tokenizer

from lora_adapters.errors import RequestError

PLAIN = make_tokenizer()
BOTH = make_tokenizer(bos=True, eos=True)
CHAT = make_tokenizer(chat_template=CHATML, eos_token="<|im_end|>")


def ids(text):
    return PLAIN(text)["input_ids"]


def classify(
    rows, tokenizer=BOTH, max_length=64, too_long="truncate", label_names=None, features=None, name="train", **data
):
    table = datasets.Dataset.from_list(rows, features=features)
    data = ClassificationData(train="d.csv", **data)
    training = TextTraining(max_length=max_length, too_long=too_long)
    return encode_classification(table, data, training, tokenizer, name=name, label_names=label_names)


def labelled(*labels):
    return [{"text": f"text {i}", "label": label} for i, label in enumerate(labels)]


def test_a_text_and_its_label():
    encoded = classify(labelled("pos", "neg", "pos"))
    assert encoded.label_names == ["neg", "pos"]
    assert encoded.rows["labels"] == [1, 0, 1]
    assert encoded.rows["text"] == ["text 0", "text 1", "text 2"]
    assert encoded.rows[0]["input_ids"] == [1, *ids("text 0"), 2]
    assert encoded.facts.details["labels"] == "neg 1, pos 2"


@pytest.mark.parametrize(
    "labels, names, found",
    [
        ([1, 0, 1], ["0", "1"], [1, 0, 1]),
        ([10, 9, 2], ["2", "9", "10"], [2, 1, 0]),
        (["10", "9", "2"], ["2", "9", "10"], [2, 1, 0]),
        ([True, False], ["false", "true"], [1, 0]),
        ([1.0, 0.0, None], ["0", "1"], [1, 0]),
        ([" yes", "no "], ["no", "yes"], [1, 0]),
    ],
)
def test_labels_of_every_kind(labels, names, found):
    encoded = classify(labelled(*labels))
    assert encoded.label_names == names
    assert encoded.rows["labels"] == found


def test_given_labels_keep_their_order_and_name_numbers():
    assert classify(labelled("a", "b"), labels=["b", "a", "c"]).rows["labels"] == [1, 0]
    encoded = classify(labelled(1, 0), labels=["bad", "good"])
    assert (encoded.label_names, encoded.rows["labels"]) == (["bad", "good"], [1, 0])
    with pytest.raises(RequestError, match=r"row 2: label '2' is none of data\.labels"):
        classify(labelled(1, 2), labels=["bad", "good"])
    with pytest.raises(RequestError, match=r"label '1' is none of data\.labels"):
        classify(labelled(1), labels=["2", "9", "10"], name="eval")


def test_the_names_a_dataset_brings():
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["z", "a", "m"])}
    )
    encoded = classify(labelled(1, 0, -1), features=features)
    assert (encoded.label_names, encoded.rows["labels"]) == (["z", "a", "m"], [1, 0])
    assert encoded.facts.details["left out: no label"] == 1


def test_labels_of_evaluation_data():
    assert classify(labelled("pos"), label_names=["neg", "pos"], name="eval").rows["labels"] == [1]
    with pytest.raises(
        RequestError,
        match=r"eval data, row 2: label 'posi' is none of the training data's labels; did you mean 'pos'\?",
    ):
        classify(labelled("neg", "posi"), label_names=["neg", "pos"], name="eval")


@pytest.mark.parametrize(
    "labels, message",
    [
        (["x", "x"], "all rows of the train data have the label 'x'"),
        ([0.5, 1.0], "holds 0.5, a measure rather than a class"),
        ([["a"], ["b"]], "holds lists or mappings, where one label is needed"),
        ([None, None], "have the label None"),
    ],
)
def test_labels_that_are_none(labels, message):
    with pytest.raises(RequestError, match=message):
        classify(labelled(*labels))


def test_long_texts_and_pairs_keep_their_special_tokens():
    rows = [{"a": "word " * 30, "b": "other " * 30, "label": i % 2} for i in range(2)]
    encoded = classify([*rows, {"a": "x", "b": "", "label": 1}], max_length=16, text="a", text_pair="b")
    row = encoded.rows[0]
    assert len(row["input_ids"]) == 16
    assert (row["input_ids"][0], row["input_ids"].count(2), row["input_ids"][-1]) == (1, 2, 2)
    assert encoded.facts.details["rows too long"] == 2
    assert encoded.facts.details["left out: empty"] == 1
    with pytest.raises(RequestError, match="no row is left"):
        classify(rows, max_length=16, too_long="drop", text="a", text_pair="b")


def test_token_types_as_the_tokenizer_gives_them():
    tokenizer = make_tokenizer(bos=True, eos=True)
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    rows = classify([{"a": "x", "b": "yy", "label": i} for i in range(2)], tokenizer, text="a", text_pair="b").rows
    expected = tokenizer("x", "yy")
    assert rows[0]["input_ids"] == expected["input_ids"]
    assert rows[0]["token_type_ids"] == expected["token_type_ids"]
    assert 1 in rows[0]["token_type_ids"]


@pytest.mark.parametrize(
    "check, data, message",
    [
        (
            check_classification,
            ClassificationData(train="x", label="lable"),
            "data.label: no column 'lable'; did you mean",
        ),
        (check_classification, ClassificationData(train="x", text="txt"), "data.text: no column 'txt'"),
        (check_classification, ClassificationData(train="x", labels=["a"]), "data.labels: name at least two"),
        (check_classification, ClassificationData(train="x", labels=["a", "a"]), "data.labels: 'a' is named twice"),
        (check_seq2seq, Seq2SeqData(train="x", source="text", target="txet"), "data.target: no column 'txet'"),
        (check_reward, RewardData(train="x", chosen="text", rejected="txet"), "data.rejected: no column 'txet'"),
        (check_reward, RewardData(train="x", chosen="text", rejected="text"), "are both 'text'"),
    ],
)
def test_columns_are_checked_before_any_model_is_loaded(check, data, message):
    with pytest.raises(RequestError, match=message):
        check(data, ["text", "label"])


def translate(rows, tokenizer=BOTH, **training):
    data = Seq2SeqData(train="d.csv", source="say: {a}", target="b")
    return encode_seq2seq(datasets.Dataset.from_list(rows), data, Seq2SeqTraining(**training), tokenizer)


@pytest.mark.parametrize("tokenizer, begin, end", [(BOTH, [1], [2]), (PLAIN, [], [])])
def test_sources_and_targets(tokenizer, begin, end):
    encoded = translate([{"a": "x", "b": "yes"}, {"a": None, "b": "y"}, {"a": "x", "b": ""}], tokenizer)
    row = encoded.rows[0]
    assert row["input_ids"] == [*begin, *ids("say: x"), *end]
    assert row["labels"] == [*begin, *ids("yes"), 2]
    assert (row["source_text"], row["target_text"]) == ("say: x", "yes")
    assert encoded.facts.details == {
        "tokens": len(row["input_ids"] + row["labels"]),
        "answer tokens": len(row["labels"]),
        "left out: empty": 2,
    }


@pytest.mark.parametrize("tokenizer", [BOTH, PLAIN])
def test_long_sources_and_targets(tokenizer):
    long = "word " * 30
    rows = [{"a": long, "b": "y"}, {"a": "x", "b": long}, {"a": long, "b": long}, {"a": "x", "b": "y"}]
    encoded = translate(rows, tokenizer, max_length=12, max_target_length=6)
    assert encoded.facts.details["rows too long"] == 3
    assert [len(row) for row in encoded.rows["input_ids"]][::2] == [12, 12]
    assert [len(row) for row in encoded.rows["labels"]][1:3] == [6, 6]
    assert all(row[-1] == 2 and row.count(2) == 1 for row in encoded.rows["labels"])
    assert translate(rows, tokenizer, max_length=12, max_target_length=6, too_long="drop").facts.rows == 1
    with pytest.raises(RequestError, match=r"row 2 has \d+ tokens, more than training.max_target_length 6"):
        translate([rows[3], rows[1]], tokenizer, max_target_length=6, too_long="error")


def prefer(rows, tokenizer, max_length=64, too_long="truncate", **data):
    training = RewardTraining(max_length=max_length, too_long=too_long)
    return encode_reward(datasets.Dataset.from_list(rows), RewardData(train="d.jsonl", **data), training, tokenizer)


CHATML_PAIR = "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n{}<|im_end|>\n"


def test_pairs_of_texts():
    rows = [{"chosen": "Why? Because.", "rejected": "Why? No."}]
    row = prefer(rows, PLAIN).rows[0]
    assert (row["chosen_ids"], row["rejected_ids"]) == ([*ids("Why? Because."), 2], [*ids("Why? No."), 2])
    with_prompt = prefer([{"p": "Why? ", "chosen": "Because.", "rejected": "No."}], PLAIN, prompt="p").rows[0]
    assert with_prompt["chosen_ids"] == row["chosen_ids"]
    assert [with_prompt[f"{key}_text"] for key in ("prompt", "chosen", "rejected")] == ["Why? ", "Because.", "No."]


def test_pairs_through_the_chat_template():
    question, yes, no = (
        {"role": r, "content": c} for r, c in [("user", "Why?"), ("assistant", "Yes"), ("assistant", "No")]
    )
    texts = [{"prompt": "Why?", "chosen": "Yes", "rejected": "No"}]
    whole = [{"chosen": [question, yes], "rejected": [question, no]}]
    divided = [{"prompt": [question], "chosen": [yes], "rejected": [no]}]
    mixed = [{"prompt": "Why?", "chosen": [yes], "rejected": [no]}]
    expected = {"chosen_ids": ids(CHATML_PAIR.format("Yes")), "rejected_ids": ids(CHATML_PAIR.format("No"))}
    for rows, prompt in [(texts, "prompt"), (whole, None), (divided, "prompt"), (mixed, "prompt")]:
        row = prefer(rows, CHAT, prompt=prompt).rows[0]
        assert {key: row[key] for key in expected} == expected
        assert (row["chosen_text"], row["rejected_text"]) == ("Yes", "No")
        assert "Why?" in row["prompt_text"]
    with pytest.raises(RequestError, match="no chat template"):
        prefer(whole, PLAIN)


def test_pairs_with_nothing_to_tell_apart():
    rows = [
        {"chosen": "a", "rejected": "a"},
        {"chosen": "", "rejected": "a"},
        {"chosen": "long " * 40 + "a", "rejected": "long " * 40 + "b"},
        {"chosen": "b " + "long " * 40, "rejected": "a"},
    ]
    encoded = prefer(rows, PLAIN, max_length=20)
    assert encoded.facts.details == {
        "form": "text",
        "tokens": sum(len(encoded.rows[0][key]) for key in ("chosen_ids", "rejected_ids")),
        "rows too long": 2,
        "left out: chosen and rejected are the same": 1,
        "left out: empty": 1,
        "left out: the same when cut to max_length": 1,
    }
    assert [len(encoded.rows[0][key]) for key in ("chosen_ids", "rejected_ids")] == [20, 2]
    with pytest.raises(RequestError, match=r"row 3 has \d+ tokens"):
        prefer(rows, PLAIN, max_length=20, too_long="error")


def test_trl_trains_on_the_pairs(tmp_path):
    from helpers import llama
    from transformers import LlamaForSequenceClassification
    from trl import RewardConfig, RewardTrainer

    rows = [{"prompt": f"Why {i}?", "chosen": "Yes", "rejected": "No"} for i in range(8)]
    encoded = prefer(rows, CHAT, prompt="prompt").rows
    config = llama(vocab_size=512).config
    config.num_labels, config.pad_token_id = 1, 0
    model = LlamaForSequenceClassification(config)
    args = RewardConfig(
        output_dir=str(tmp_path), max_steps=30, per_device_train_batch_size=8, max_length=None, learning_rate=1e-2,
        report_to=[], disable_tqdm=True, use_cpu=True, logging_steps=1, save_strategy="no", bf16=False,
        gradient_checkpointing=False,
    )  # fmt: skip
    trainer = RewardTrainer(model=model, args=args, train_dataset=encoded, processing_class=CHAT)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[0] > 0.6
    assert losses[-1] < 0.1
