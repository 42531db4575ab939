"""A Trainer of Hugging Face's whose loss is a combined prediction's, or a rule's."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from tests.trainers.cells import Cell, optimizer_of

__all__ = ["trained"]


class Named(nn.Module):
    """A model as Hugging Face's are: called by name, and with whatever else a trainer passes."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, poses: Tensor, **_: Any) -> Any:
        return self.module(poses)


class RuleTrainer(Trainer):
    """Its loss is one of the table's."""

    loss_is_scaled_for_ga = False  # else it is not divided by the number of accumulated steps

    def __init__(self, cell: Cell, model: Named, **options: Any) -> None:
        super().__init__(model, **options)
        self.loss_of = cell.way.loss(model.module)

    def compute_loss(self, model: nn.Module, inputs: Any, *_: Any, **__: Any) -> Any:
        return self.loss_of(lambda poses: model(poses=poses), (inputs["poses"], inputs["target"]))


def trained(cell: Cell, folder: Path) -> nn.Module:
    """The module, after all steps."""
    model = Named(cell.module())
    optimizer = optimizer_of(model.parameters())
    arguments = TrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        bf16=cell.setting.half,
        num_train_epochs=1,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=cell.setting.accumulated,
        max_grad_norm=0.0,
        train_sampling_strategy="sequential",
        report_to=[],
        logging_strategy="no",
        save_strategy="no",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
    )
    trainer = RuleTrainer(
        cell,
        model,
        args=arguments,
        train_dataset=[{"poses": poses, "target": target} for poses, target in cell.batches()],
        data_collator=lambda items: items[0],
        optimizers=(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)),
    )
    trainer.train()
    return model.module
