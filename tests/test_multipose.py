"""A model and a rule as one module."""

import copy
import io
import pickle

import pytest
import torch
from torch import Tensor, nn

from posegrad import AttentionPooling, Clip, Engine, Mean, Min, MultiPose


def _step(module: MultiPose, poses: Tensor) -> list[Tensor]:
    module.zero_grad()
    module(poses).prediction.square().sum().backward()
    return [p.grad for p in module.parameters()]


def test_forward_is_combine() -> None:
    model, poses = nn.Linear(3, 1), torch.randn(5, 3)
    found = _step(MultiPose(model, Min(2.0), chunk_size=2), poses)
    model.zero_grad()
    Engine(model, chunk_size=2).combine(poses, Min(2.0)).prediction.square().backward()
    for gradient, p in zip(found, model.parameters(), strict=True):
        assert torch.equal(gradient, p.grad)


def test_groups_and_schedules_pass_through() -> None:
    module = MultiPose(nn.Linear(3, 1), Mean(), schedule="store")
    prediction, per_pose = module(torch.randn(5, 3), groups=[2, 3])
    (prediction.sum() + per_pose.sum()).backward()  # stream could not serve this
    assert prediction.shape == (2,)


def test_its_state_is_the_models_and_the_rules() -> None:
    module = MultiPose(nn.Linear(3, 2), AttentionPooling(2, hidden=4))
    keys = {f"model.{key}" for key in module.model.state_dict()}
    assert set(module.state_dict()) == keys | {"rule.hidden.weight", "rule.score.weight"}
    assert len(list(module.parameters())) == 4


@pytest.mark.parametrize("how", ["copy", "pickle", "save"])
def test_copies_go_on_alike_and_apart(how: str) -> None:
    module, poses = MultiPose(nn.Linear(3, 1), Min(2.0), chunk_size=2), torch.randn(5, 3)
    expected = _step(module, poses)
    if how == "copy":
        other = copy.deepcopy(module)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(module))
    else:
        file = io.BytesIO()
        torch.save(module, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)

    with torch.no_grad():
        module.model.weight.zero_()  # the copy has weights of its own
    for gradient, found in zip(expected, _step(other, poses), strict=True):
        torch.testing.assert_close(found, gradient, rtol=1e-6, atol=1e-6)
    assert other.engine.modules == (other.model,)


def test_a_restored_state_scores_alike() -> None:
    module, other = (MultiPose(nn.Linear(3, 1), Mean()) for _ in range(2))
    other.load_state_dict(module.state_dict())
    poses = torch.randn(4, 3)
    assert torch.equal(module(poses).prediction, other(poses).prediction)


def test_it_moves_and_casts_like_any_module() -> None:
    module = MultiPose(nn.Linear(3, 1), AttentionPooling(1)).double()
    poses = torch.randn(4, 3, dtype=torch.float64)
    with torch.no_grad():
        assert module.engine.combine(poses, Mean()).prediction.dtype == torch.float64


def test_a_model_put_in_its_place_is_the_one_that_is_scored() -> None:
    module, poses = MultiPose(nn.Linear(3, 1), Mean(), chunk_size=2), torch.randn(5, 3)
    module(poses)
    module.model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1))
    prediction, _ = module(poses)
    prediction.backward()
    torch.testing.assert_close(prediction, module.model(poses).mean())
    assert all(p.grad is not None for p in module.model.parameters())


def test_a_rule_that_looks_at_gradients_is_refused() -> None:
    with pytest.raises(TypeError, match="Clip looks at gradients"):
        MultiPose(nn.Linear(3, 1), Clip(1.0))
