"""The engine's own part: every kind of poses, predict, collate, no_grad, plans."""

import re
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from posegrad import (
    Best,
    Boltzmann,
    Combination,
    Combined,
    Engine,
    Mean,
    Min,
    OnlineForm,
    Sum,
    TopK,
)
from posegrad.testing import assert_matches_autograd
from tests.device import DEVICE
from tests.models import FEATURES, MODELS
from tests.reference import rows, trainable
from tests.schedules import SCHEDULES

KINDS: dict[str, Callable[[Tensor], Iterable[Tensor] | Tensor]] = {
    "stacked tensor": lambda x: x,
    "list": lambda x: list(x),
    "tuple": lambda x: tuple(x),
    "generator": lambda x: (row for row in x),
    "dict values": lambda x: dict(enumerate(x)).values(),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("schedule", ["auto", *SCHEDULES])
@pytest.mark.parametrize("chunk_size", [1, 3])
def test_every_kind_of_poses(kind: str, schedule: str, chunk_size: int) -> None:
    model, batch = MODELS["mlp"]().double(), torch.randn(7, FEATURES, dtype=torch.float64)
    expected = Min(1.7)(model(batch)[:, 0])
    gradients = torch.autograd.grad(expected, list(model.parameters()))

    collate = None if kind == "stacked tensor" or chunk_size == 1 else torch.stack
    engine = Engine(model, chunk_size=chunk_size, collate=collate)
    prediction, per_pose = engine.combine(KINDS[kind](batch), Min(1.7), schedule=schedule)
    prediction.backward()

    assert prediction.shape == ()
    assert per_pose.shape == (7,)
    torch.testing.assert_close(prediction, expected)
    torch.testing.assert_close([p.grad for p in model.parameters()], list(gradients))


def test_a_generator_is_not_held_by_stream() -> None:
    alive = peak = 0

    class Pose:
        def __init__(self, x: Tensor) -> None:
            nonlocal alive, peak
            self.x = x
            alive += 1
            peak = max(peak, alive)

        def __del__(self) -> None:
            nonlocal alive
            alive -= 1

    engine = Engine(MODELS["mlp"](), predict=lambda model, pose: model(pose.x))
    engine.combine((Pose(x) for x in torch.randn(50, FEATURES)), Mean())[0].backward()
    assert peak <= 4


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (3,), (2, 3)])
@pytest.mark.parametrize("chunk_size", [1, 2])
def test_shapes(shape: tuple[int, ...], chunk_size: int) -> None:
    scorer = nn.Linear(FEATURES, 6)

    def predict(model: nn.Module, pose: Tensor) -> Tensor:
        numbers = model(pose)[..., : torch.Size(shape).numel()]
        return numbers.reshape((*pose.shape[:-1], *shape))

    engine = Engine(scorer, predict=predict, chunk_size=chunk_size)
    expected = () if set(shape) == {1} else shape
    for schedule in ("auto", *SCHEDULES):
        result = engine.combine(torch.randn(5, FEATURES), Boltzmann(1.0), schedule=schedule)
        assert result.prediction.shape == expected
        assert result.per_pose.shape == (5, *expected)
        assert isinstance(result, Combined)


@pytest.mark.parametrize("rule", [Mean(), Sum(), Min(1.7), Boltzmann(0.593), Min(1000.0)])
@pytest.mark.parametrize("chunk_size", [1, 4])
def test_vector_predictions_stream(rule: nn.Module, chunk_size: int) -> None:
    assert_matches_autograd(
        MODELS["vector"](),
        torch.randn(9, FEATURES),
        rule,
        chunk_size=chunk_size,
        schedules=["stream"],
    )


def test_several_modules() -> None:
    encoder, head = nn.Linear(FEATURES, 4), nn.Linear(4, 1)
    assert_matches_autograd(
        [encoder, head],
        list(torch.randn(5, FEATURES)),
        Min(2.0),
        predict=lambda encoder, head, pose: head(torch.tanh(encoder(pose))),
    )


def test_several_modules_without_predict_read_outputs() -> None:
    encoder, head = nn.Linear(FEATURES, 4).double(), nn.Linear(4, 1).double()
    engine = Engine(encoder, head)

    def output() -> Tensor:
        torch.manual_seed(0)
        return head(torch.tanh(encoder(torch.randn(5, FEATURES, dtype=torch.float64)))).squeeze(1)

    leaves = [*encoder.parameters(), *head.parameters()]
    J = engine.jacobian(output())
    each = [torch.autograd.grad(y, leaves, retain_graph=True) for y in output()]
    expected = torch.stack([torch.cat([g.flatten() for g in row]) for row in each])
    torch.testing.assert_close(J.matrix(), expected)
    torch.testing.assert_close(engine.compute_gramian(output()), expected @ expected.T)
    engine.backward(output(), Mean())
    torch.testing.assert_close(torch.cat([p.grad.flatten() for p in leaves]), expected.mean(0))


def test_several_modules_are_named_by_their_number() -> None:
    engine = Engine(nn.Linear(2, 1), nn.Linear(2, 1), predict=lambda a, b, x: a(x) + b(x))
    gradients = engine.gather(torch.ones(1, 2)).combine(torch.ones(1))
    assert list(gradients) == ["0.weight", "0.bias", "1.weight", "1.bias"]


@pytest.mark.parametrize("schedule", ["auto", *SCHEDULES])
def test_no_grad_gives_the_same_prediction(schedule: str) -> None:
    model, batch = MODELS["mlp"](), torch.randn(5, FEATURES)
    expected = Engine(model).combine(list(batch), Mean(), schedule=schedule)
    with torch.no_grad():
        found = Engine(model).combine(list(batch), Mean(), schedule=schedule)
    assert not found.prediction.requires_grad
    torch.testing.assert_close(found, Combined(*(t.detach() for t in expected)))


def test_inference_mode() -> None:
    with torch.inference_mode():
        prediction, _ = Engine(MODELS["mlp"]()).combine(list(torch.randn(5, FEATURES)), Mean())
    assert not prediction.requires_grad


def test_a_frozen_model_needs_no_gradient() -> None:
    model = MODELS["mlp"]().requires_grad_(False)
    for schedule in ("store", "stream", "recompute"):
        prediction, _ = Engine(model).combine(
            list(torch.randn(5, FEATURES)), Mean(), schedule=schedule
        )
        assert not prediction.requires_grad


def test_parameters_are_listed_at_every_call() -> None:
    model = nn.Sequential(nn.Linear(FEATURES, 4), nn.Linear(4, 1))
    engine, batch = Engine(model), torch.randn(5, FEATURES)
    engine.combine(list(batch), Mean())[0].backward()
    model[1] = nn.Linear(4, 1)
    model[0].weight.requires_grad_(False)
    before = model[0].weight.grad.clone()
    engine.combine(list(batch), Mean())[0].backward()
    assert model[1].weight.grad is not None
    assert torch.equal(model[0].weight.grad, before)


def test_training_loss_falls() -> None:
    model = nn.Sequential(nn.Linear(FEATURES, 32), nn.SiLU(), nn.Linear(32, 1))
    engine, optimizer = Engine(model), torch.optim.Adam(model.parameters(), lr=0.01)
    compounds = [(torch.randn(m, FEATURES), -float(m)) for m in (3, 5, 8, 12)]
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        total = 0.0
        for poses, target in compounds:
            prediction, _ = engine.combine(poses, Min(1.7))
            loss = (prediction - target).square()
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()
        losses.append(total)
    assert losses[-1] < 0.1 * losses[0]


def test_float16_with_a_gradient_scaler() -> None:
    model, batch = MODELS["mlp"](), torch.randn(6, FEATURES)
    gradients = []
    for combined in (True, False):
        model.zero_grad()
        scaler = torch.amp.GradScaler(DEVICE.type, init_scale=2.0**14)
        with torch.autocast(DEVICE.type, dtype=torch.float16):
            if combined:
                prediction = Engine(model).combine(list(batch), Mean()).prediction
            else:
                prediction = Mean()(torch.cat([model(pose) for pose in batch]))
            loss = 1e-4 * prediction.float()  # gradients of a size that float16 cannot hold
        scaler.scale(loss).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]) / 2**14)
    assert gradients[1].norm() > 0
    assert (gradients[0] - gradients[1]).norm() < 2e-3 * gradients[1].norm()


def test_overflow_reaches_the_scaler() -> None:
    # A cotangent of inf is not an error: the scaler skips the step and lowers its scale.
    model = MODELS["mlp"]()
    prediction, _ = Engine(model).combine(
        list(torch.randn(6, FEATURES)), Min(), schedule="recompute"
    )
    (prediction * float("inf")).backward()
    assert not bool(model[0].weight.grad.isfinite().all())


PLANS: dict[str, tuple[dict[str, Any], str]] = {
    "soft": ({"rule": Mean()}, r"stream .*\n.*64 in 64 chunks\nforwards   64\nbackwards  1 to 64"),
    "sharp": ({"rule": Min()}, r"recompute .*sharp.*\n.*\nforwards   64, then 1 to 64"),
    "two sums": ({"rule": Boltzmann(1.0)}, r"2 running sums: \S+ (KiB|B)\n"),
    "best": ({"rule": Best()}, r"recompute .*do not separate"),
    "top": ({"rule": TopK(3), "schedule": "store"}, r"store \(asked for\)(.|\n)*64 gradients"),
    "one chunk": ({"rule": Mean(), "chunk_size": 64}, r"retain .*one graph(.|\n)*64 in 1 chunk\n"),
    "skipping": ({"rule": Mean(), "skip_below": 0.1}, r"recompute \(skip_below"),
    "trained": ({"rule": Min(nn.Parameter(torch.ones(())))}, r"recompute"),
}


@pytest.mark.parametrize("name", PLANS)
def test_plans(name: str) -> None:
    options, match = PLANS[name]
    options = dict(options)
    engine = Engine(MODELS["mlp"](), chunk_size=options.pop("chunk_size", 1))
    text = str(engine.plan(torch.zeros(64, FEATURES), **options))
    assert re.search(match, text), text


def test_a_plan_for_a_generator_is_refused() -> None:
    with pytest.raises(TypeError, match="a generator does not"):
        Engine(MODELS["mlp"]()).plan((x for x in torch.zeros(3, FEATURES)), Mean())  # type: ignore[arg-type]


def test_a_plan_says_what_combine_does() -> None:
    model = MODELS["mlp"]()
    engine = Engine(model, chunk_size=1)
    for rule in (Mean(), Min(1.7), Min(), Best(), Boltzmann(1.0)):
        for schedule in ("store", "recompute"):
            plan = engine.plan(torch.zeros(5, FEATURES), rule, schedule=schedule)
            assert plan.schedule == schedule
        size = sum(p.numel() * 4 for p in model.parameters())
        plan = engine.plan(torch.zeros(5, FEATURES), rule, schedule="store")
        assert plan.bytes_held == 5 * size


def test_a_rule_that_trains_something_outside_itself_is_not_streamed() -> None:
    temperature = torch.tensor(0.5, requires_grad=True)

    class Tempered(Combination):
        """A smooth minimum whose temperature is learned elsewhere; a careless online form."""

        def forward(self, predictions: Tensor) -> Tensor:
            return Min(1.0)(predictions / temperature) * temperature

        def online(self) -> OnlineForm | None:
            return Min(2.0).online()

    engine, batch = Engine(MODELS["mlp"]()), torch.randn(5, FEATURES)
    engine.combine(list(batch), Tempered()).prediction.backward()
    assert temperature.grad is not None
    with pytest.raises(ValueError, match="Tempered cannot stream"):
        engine.combine(list(batch), Tempered(), schedule="stream")


def test_embeddings_that_renormalise_their_weight_in_forward() -> None:
    class Renormalising(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(5, 4, max_norm=0.5)
            self.head = nn.Linear(4, 1)

        def forward(self, pose: Tensor) -> Tensor:
            return self.head(self.embedding(pose).sum(-2)).squeeze(-1)

    assert_matches_autograd(Renormalising(), list(torch.tensor([[0, 1], [2, 3], [4, 0]])), Min(2.0))


def test_a_pose_that_requires_grad_only_later_gets_none() -> None:
    model, batch = MODELS["mlp"](), [torch.randn(FEATURES) for _ in range(4)]
    prediction, _ = Engine(model).combine(batch, Mean(), schedule="recompute")
    batch[0].requires_grad_()
    prediction.backward()
    assert batch[0].grad is None
    assert model[0].weight.grad is not None


class Scored(nn.Module):
    """A layer without a closed form."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.addmv(x[:, 0], x, self.weight).unsqueeze(1)


def test_a_plan_for_an_output_says_how_its_rows_would_be_read() -> None:
    model = nn.Sequential(nn.Linear(3, 4), Scored(), nn.Linear(1, 1), nn.Linear(2, 2))
    batch = torch.randn(5, 3, requires_grad=True)
    engine = Engine(model[:3], model[3], predict=lambda first, _, pose: first(pose))
    output = model[:3](batch).squeeze(1)

    plan = str(engine.plan(output, Mean()))

    assert plan.startswith("5 rows, 1 backward to the activations; more in a first call")
    assert "0.0.weight  1     closed form (Addmm)" in plan
    assert "0.1.weight  1     operator vjp (Addmv): no closed form" in plan
    assert "1.weight    0     unused" in plan
    assert "poses      5 in 1 chunk" in str(engine.plan(batch, Mean()))  # poses, though with grad
    output.sum().backward()  # nothing was run or freed


@pytest.mark.parametrize("rule", [Mean(), Min(1.7), torch.tensor([0.5, -1.0, 2.0])])
def test_backward_deposits_what_a_loss_would(rule: Any) -> None:
    model, batch = MODELS["mlp"]().double(), torch.randn(3, FEATURES, dtype=torch.float64)
    loss = rule(model(batch)[:, 0]) if callable(rule) else (rule * model(batch)[:, 0]).sum()
    expected = torch.autograd.grad(loss, list(model.parameters()))

    weights = Engine(model).backward(model(batch)[:, 0], rule)

    assert weights.shape == (3,)
    torch.testing.assert_close([p.grad for p in model.parameters()], list(expected))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"check": "sometimes"}, "check='sometimes' is unknown"),
        ({"batch_dim": "rows"}, "batch_dim='rows' is unknown"),
        ({"batch_dim": -1}, "batch_dim=-1 is unknown"),
    ],
)
def test_unknown_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Engine(nn.Linear(2, 1), **options)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")  # from torch 2.15 on
def test_a_scripted_model_is_served_before_and_after_it_is_optimised() -> None:
    model = torch.jit.script(nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))).double()
    poses, engine = torch.randn(6, 3, dtype=torch.float64), Engine(model)
    for _ in range(4):  # TorchScript fuses the graph at the third call
        J = engine.jacobian(model(poses).squeeze(1))
        torch.testing.assert_close(J.matrix(), rows(model(poses), trainable(model)))
        prediction, per_pose = engine.combine(poses, Min(2.0))
        prediction.backward()
        weights = torch.softmax(-2.0 * per_pose.detach(), dim=0)
        expected = torch.cat([g.flatten() for g in J.combine(weights).values()])
        found = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        torch.testing.assert_close(found, expected)
        model.zero_grad()
