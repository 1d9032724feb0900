"""A Llama or GPT-2 of transformers on real text: ``Trainer`` with Disco, norms in its logs, a record for ``disco fit``.

python examples/huggingface.py --model gpt2 --out runs/hf
python examples/huggingface.py --model gpt2 --out runs/hf --resume
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)

import disco
from disco.corpus import documents
from disco.integrations import TransformersCallback

CONTEXT = 64


def model_of(kind: str, width: int, depth: int) -> PreTrainedModel:
    """On bytes, with heads of 16; the GPT-2 is tied, as always."""
    heads = width // 16
    if kind == "gpt2":
        sizes = {"n_embd": width, "n_layer": depth, "n_head": heads, "n_positions": CONTEXT}
        return GPT2LMHeadModel(GPT2Config(vocab_size=256, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **sizes))
    sizes = {"hidden_size": width, "num_hidden_layers": depth, "num_attention_heads": heads}
    return LlamaForCausalLM(LlamaConfig(vocab_size=256, intermediate_size=3 * width, **sizes))


def sequences() -> list[dict[str, Tensor]]:
    """The first book of the embedded corpus, as bytes."""
    _, text = next(documents())
    tokens = torch.tensor(list(text.encode()))
    rows = tokens[: len(tokens) // CONTEXT * CONTEXT].view(-1, CONTEXT)
    return [{"input_ids": row, "labels": row} for row in rows]


def trainer_of(arguments: Sequence[str] | None = None) -> tuple[Trainer, bool]:
    """The ``Trainer``, and whether to resume."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", choices=("llama", "gpt2"), default="llama")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--depth", type=int, default=2)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=8, help="sequences")
    parser.add_argument("--lr", type=float, default=2**-4)
    parser.add_argument("--out", type=Path, default=Path("runs/hf"))
    parser.add_argument("--resume", action="store_true")
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    model = model_of(options.model, options.width, options.depth)
    disco.init_(model)  # weights of norm 1
    groups = disco.param_groups(model, lr=options.lr, ratios={"hidden": 1 / 8})
    print(groups.describe())

    run = options.out / f"{options.model}-d{options.width}-{options.lr:g}-{options.batch}"
    data = sequences()
    trainer = Trainer(
        model,
        TrainingArguments(
            output_dir=str(options.out / "checkpoints" / run.name),
            max_steps=options.steps,
            per_device_train_batch_size=options.batch,
            lr_scheduler_type="constant",
            max_grad_norm=0.0,  # the steepest step does not depend on the size of the gradient
            logging_steps=options.steps // 12,
            save_steps=options.steps // 4,
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        ),
        train_dataset=data[64:],
        eval_dataset=data[:64],
        optimizer_cls_and_kwargs=(disco.Disco, {"params": groups, "momentum": 0.9}),
        callbacks=[TransformersCallback(run, context=CONTEXT, evaluate=True)],
    )
    return trainer, options.resume


if __name__ == "__main__":
    trainer, resume = trainer_of()
    trainer.train(resume_from_checkpoint=resume)
