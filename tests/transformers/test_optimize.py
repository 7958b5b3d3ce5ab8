"""optimize under transformers' and TRL's trainers: they train the same adapter, save the same files and resume from them."""

import pytest
import torch
from helpers import llama
from packaging.version import Version
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import LoraLayer
from safetensors.torch import load_file
from small_tokenizers import make_tokenizer
from transformers import Trainer, TrainingArguments

import lora_adapters as la
from lora_adapters.layers.optimized import stock_class

STEPS = 6
CONFIG = dict(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False)


def rows(count=16):
    generator = torch.Generator().manual_seed(2)
    ids = [torch.randint(3, 32, (8,), generator=generator) for _ in range(count)]
    return [{"input_ids": row, "labels": row} for row in ids]


def settings(folder, **options):
    common = dict(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        logging_steps=1,
        save_steps=STEPS // 2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        seed=11,
    )
    return common | options


def all_optimized(model):
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    return bool(layers) and all(stock_class(type(layer)) is not None for layer in layers)


def losses(trainer):
    return torch.tensor([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])


def assert_same_training(ours, stock, folder):
    """The same losses, the same adapter up to rounding (Adam turns it into steps of its own), the same files."""
    assert len(losses(ours)) == STEPS
    torch.testing.assert_close(losses(ours), losses(stock), rtol=1e-4, atol=0)
    for checkpoint in (f"checkpoint-{STEPS // 2}", f"checkpoint-{STEPS}"):
        names = [sorted(path.name for path in (folder / who / checkpoint).iterdir()) for who in ("ours", "stock")]
        assert names[0] == names[1]
        assert "adapter_model.safetensors" in names[0]
        mine, theirs = (load_file(folder / who / checkpoint / "adapter_model.safetensors") for who in ("ours", "stock"))
        assert mine.keys() == theirs.keys()
        for name, value in mine.items():
            torch.testing.assert_close(value, theirs[name], rtol=0, atol=1e-3)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_trainer(checkpointing, tmp_path):
    trainers = {}
    for who in ("stock", "ours"):
        torch.manual_seed(4)
        model = get_peft_model(llama(), LoraConfig(**CONFIG))
        if who == "ours":
            la.optimize(model)
        args = TrainingArguments(**settings(tmp_path / who, gradient_checkpointing=checkpointing))
        trainers[who] = Trainer(model=model, args=args, train_dataset=rows())
        trainers[who].train()
    assert all_optimized(trainers["ours"].model)
    assert_same_training(trainers["ours"], trainers["stock"], tmp_path)

    torch.manual_seed(4)
    again = get_peft_model(llama(), LoraConfig(**CONFIG))
    la.optimize(again)
    trainer = Trainer(model=again, args=TrainingArguments(**settings(tmp_path / "ours")), train_dataset=rows())
    trainer.train(resume_from_checkpoint=str(tmp_path / "ours" / f"checkpoint-{STEPS // 2}"))
    assert all_optimized(again)
    torch.testing.assert_close(losses(trainer)[-1], losses(trainers["stock"])[-1], rtol=1e-4, atol=0)


def test_sft_trainer_made_the_adapter(tmp_path):
    """The trainer wraps the model itself; it is optimized after that, before training."""
    trl = pytest.importorskip("trl")
    if Version(trl.__version__) < Version("1.16"):
        pytest.skip("TRL before 1.16 trains on a GPU only")
    datasets = pytest.importorskip("datasets")
    tokenizer = make_tokenizer()
    trainers = {}
    for who in ("stock", "ours"):
        torch.manual_seed(4)
        trainers[who] = trainer = trl.SFTTrainer(
            model=llama(),
            args=trl.SFTConfig(**settings(tmp_path / who, max_length=16, bf16=False)),
            train_dataset=datasets.Dataset.from_list([{"input_ids": row["input_ids"].tolist()} for row in rows()]),
            processing_class=tokenizer,
            peft_config=LoraConfig(task_type="CAUSAL_LM", **CONFIG),
        )
        assert isinstance(trainer.model, PeftModel)
        if who == "ours":
            report = la.optimize(trainer.model)
            assert report.counts == {"split": 14}
        trainer.train()
    assert all_optimized(trainers["ours"].model)
    assert_same_training(trainers["ours"], trainers["stock"], tmp_path)
