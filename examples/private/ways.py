"""Ways to train: a step, the loader it takes images from, and what all steps so far cost."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass

from opacus import PrivacyEngine
from opacus.accountants import PRVAccountant
from opacus.data_loader import DPDataLoader
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from examples.private.step import Settings, Step, plain_step, private_step

__all__ = ["DELTA", "WAYS", "Prepared", "Way", "ignore_known_warnings"]

DELTA = 1e-4  # less than one in the number of images


def ignore_known_warnings() -> None:
    """Those of Opacus that ask for nothing here."""
    for message in (
        "Secure RNG turned off",  # as is ours: this is no deployment
        "Full backward hook is firing",  # images need no gradient
        "Optimal order is the largest alpha",  # of a first guess of the accountant's
    ):
        warnings.filterwarnings("ignore", message=message)


@dataclass(frozen=True)
class Prepared:
    """All that training takes.

    Attributes:
        loader: Of images that are drawn independently of each other.
        step: Moves the parameters.
        epsilon: What the steps so far cost, at δ.
    """

    loader: DataLoader[Tensor]
    step: Step
    epsilon: Callable[[], float]


Way = Callable[[nn.Module, TensorDataset, Settings], Prepared]


def ours(network: nn.Module, data: TensorDataset, settings: Settings) -> Prepared:
    """The loader and the accountant are Opacus's; the step is ours."""
    loader = DPDataLoader.from_data_loader(_loader(data, settings))
    move = private_step(network, settings)
    accountant = PRVAccountant()

    def step(images: Tensor, digits: Tensor) -> None:
        move(images, digits)
        accountant.step(noise_multiplier=settings.noise, sample_rate=loader.sample_rate)

    return Prepared(loader, step, lambda: accountant.get_epsilon(delta=DELTA))


def opacus_flat(network: nn.Module, data: TensorDataset, settings: Settings) -> Prepared:
    """All of it Opacus's: the gradients of all images, then their norms."""
    return _opacus(network, data, settings, mode="hooks")


def opacus_ghost(network: nn.Module, data: TensorDataset, settings: Settings) -> Prepared:
    """All of it Opacus's: norms in a first backward, the clipped sum in a second."""
    return _opacus(network, data, settings, mode="ghost")


def plain(network: nn.Module, data: TensorDataset, settings: Settings) -> Prepared:
    """The same images without privacy."""
    loader = DPDataLoader.from_data_loader(_loader(data, settings))
    return Prepared(loader, plain_step(network, settings), lambda: float("inf"))


WAYS: dict[str, Way] = {
    "posegrad": ours,
    "Opacus, flat": opacus_flat,
    "Opacus, ghost": opacus_ghost,
    "not private": plain,
}


def _loader(data: TensorDataset, settings: Settings) -> DataLoader[Tensor]:
    """Batches of the expected size; the generator is that of the draws."""
    return DataLoader(data, settings.expected, generator=settings.generator())


def _opacus(network: nn.Module, data: TensorDataset, settings: Settings, *, mode: str) -> Prepared:
    privacy = PrivacyEngine(accountant="prv")
    criterion = nn.CrossEntropyLoss()
    model, optimizer, *own, loader = privacy.make_private(
        module=network,
        optimizer=settings.optimizer(network),
        criterion=criterion,
        data_loader=_loader(data, settings),
        noise_multiplier=settings.noise,
        max_grad_norm=settings.max_norm,
        noise_generator=settings.generator(),
        grad_sample_mode=mode,
    )
    loss_of = own[0] if own else criterion

    def step(images: Tensor, digits: Tensor) -> None:
        optimizer.zero_grad()
        loss_of(model(images), digits).backward()
        optimizer.step()

    return Prepared(loader, step, lambda: privacy.get_epsilon(DELTA))
