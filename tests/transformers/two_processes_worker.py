"""What each process of test_two_processes.py runs: it trains, saves, and writes down what it saw.

    torchrun --nproc_per_node 2 two_processes_worker.py FOLDER

FOLDER/<case>/rank-<n>.json and .safetensors are its report; what a user's run would write is in other folders.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from helpers import llama
from lora_adapters_transformers import LoraCallback
from safetensors.torch import save_file
from transformers import Trainer, TrainingArguments

from lora_adapters.errors import StateError

STEPS = 4
PER_STEP = 4

#: Case -> quantization and options of TrainingArguments.
CASES = {
    "dense": (None, {}),
    "nf4": ("nf4", {}),
    "reentrant": (
        None,
        {"gradient_checkpointing_kwargs": {"use_reentrant": True}, "ddp_find_unused_parameters": False},
    ),
}


def rows(count=32, length=6):
    ids = torch.randint(3, 32, (count, length), generator=torch.Generator().manual_seed(5))
    return [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row} for row in ids]


def arguments(folder, processes, **options):
    settings = dict(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=PER_STEP // processes,
        learning_rate=1e-2,
        logging_steps=1,
        save_steps=2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        seed=11,
        gradient_checkpointing=True,
    )
    return TrainingArguments(**settings | options)


def adapter_tensors(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def train(case, folder, processes=1, rank=0, **options):
    """Train one case. Returns the callback, the trainer, the initial adapter, and what the model was given and did."""
    quantization, settings = CASES[case]
    model = llama()
    # Each process draws initial values of its own: it is the training that must make them equal.
    torch.manual_seed(rank)
    lora = LoraCallback(model, rank=2, quantization=quantization)
    initial = adapter_tensors(lora.model)
    batches, calls = [], []
    lora.model.register_forward_pre_hook(
        lambda module, args, kwargs: batches.append(kwargs["input_ids"].tolist()), with_kwargs=True
    )
    model.model.layers[0].self_attn.register_forward_pre_hook(lambda module, args: calls.append(1))
    args = arguments(folder, processes, **settings | options)
    trainer = Trainer(model=lora.model, args=args, train_dataset=rows(), callbacks=[lora])
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return lora, trainer, initial, {"batches": batches, "attention_calls": len(calls), "losses": losses}


def report(folder, trainer, initial, lora, seen):
    args, rank = trainer.args, trainer.args.process_index
    seen |= {
        "rank": rank,
        "world_size": args.world_size,
        "backend": torch.distributed.get_backend(),
        "wrapper": type(trainer.model_wrapped).__name__,
        "threads": torch.get_num_threads(),
    }
    (folder / f"rank-{rank}.json").write_text(json.dumps(seen))
    save_file(adapter_tensors(lora.model), folder / f"rank-{rank}.safetensors")
    save_file(initial, folder / f"rank-{rank}-initial.safetensors")


def main(folder):
    args = arguments(folder / "none", 2)
    rank = args.process_index
    for case in CASES:
        own = folder / case
        own.mkdir(exist_ok=True)
        lora, trainer, initial, seen = train(case, own / "run", args.world_size, rank)
        trainer.save_model(str(own / "final"))
        lora.adapter.save(own / "saved by every process")
        report(own, trainer, initial, lora, seen)

    # With a folder of its own for each process, the file system says who wrote what.
    _, trainer, _, _ = train("dense", folder / f"written by {rank}" / "run", args.world_size, rank, max_steps=2)
    trainer.save_model(str(folder / f"written by {rank}" / "final"))

    refused = folder / f"refused-{rank}.txt"
    try:
        train("reentrant", folder / "refused", args.world_size, rank, ddp_find_unused_parameters=None)
    except StateError as error:
        refused.write_text(str(error))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
