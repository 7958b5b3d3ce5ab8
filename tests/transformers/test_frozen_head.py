"""A task head that modules_to_save leaves out stays as it is, here and in stock PEFT, whose task classes would train it."""

import json

import pytest
import torch
import transformers as tf
from helpers import assert_same, perturb, state
from lora_adapters_transformers import LoraCallback
from peft import AutoPeftModel, LoraConfig, PeftModel, TaskType, get_peft_model
from peft.utils import ModulesToSaveWrapper
from safetensors.torch import load_file

import lora_adapters as la
from lora_adapters.errors import RequestError
from lora_adapters.trained import PEFT_HEADS

HEADS = {
    tf.BertForSequenceClassification: "classifier",
    tf.BertForTokenClassification: "classifier",
    tf.BertForQuestionAnswering: "qa_outputs",
}
IDS = torch.randint(3, 32, (4, 6), generator=torch.Generator().manual_seed(9))


def bert(cls=tf.BertForSequenceClassification, seed=0):
    torch.manual_seed(seed)
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, vocab_size=32)
    return cls(tf.BertConfig(**sizes, initializer_range=0.3))


def outputs(model):
    with torch.no_grad():
        return torch.cat([t.flatten() for t in model.eval()(input_ids=IDS).to_tuple()])


def wrapped(model):
    return {n for n, m in model.named_modules() if isinstance(m, ModulesToSaveWrapper)}


def head_is_frozen(model, head):
    return not any(p.requires_grad for p in model.get_submodule(head).parameters())


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"targets": ["query", "HEAD"]}], ids=str)
@pytest.mark.parametrize("cls", HEADS)
def test_nothing_is_trained_whole(cls, options, tmp_path):
    head = HEADS[cls]
    options = {k: [n.replace("HEAD", head) for n in v] if k == "targets" else v for k, v in options.items()}
    model = bert(cls)
    before, untrained = state(model), outputs(model)
    adapter = la.attach(model, rank=2, modules_to_save=[], **options)
    assert not wrapped(model)
    assert all(".lora_" in n for n, p in model.named_parameters() if p.requires_grad)
    torch.testing.assert_close(outputs(adapter.model), untrained)
    assert adapter.plan.trained == ()
    assert adapter.plan.task_type is None
    assert f"'{head}' is not trained whole" in str(adapter.plan)
    perturb(model)
    expected = outputs(adapter.model)
    assert not torch.allclose(expected, untrained, atol=1e-2)
    adapter.save(tmp_path)
    assert all(".lora_" in key for key in load_file(tmp_path / "adapter_model.safetensors"))

    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["task_type"], config["modules_to_save"]) == (None, None)
    theirs = PeftModel.from_pretrained(bert(cls), tmp_path, is_trainable=True)
    assert not wrapped(theirs)
    assert all(".lora_" in n for n, p in theirs.named_parameters() if p.requires_grad)
    torch.testing.assert_close(outputs(theirs), expected)
    again = la.restore(bert(cls), tmp_path)
    torch.testing.assert_close(outputs(again.model), expected)
    assert not wrapped(again.model)
    adapter.detach()
    assert_same(model, before)


def test_other_modules_without_the_head(tmp_path):
    model = bert()
    adapter = la.attach(model, rank=2, modules_to_save=["pooler"])
    assert wrapped(model) == {"bert.pooler"}
    assert head_is_frozen(model, "classifier")
    perturb(model)
    adapter.save(tmp_path)
    for loaded in (PeftModel.from_pretrained(bert(), tmp_path), la.restore(bert(), tmp_path).model):
        assert wrapped(loaded.get_base_model()) == {"bert.pooler"}
        torch.testing.assert_close(outputs(loaded), outputs(adapter.model))


@pytest.mark.parametrize("order", [(None, []), ([], None)], ids=str)
def test_beside_an_adapter_that_trains_the_head(order, tmp_path):
    model = bert()
    untrained, expected = outputs(model), {}
    for name, wanted in zip("ab", order, strict=True):
        adapter = la.attach(model, rank=2, adapter_name=name, modules_to_save=wanted)
        torch.testing.assert_close(outputs(model), untrained)
        perturb(model)
        expected[name] = outputs(model)
        adapter.save(tmp_path / name)
        head = [k for k in load_file(tmp_path / name / "adapter_model.safetensors") if "classifier" in k]
        assert len(head) == (2 if wanted is None else 0)
    for name, values in expected.items():
        adapter.model.set_adapter(name)
        torch.testing.assert_close(outputs(model), values)
        torch.testing.assert_close(outputs(PeftModel.from_pretrained(bert(), tmp_path / name)), values)
        torch.testing.assert_close(outputs(la.restore(bert(), tmp_path / name).model), values)
    both = bert()
    for name in expected:
        adapter = la.restore(both, tmp_path / name, adapter_name=name)
    torch.testing.assert_close(outputs(adapter.model), expected["b"])
    adapter.detach()
    torch.testing.assert_close(outputs(both), expected["a"])


def test_on_a_users_own_peft_model_for_the_task():
    model = get_peft_model(bert(), LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["key"]), adapter_name="theirs")
    la.attach(model, rank=2, adapter_name="ours", modules_to_save=[])
    assert all(".lora_" in n and ".ours." in n for n, p in model.named_parameters() if p.requires_grad)


def test_trainer_trains_and_evaluates(tmp_path):
    lora = LoraCallback(bert(), rank=4, modules_to_save=[])
    head = bert().classifier
    ids = torch.randint(3, 32, (16, 6), generator=torch.Generator().manual_seed(5))
    rows = [{"input_ids": row, "labels": torch.tensor(int(row[0] >= 16)), "extra": "unused"} for row in ids]
    settings = dict(max_steps=30, per_device_train_batch_size=8, learning_rate=3e-2, save_steps=30, eval_steps=10)
    args = tf.TrainingArguments(
        **settings, output_dir=str(tmp_path), eval_strategy="steps", report_to=[], use_cpu=True, disable_tqdm=True
    )
    trainer = tf.Trainer(model=lora.model, args=args, train_dataset=rows, eval_dataset=rows, callbacks=[lora])
    trainer.train()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(losses) == 3
    assert losses[-1] < losses[0]
    assert trainer.predict(rows).predictions.shape == (16, 2)
    assert torch.equal(lora.adapter.base.classifier.weight, head.weight)
    folder = tmp_path / "checkpoint-30"
    expected = outputs(lora.model)
    torch.testing.assert_close(outputs(PeftModel.from_pretrained(bert(), folder)), expected)
    torch.testing.assert_close(outputs(la.restore(bert(), folder).model), expected)
    resumed = LoraCallback(bert(), rank=4, modules_to_save=[])
    args.max_steps = 31
    again = tf.Trainer(model=resumed.model, args=args, train_dataset=rows, eval_dataset=rows, callbacks=[resumed])
    again.train(resume_from_checkpoint=str(folder))
    assert again.state.global_step == 31


def test_the_auto_classes_and_merging_take_the_head_of_the_base(tmp_path):
    bert().save_pretrained(tmp_path / "base")
    model = la.load(str(tmp_path / "base"), device="cpu")
    adapter = la.attach(model, rank=2, modules_to_save=[])
    perturb(model)
    expected = outputs(model)
    adapter.save(tmp_path / "adapter")
    for auto in (AutoPeftModel, tf.AutoModelForSequenceClassification):
        torch.testing.assert_close(outputs(auto.from_pretrained(tmp_path / "adapter")), expected)
    made = la.merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    assert (made.model, made.trained) == ("BertForSequenceClassification", ())
    merged = tf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(outputs(merged), expected, rtol=1e-4, atol=1e-5)


def test_a_file_of_the_task_that_names_and_holds_no_head(tmp_path):
    """Written by another tool: stock PEFT keeps the base's head then, and so does restore."""
    model = bert()
    adapter = la.attach(model, rank=2, modules_to_save=[])
    perturb(model)
    adapter.save(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"task_type": "SEQ_CLS"}))
    torch.testing.assert_close(outputs(la.restore(bert(), tmp_path).model), outputs(model))


@pytest.mark.parametrize("task", ["SEQ_CLS", TaskType.SEQ_CLS])
@pytest.mark.parametrize("wanted", [[], ["pooler"]])
def test_a_task_type_that_would_train_the_head_is_refused(task, wanted):
    model = bert()
    before = state(model)
    with pytest.raises(RequestError, match=r"task_type='SEQ_CLS' makes PEFT train 'classifier'.*leave out task_type"):
        la.attach(model, config=LoraConfig(task_type=task, modules_to_save=wanted, r=2))
    assert_same(model, before)
    la.attach(model, config=LoraConfig(task_type=task, modules_to_save=[*wanted, "classifier"], r=2))


def test_what_pefts_task_classes_train_by_themselves():
    """If this fails, PEFT changed what these classes add: correct PEFT_HEADS."""
    from peft import MODEL_TYPE_TO_PEFT_MODEL_MAPPING

    added = {}
    for task, cls in MODEL_TYPE_TO_PEFT_MODEL_MAPPING.items():
        config = LoraConfig(target_modules=["query"], modules_to_save=["pooler"])
        model = bert(tf.BertLMHeadModel if "LM" in task else tf.BertForSequenceClassification)
        if task == "SEQ_2_SEQ_LM":
            continue  # needs an encoder-decoder, and has no head that is trained whole
        cls(model, config)
        if extra := tuple(name for name in config.modules_to_save if name != "pooler"):
            added[getattr(task, "value", task)] = extra
    assert added == PEFT_HEADS
