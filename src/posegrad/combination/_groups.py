"""Several groups of poses in one call: a rule applied to each."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Self, final

import torch
from torch import Tensor

from posegrad.combination._base import Combination, outcome
from posegrad.combination._online import OnlineForm
from posegrad.errors import NoPosesError, ShapeMismatchError, listed

__all__ = ["Groups", "PerGroup", "groups_of", "ungrouped"]

_NAMED = 5  # empty groups that a message names: if ids are compound numbers, millions are empty


@final
@dataclass(frozen=True)
class Groups:
    """Which group each pose belongs to.

    Args:
        owners: The number of each pose's group, `[m]`, on the CPU.
        count: n, the number of groups.
    """

    owners: Tensor
    count: int

    @classmethod
    def of(cls, groups: Tensor | Sequence[int]) -> Self:
        """Groups as users state them, each with at least one pose.

        Args:
            groups: A tensor of ids `[m]` from 0 to n - 1, in any order; or a list of sizes, for
                poses that come group after group.

        Raises:
            NoPosesError: if a group is empty, or there is none.
            ShapeMismatchError: if it is neither.
        """
        found = cls.some_of(groups)
        _check_filled(found.owners, found.count)
        return found

    @classmethod
    def some_of(cls, groups: Tensor | Sequence[int]) -> Self:
        """As `of`, for a part of the poses, so that groups may be empty.

        Raises:
            ShapeMismatchError: if it is neither.
            NoPosesError: if a group is below 0.
        """
        if not isinstance(groups, Tensor):
            sizes = _sizes(groups)
            owners = torch.arange(len(sizes), device="cpu").repeat_interleave(sizes)
            return cls(owners, len(sizes))
        if groups.ndim != 1 or groups.is_floating_point() or groups.dtype == torch.bool:
            raise ShapeMismatchError(
                f"groups is {groups.dtype} {list(groups.shape)}, but it holds the number of each "
                f"pose's group, [m].\nPass such a tensor, or the groups' sizes as a list."
            )
        owners = groups.detach().cpu().long()
        if len(owners) and int(owners.min()) < 0:
            raise NoPosesError(
                "groups names a group below 0.\nNumber the groups from 0, as "
                "torch.unique(ids, return_inverse=True)[1] does."
            )
        return cls(owners, int(owners.max()) + 1 if len(owners) else 0)

    @classmethod
    def joined(cls, parts: "Sequence[Groups]") -> Self:
        """The groups of poses that come one part after another.

        Raises:
            NoPosesError: if a group is empty in all of them.
        """
        found = cls(torch.cat([part.owners for part in parts]), max(part.count for part in parts))
        _check_filled(found.owners, found.count)
        return found

    def check(self, poses: int) -> None:
        """Refuses another number of poses.

        Raises:
            ShapeMismatchError: if so.
        """
        if poses != len(self.owners):
            raise ShapeMismatchError(
                f"groups assigns {len(self.owners)} poses to {self.count} groups, and there are "
                f"{poses} poses.\nGive each pose a group: ids [{poses}], or sizes that add up."
            )

    def members(self) -> tuple[Tensor, ...]:
        """The numbers of each group's poses, in their order."""
        order = torch.argsort(self.owners, stable=True)
        return torch.split(order, torch.bincount(self.owners, minlength=self.count).tolist())

    def within(self, start: int, count: int) -> Iterator[tuple[int, Tensor]]:
        """The groups among `count` poses from `start` on, with the places of their poses there."""
        owners = self.owners[start : start + count]
        for group in torch.unique(owners).tolist():
            yield group, (owners == group).nonzero().flatten()


@final
class PerGroup(Combination):
    """A rule applied to each group by itself: predictions `[m, ...]` to `[n, ...]`.

    What it returns beside the combined prediction is stacked likewise.

    Args:
        rule: Any rule; it sees one group at a time.
        groups: The group of each pose.
    """

    def __init__(self, rule: Combination, groups: Groups) -> None:
        super().__init__()
        self.rule = rule
        self.groups = groups

    def forward(self, predictions: Tensor) -> Tensor | tuple[Tensor, ...]:
        self.groups.check(len(predictions))
        members = [index.to(predictions.device) for index in self.groups.members()]
        found = [outcome(self.rule(predictions[index])) for index in members]
        combined = torch.stack([prediction for prediction, _ in found])
        extras = [extra for _, extra in found]
        _check_alike(extras)
        return (combined, *map(torch.stack, zip(*extras, strict=True))) if extras[0] else combined

    def online(self) -> OnlineForm | None:
        """The rule's own, for one group."""
        return self.rule.online()


def _check_alike(extras: Sequence[tuple[Tensor, ...]]) -> None:
    """Refuses what cannot be stacked, such as a weight for each pose of groups of several sizes.

    Raises:
        ShapeMismatchError: if so.
    """
    shapes = [[list(tensor.shape) for tensor in extra] for extra in extras]
    odd = next((i for i, own in enumerate(shapes) if own != shapes[0]), None)
    if odd is not None:
        raise ShapeMismatchError(
            f"Beside the combined prediction the rule returned tensors of shapes {shapes[0]} for "
            f"group 0, and {shapes[odd]} for group {odd}.\n"
            f"Those of all groups are stacked, so they must agree.\n"
            f"Compute what the rule makes for each pose from per_pose; or call combine() once for "
            f"each group."
        )


def _sizes(groups: Sequence[int]) -> Tensor:
    sizes = groups if isinstance(groups, list | tuple) else [groups]
    if sizes is not groups or not all(type(size) is int and size >= 0 for size in sizes):
        raise ShapeMismatchError(
            f"groups is {str(groups)[:80]}, but it holds the sizes of groups, whole numbers, as a "
            f"list.\nPass ids [m] as a tensor: torch.tensor(ids)."
        )
    return torch.tensor(groups, dtype=torch.long, device="cpu")


def _check_filled(owners: Tensor, count: int) -> None:
    filled = set(torch.unique(owners).tolist())
    if len(filled) < count or not count:
        empty = list(islice((group for group in range(count) if group not in filled), _NAMED))
        more = count - len(filled) - len(empty)
        names = listed(empty) + (f" and {more} more" if more else "")
        raise NoPosesError(
            f"Group(s) without poses: {names or 'all, there are no groups'}. A combination "
            f"of no predictions is undefined.\n"
            f"Leave compounds without poses out, and number the others from 0 on, as "
            f"torch.unique(ids, return_inverse=True)[1] does. A tensor holds the group of each "
            f"pose; sizes go into a list."
        )


def groups_of(rule: Combination) -> Groups | None:
    """The groups a rule is applied to; None if all poses are one group."""
    return rule.groups if isinstance(rule, PerGroup) else None


def ungrouped(rule: Combination) -> Combination:
    """What a rule does with one group."""
    return rule.rule if isinstance(rule, PerGroup) else rule
