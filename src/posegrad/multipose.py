"""A model and a rule as one module, for trainers."""

from collections.abc import Iterable, Sequence
from typing import Any, final

from torch import Tensor, nn

from posegrad.combination._base import Rule
from posegrad.engine import Engine
from posegrad.schedule._poses import Pose
from posegrad.schedule._result import Combined
from posegrad.weighting._rules import rule_of_predictions

__all__ = ["MultiPose"]


@final
class MultiPose(nn.Module):
    """A model of single poses as a model of groups: its forward is `Engine.combine`.

    For trainers, `torch.save`, copies and checkpoints. The keys of `state_dict()` are the model's
    behind `model.`, and the rule's behind `rule.`; nothing else is in it.

    Args:
        model: Scores one pose.
        rule: A combination rule, or any function of the predictions.
        schedule: As for `Engine.combine`.
        skip_below: As for `Engine.combine`.
        engine_options: As for `Engine`: `predict`, `collate`, `chunk_size`, ....

    Raises:
        TypeError: if the rule looks at gradients; see `Engine.backward` for those.

    Example:
        >>> module = MultiPose(nn.Linear(3, 1), Mean())
        >>> prediction, per_pose = module(torch.ones(4, 3))
        >>> list(module.state_dict())
        ['model.weight', 'model.bias']
        >>> module(torch.ones(4, 3), groups=[1, 3]).prediction.shape
        torch.Size([2])
    """

    def __init__(
        self,
        model: nn.Module,
        rule: Rule,
        *,
        schedule: str = "auto",
        skip_below: float = 0.0,
        **engine_options: Any,
    ) -> None:
        super().__init__()
        self.engine_options = engine_options
        self.engine = Engine(model, **engine_options)
        self.model = model
        self.rule = rule_of_predictions(rule)
        self.schedule = schedule
        self.skip_below = skip_below

    def forward(
        self,
        poses: Iterable[Pose] | Tensor,
        groups: Tensor | Sequence[int] | None = None,
    ) -> Combined:
        """Scores the poses of one group, or of several, and combines them.

        Args:
            poses: As for `Engine.combine`.
            groups: As for `Engine.combine`.

        Returns:
            `(prediction, per_pose)`; shapes, errors and cost are those of `Engine.combine`.
        """
        if self.engine.given != (self.model,):  # another model was put in its place
            self.engine = Engine(self.model, **self.engine_options)
        return self.engine.combine(
            poses, self.rule, groups=groups, schedule=self.schedule, skip_below=self.skip_below
        )

    def __getstate__(self) -> dict[str, Any]:
        """Without the engine, which holds what was learnt of graphs; a copy makes a new one."""
        return {name: value for name, value in self.__dict__.items() if name != "engine"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.engine = Engine(self.model, **self.engine_options)

    def extra_repr(self) -> str:
        """The options of a call."""
        return f"schedule={self.schedule!r}, skip_below={self.skip_below:g}"
