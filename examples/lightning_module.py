"""A Lightning module on real text with Disco: norms in its loggers, a record for ``disco fit``.

python examples/lightning_module.py --out runs/lightning
python examples/lightning_module.py --out runs/lightning --resume
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import disco
from disco.corpus import documents
from disco.integrations import LightningCallback

CONTEXT, BATCH = 32, 8  # tokens, sequences


class Bytes(LightningModule):
    """Predicts each byte from the two before it."""

    def __init__(self, lr: float, width: int = 48) -> None:
        super().__init__()
        self.lr = lr
        self.embed = nn.Embedding(256, width)
        self.mix = nn.Linear(2 * width, 2 * width, bias=False)
        self.head = nn.Linear(2 * width, 256, bias=False)
        disco.init_(self)  # weights of norm 1

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        return self.head(torch.relu(self.mix(torch.cat([x[:, :-1], x[:, 1:]], dim=-1))))

    def loss(self, tokens: Tensor) -> Tensor:
        return nn.functional.cross_entropy(self(tokens[:, :-1]).flatten(0, 1), tokens[:, 2:].flatten())

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        return self.loss(batch[0])

    def validation_step(self, batch: list[Tensor], index: int) -> None:
        self.log("val_loss", self.loss(batch[0]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return disco.Disco(disco.param_groups(self, self.lr, {"hidden": 1 / 8}), momentum=0.9)


def loaders() -> tuple[DataLoader, DataLoader]:
    """Training and held-out sequences, from the first book of the embedded corpus."""
    _, text = next(documents())
    tokens = torch.tensor(list(text.encode()[: 2**15])).view(-1, CONTEXT)
    return DataLoader(TensorDataset(tokens[128:640]), BATCH), DataLoader(TensorDataset(tokens[:128]), 128)


def trainer_of(arguments: Sequence[str] | None = None) -> tuple[Trainer, Bytes, str | None]:
    """The ``Trainer``, the module, and the checkpoint to resume from."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--lr", type=float, default=2**-4)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("runs/lightning"))
    parser.add_argument("--resume", action="store_true")
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    run = options.out / f"bytes-{options.lr:g}"
    checkpoints = options.out / "checkpoints" / run.name
    trainer = Trainer(
        max_epochs=options.epochs,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=16,
        callbacks=[
            LightningCallback(run, batch=BATCH * CONTEXT),
            ModelCheckpoint(checkpoints, save_last=True, save_on_train_epoch_end=True),
        ],
    )
    return trainer, Bytes(options.lr), str(checkpoints / "last.ckpt") if options.resume else None


if __name__ == "__main__":
    trainer, module, checkpoint = trainer_of()
    trainer.fit(module, *loaders(), ckpt_path=checkpoint)
