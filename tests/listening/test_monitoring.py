"""The page on monitoring: its numbers are right, and trainers train as if nobody listened."""

import itertools
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from tests import reference

PAGE = Path(__file__).parents[2] / "docs" / "monitoring.md"


def _blocks(head: str) -> list[str]:
    """The code blocks of the page with a head, but for those that show what it prints."""
    fence = re.compile(rf"^```{head}\n(?!>>>)(.*?)^```", re.MULTILINE | re.DOTALL)
    return fence.findall(PAGE.read_text(encoding="utf-8"))


@cache
def _page() -> ModuleType:
    """The page, run from top to bottom."""
    module = ModuleType("monitoring")
    with torch.random.fork_rng():
        exec("\n".join(_blocks("python")), module.__dict__)
    return module


def test_the_noise_scale_has_unbiased_parts() -> None:
    population = torch.randn(3, 5, dtype=torch.float64) + 1.0  # gradients, drawn one by one
    watch = _page().Watch()
    draws = list(itertools.product(range(3), repeat=4))
    for draw in draws:
        rows = population[list(draw)]
        watch.read(rows @ rows.T)
    mean = population.mean(0)
    variance = (population - mean).square().sum() / 3
    assert watch.noise / len(draws) == pytest.approx(float(variance))
    assert watch.signal / len(draws) == pytest.approx(float(mean.square().sum()))


def test_its_numbers_are_those_of_plain_rows() -> None:
    page = _page()
    model = nn.Linear(5, 3).double()
    losses = nn.functional.cross_entropy(
        model(torch.randn(7, 5, dtype=torch.float64)), torch.arange(7) % 3, reduction="none"
    )
    rows = reference.rows(losses, reference.trainable(model))
    with page.Engine(model).listen(losses) as heard:
        losses.mean().backward()
    found = page.Watch().read(heard.jacobian.gramian())

    batch = torch.cat([p.grad.flatten() for p in model.parameters()]).square().sum()
    mean = rows.norm(dim=1).square().mean()
    against = [(rows[i] @ rows[j] < 0) for i, j in itertools.permutations(range(7), 2)]
    expected = {
        "norm/median": rows.norm(dim=1).median(),
        "norm/max": rows.norm(dim=1).max(),
        "noise_scale": 7 * (mean - batch) / (7 * batch - mean),
        "conflicts": torch.stack(against).double().mean(),
    }
    assert found == pytest.approx({key: float(value) for key, value in expected.items()})


@pytest.mark.parametrize(
    "options", [{}, {"accumulate_grad_batches": 2}, {"precision": "bf16-mixed"}], ids=str
)
def test_lightning_trains_as_if_nobody_listened(options: dict[str, Any], tmp_path: Path) -> None:
    page = _page()
    quiet = ("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing")
    data = DataLoader(TensorDataset(torch.randn(48, 8), torch.randint(4, (48,))), batch_size=8)
    ends = []
    for every in (1, 1000):
        torch.manual_seed(3)
        module = page.Classifier(every)
        if every > 1:
            module.engine.listen = lambda _: None
        trainer = page.lightning.Trainer(
            max_epochs=1, accelerator="cpu", devices=1, default_root_dir=tmp_path,
            **dict.fromkeys(quiet, False) | options,
        )  # fmt: skip
        trainer.fit(module, data)
        assert ("conflicts" in trainer.logged_metrics) == (every == 1)
        ends.append([p.detach() for p in module.parameters()])
    for one, other in zip(*ends, strict=True):
        assert torch.equal(one, other)


class _Sentences(Dataset[dict[str, Tensor]]):
    """Random tokens, and a class for each sentence."""

    def __len__(self) -> int:
        return 24

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        draw = torch.Generator().manual_seed(number)
        tokens = torch.randint(50, (9,), generator=draw)
        return {"input_ids": tokens, "labels": torch.tensor(number % 3)}


def _trained(
    trainer: Callable[..., Any], folder: Path, **options: Any
) -> tuple[nn.Module, list[dict[str, float]]]:
    transformers = pytest.importorskip("transformers", reason="pip install transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, num_labels=3,
    )  # fmt: skip
    model = transformers.BertForSequenceClassification(config)
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), max_steps=4, per_device_train_batch_size=4, report_to=[],
        use_cpu=True, save_strategy="no", logging_strategy="no", disable_tqdm=True,
        gradient_accumulation_steps=options.pop("accumulation", 1),
    )  # fmt: skip
    running = trainer(model, arguments, train_dataset=_Sentences(), **options)
    running.train()
    return model, running.state.log_history


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_trainer_of_hugging_face_trains_as_if_nobody_listened(
    accumulation: int, tmp_path: Path
) -> None:
    pytest.importorskip("transformers", reason="pip install transformers")
    names: dict[str, Any] = {"__name__": "hf_trainer"}
    (block,) = _blocks(r"python hf_trainer\.py")
    exec(block, names)
    watched = names["WatchedTrainer"]

    class Plain(watched):  # type: ignore[misc, valid-type]
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, watch=None, every=1000, **options)
            self.engine.listen = lambda _: self
            self.start = lambda: None

    watch = _page().Watch()
    model, log = _trained(watched, tmp_path, watch=watch, every=2, accumulation=accumulation)
    plain, _ = _trained(Plain, tmp_path, accumulation=accumulation)
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(one, other)
    numbers = [line for line in log if "noise_scale" in line]
    assert len(numbers) == 2 * accumulation  # of 4 steps every second one, each micro-batch
    assert all(0 <= line["conflicts"] <= 1 and line["norm/max"] > 0 for line in numbers)
