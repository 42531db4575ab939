"""A LightningModule that holds a MultiPose, and the same training by hand."""

from pathlib import Path
from typing import Any

import lightning
import torch
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler

from posegrad import Combination, MultiPose
from tests.trainers.cells import Batch, Cell, optimizer_of
from tests.trainers.oracle import RULES, Compound, assert_same, compounds, network, plain_step

MAX_NORM, EPOCHS, STEPS = 0.3, 2, 3


class Affinity(lightning.LightningModule):
    """Automatic optimization: training_step returns a loss, and Lightning does the rest."""

    def __init__(self, rule: Combination, schedule: str = "auto") -> None:
        super().__init__()
        self.multipose = MultiPose(network(), rule, schedule=schedule)

    def training_step(self, batch: Compound, _: int) -> Tensor:
        poses, target = batch
        return (self.multipose(poses).prediction - target).square()

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.2, momentum=0.9)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.7)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


class Trained(lightning.LightningModule):
    """A cell of the table."""

    def __init__(self, cell: Cell) -> None:
        super().__init__()
        self.module = cell.module()
        self.loss = cell.way.loss(self.module)

    def training_step(self, batch: Batch, _: int) -> Tensor:
        return self.loss(self.module, batch)

    def configure_optimizers(self) -> Any:
        return optimizer_of(self.parameters())


def trainer(folder: Path, **options: Any) -> lightning.Trainer:
    """On the CPU, silent, and clipping the norm of all gradients."""
    quiet = ("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing")
    defaults = {"max_epochs": EPOCHS, "devices": 1, "gradient_clip_val": MAX_NORM}
    return lightning.Trainer(
        accelerator="cpu",
        default_root_dir=folder,
        **dict.fromkeys(quiet, False) | defaults | options,
    )


def plain_training(name: str, *, ranks: int) -> MultiPose:
    """All epochs by hand, and with plain autograd."""
    plain = MultiPose(network(), RULES[name][1]())
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.2, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.7)
    data, norms = compounds(STEPS * ranks), []
    for step in [*range(STEPS)] * EPOCHS:
        plain_step(plain.model, plain.rule, data[step * ranks : (step + 1) * ranks])
        norms.append(torch.nn.utils.clip_grad_norm_(plain.parameters(), MAX_NORM))
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    assert max(norms) > MAX_NORM  # something was clipped
    return plain


def assert_fits_like_a_plain_loop(name: str, folder: Path, *, ranks: int = 1) -> None:
    """The same parameters, whether training ran through or was stopped and resumed."""
    schedule, rule = RULES[name]
    options = {"devices": ranks, "strategy": "ddp"} if ranks > 1 else {}
    compounds_of_all = compounds(STEPS * ranks)
    # Lightning's own sampler for several processes shuffles.
    sampler = DistributedSampler(compounds_of_all, shuffle=False) if ranks > 1 else None
    data = DataLoader(compounds_of_all, batch_size=None, sampler=sampler)
    plain = plain_training(name, ranks=ranks)

    module = Affinity(rule(), schedule)
    trainer(folder, **options).fit(module, data)
    assert_same(module.multipose, plain)

    first = trainer(folder, max_epochs=1, **options)
    first.fit(Affinity(rule(), schedule), data)
    checkpoint = folder / "one_epoch.ckpt"
    first.save_checkpoint(checkpoint)  # the first rank writes, and the others wait
    module = Affinity(rule(), schedule)
    for p in module.parameters():
        p.data.zero_()  # whatever it has, it has from the checkpoint
    trainer(folder, **options).fit(module, data, ckpt_path=checkpoint)
    assert_same(module.multipose, plain)
