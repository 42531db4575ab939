"""Backwards that come, or do not: none, two, a part, several graphs; and what they leave behind."""

import gc
import weakref
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from posegrad import (
    Engine,
    Listening,
    ListeningError,
    NoPosesError,
    NotDifferentiableError,
    StaleFactorError,
)
from posegrad.graph._reading import Reading
from posegrad.testing import peak_live_bytes
from tests import reference


def _model() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1)).double()


def _losses(model: nn.Module, m: int = 6) -> Tensor:
    return model(torch.randn(m, 3, dtype=torch.float64)).squeeze(1).square()


def _rows(model: nn.Module, output: Tensor) -> Tensor:
    return reference.rows(output, reference.trainable(model))


def _grads(model: nn.Module) -> list[Tensor]:
    return [p.grad for p in model.parameters()]


def _cut_short(model: nn.Module, losses: Tensor) -> None:
    losses.sum().backward(inputs=[model[2].weight])


def _raising(model: nn.Module, losses: Tensor) -> None:
    def fail(_: Tensor) -> None:
        raise ArithmeticError("of the user's")

    losses.grad_fn.next_functions[0][0].register_prehook(fail)
    with pytest.raises(ArithmeticError, match="of the user's"):
        losses.sum().backward()


def _of_another(model: nn.Module, losses: Tensor) -> None:
    _losses(model).sum().backward()


def _of_values(model: nn.Module, losses: Tensor) -> None:
    (losses.detach().requires_grad_() * 2).sum().backward()


def _nothing(model: nn.Module, losses: Tensor) -> None:
    pass


@pytest.mark.parametrize(
    ("backward", "match"),
    [
        (_nothing, r"No backward came.*\n.*backward\(\)"),
        (_of_another, "No backward came"),
        (_of_values, "No backward came"),
        (_cut_short, r"did not pass all.*\n.*without inputs="),
        (_raising, "did not pass all"),
    ],
)
def test_a_backward_that_does_not_come_is_named(
    backward: Callable[[nn.Module, Tensor], None], match: str
) -> None:
    model = _model()
    losses = _losses(model)
    with Engine(model).listen(losses) as heard:
        backward(model, losses)
    for what in (lambda: heard.jacobian, lambda: heard.rows):
        with pytest.raises(ListeningError, match=match):
            what()


def test_the_last_backward_is_heard() -> None:
    model = _model()
    losses = _losses(model)
    matrix = _rows(model, losses)
    with Engine(model).listen(losses) as heard:
        losses.mean().backward(retain_graph=True)
        torch.testing.assert_close(heard.jacobian.matrix(), matrix)
        losses[:2].sum().backward(retain_graph=True)
        torch.testing.assert_close(heard.jacobian.matrix(), matrix[:2])
        (3 * losses[4:].sum()).backward()
    torch.testing.assert_close(heard.jacobian.matrix(), matrix[4:])
    assert heard.rows.tolist() == [False] * 4 + [True] * 2
    torch.testing.assert_close(heard.jacobian.predictions, losses.detach()[4:])


def test_gradients_that_are_asked_for_are_heard() -> None:
    model = _model()
    losses = _losses(model)
    matrix = _rows(model, losses)
    with Engine(model).listen(losses) as heard:
        torch.autograd.grad(losses.mean(), list(model.parameters()))
    torch.testing.assert_close(heard.jacobian.matrix(), matrix)


def test_a_backward_that_makes_a_graph_is_heard() -> None:
    model, other = _model(), _model()
    other.load_state_dict(model.state_dict())
    x = torch.randn(6, 3, dtype=torch.float64)
    found = []
    for network, listens in ((model, True), (other, False)):
        losses = network(x).squeeze(1).square()
        matrix = _rows(network, losses)
        heard = Engine(network).listen(losses)
        if listens:
            heard.start()
        slopes = torch.autograd.grad(losses.mean(), list(network.parameters()), create_graph=True)
        heard.stop()
        if listens:
            torch.testing.assert_close(heard.jacobian.matrix(), matrix)
        sum(slope.square().sum() for slope in slopes).backward()
        found.append(_grads(network))
    for one, another in zip(*found, strict=True):
        assert torch.equal(one, another)


def test_micro_batches_are_heard_one_by_one_and_their_gradients_add_up() -> None:
    model, other = _model(), _model()
    other.load_state_dict(model.state_dict())
    engine = Engine(model)
    for seed in range(4):
        torch.manual_seed(seed)
        losses = _losses(model, 3 + seed)
        matrix = _rows(model, losses)
        with engine.listen(losses) as heard:
            (losses.mean() / 4).backward()
        torch.testing.assert_close(heard.jacobian.matrix(), matrix)
        torch.manual_seed(seed)
        (_losses(other, 3 + seed).mean() / 4).backward()
    for one, another in zip(_grads(model), _grads(other), strict=True):
        assert torch.equal(one, another)


def test_two_graphs_in_one_loss_are_heard_each() -> None:
    model = _model()
    engine = Engine(model)
    first, second = _losses(model, 4), _losses(model, 5)
    expected = [_rows(model, first), _rows(model, second)]
    with engine.listen(first) as one, engine.listen(second) as other:
        (first.mean() + 2 * second.sum()).backward()
    torch.testing.assert_close([one.jacobian.matrix(), other.jacobian.matrix()], expected)


def test_a_loss_of_no_row_has_a_jacobian_without_rows() -> None:
    model = _model()
    losses = _losses(model)
    with Engine(model).listen(losses) as heard:
        (0 * losses).sum().backward()
    assert not heard.rows.any()
    assert len(heard.jacobian) == 0
    assert heard.jacobian.norms().shape == (0,)
    assert heard.jacobian.gramian().shape == (0, 0)


def test_a_scaled_loss_is_divided() -> None:
    model = _model().float()
    losses = model(torch.randn(6, 3)).squeeze(1).square()
    matrix = _rows(model, losses)
    scaler = torch.amp.GradScaler("cpu", init_scale=65536.0)
    with Engine(model).listen(losses) as heard:
        scaler.scale(losses.mean()).backward()
    torch.testing.assert_close(heard.jacobian.matrix(), matrix)


def test_half_precision_is_heard_in_single() -> None:
    model = _model().half()
    losses = model(torch.randn(6, 3).half()).squeeze(1).float().square()
    matrix = _rows(model, losses)
    with Engine(model).listen(losses) as heard:
        (1024 * losses.mean()).backward()
    torch.testing.assert_close(heard.jacobian.matrix(), matrix, rtol=1e-2, atol=1e-2)
    assert heard.jacobian.norms().dtype == torch.float32


def test_rows_of_zero_next_to_infinite_ones_are_refused() -> None:
    model = nn.Linear(1, 1, bias=False).double()
    nn.init.ones_(model.weight)
    x = torch.tensor([[0.0], [1.0], [2.0]], dtype=torch.float64)
    losses = model(x).squeeze(1).sqrt()  # whose slope at 0 is infinite
    mask = torch.tensor([0.0, 1.0, 1.0], dtype=torch.float64)
    with Engine(model, check="never").listen(losses) as heard:
        (losses * mask).sum().backward()
    with pytest.raises(FloatingPointError, match=r"cotangent of zero.*\n?.*by indexing"):
        _ = heard.jacobian


def test_owners_that_must_be_probed_are_probed_as_listening_starts() -> None:
    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return 2 * x

        @staticmethod
        def backward(ctx: Any, cotangent: Tensor) -> Tensor:
            return cotangent.mul_(2)  # and it writes to what it is handed

    model = _model()
    engine = Engine(model)
    for _ in range(3):
        losses = Doubled.apply(_losses(model))
        matrix = _rows(model, losses)
        with engine.listen(losses) as heard:
            losses.mean().backward()
        torch.testing.assert_close(heard.jacobian.matrix(), matrix)
    assert "1 to the activations, 2 to find whose rows" in heard.jacobian.report()


def test_nothing_is_run_for_a_structure_that_is_known() -> None:
    model = _model()
    engine = Engine(model)
    for m in (6, 5, 4):  # the structure; other sizes need nothing more
        losses = _losses(model, m)
        with engine.listen(losses) as heard:
            losses.mean().backward()
        first, *_ = str(heard.jacobian.report().splitlines()[1]).split()
        assert first == ("2" if m == 6 else "no")


def test_nothing_of_ours_raises_in_the_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    model = _model()
    losses = _losses(model)
    heard = Engine(model).listen(losses)

    def fail(*_: object) -> None:
        raise MemoryError("of ours")

    monkeypatch.setattr(Reading, "multiplied", fail)
    with heard:
        losses.sum().backward()
    assert all(g is not None for g in _grads(model))
    with pytest.raises(MemoryError, match="of ours"):
        _ = heard.jacobian


def test_an_interrupt_in_a_hook_ends_the_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    model = _model()
    losses = _losses(model)
    handles = []

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    def listen() -> None:
        with Engine(model).listen(losses) as heard:
            handles.extend(heard._hooks._handles)
            monkeypatch.setattr(Reading, "multiplied", interrupt)
            losses.sum().backward()

    with pytest.raises(KeyboardInterrupt):
        listen()
    assert handles
    assert not any(handle.hooks_dict_ref() for handle in handles)


def test_an_input_changed_in_place_is_named() -> None:
    model = nn.Linear(3, 1)
    x = torch.randn(6, 3)
    losses = model(x).squeeze(1)
    with Engine(model).listen(losses) as heard:
        losses.sum().backward()
    x.zero_()
    with pytest.raises(StaleFactorError, match="changed in place"):
        heard.jacobian.norms()


def _shared_with_grad() -> tuple[nn.Module, Tensor]:
    """A parameter whose `.grad` is a view of the cotangent that is heard."""
    model = nn.Module()
    model.poses = nn.Parameter(torch.randn(2, 3))
    return model, (model.poses.view(6) + torch.randn(6)).square()


def test_gradients_changed_in_place_do_not_reach_what_was_heard() -> None:
    model, losses = _shared_with_grad()
    matrix = _rows(model, losses)
    with Engine(model).listen(losses) as heard:
        losses.sum().backward()
    model.poses.grad.zero_()
    torch.testing.assert_close(heard.jacobian.matrix(), matrix)


def test_gradients_changed_in_place_before_it_stops_are_named() -> None:
    model, losses = _shared_with_grad()
    with Engine(model).listen(losses) as heard:
        losses.sum().backward()
        model.poses.grad.zero_()
    with pytest.raises(StaleFactorError, match=r"cotangent of shape \[6\].*\n.*before gradients"):
        _ = heard.jacobian


class Mark(torch.autograd.Function):
    """The identity; its node is a Python object, and so can be watched."""

    nodes: ClassVar[list[weakref.ref[Any]]] = []

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        Mark.nodes.append(weakref.ref(ctx))
        return x.clone()

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Tensor:
        return cotangent


def _stopped(heard: Listening, losses: Tensor) -> None:
    with heard:
        losses.mean().backward()


def _failed(heard: Listening, losses: Tensor) -> None:
    with heard:
        pass


def _unused(heard: Listening, losses: Tensor) -> None:
    pass


def _left_on(heard: Listening, losses: Tensor) -> None:
    heard.start()
    losses.mean().backward()


@pytest.mark.parametrize("use", [_stopped, _failed, _unused, _left_on])
def test_the_graph_is_not_kept(use: Callable[[Listening, Tensor], None]) -> None:
    Mark.nodes.clear()
    model = _model()
    engine = Engine(model)
    losses = Mark.apply(_losses(model))
    heard = engine.listen(losses)
    use(heard, losses)
    handles = list(heard._hooks._handles)
    kept = [heard.jacobian] if use is _stopped else []
    del losses
    if use in (_unused, _left_on):
        del heard  # the hooks of one that was never stopped die with the graph
    gc.collect()
    assert not [node for ref in Mark.nodes if (node := ref()) is not None]
    assert not handles or use is _left_on
    assert len(kept) == (use is _stopped)


def test_no_hook_remains() -> None:
    model = _model()
    losses = _losses(model)
    heard = Engine(model).listen(losses).start()
    handles = list(heard._hooks._handles)
    assert handles
    heard.stop()
    assert not any(handle.hooks_dict_ref() for handle in handles)
    losses.sum().backward()
    with pytest.raises(ListeningError, match="No backward came"):
        _ = heard.jacobian


def test_hooks_are_gone_when_the_block_raises() -> None:
    model = _model()
    losses = _losses(model)
    handles = []

    def listen() -> None:
        with Engine(model).listen(losses) as heard:
            handles.extend(heard._hooks._handles)
            raise ArithmeticError("of the user's")

    with pytest.raises(ArithmeticError, match="of the user's"):
        listen()
    assert handles
    assert not any(handle.hooks_dict_ref() for handle in handles)


def test_nothing_grows_with_the_steps() -> None:
    model = _model()
    engine = Engine(model)

    def step() -> None:
        losses = _losses(model, 8)
        with engine.listen(losses) as heard:
            losses.mean().backward()
        heard.jacobian.norms()
        model.zero_grad()

    step()
    with peak_live_bytes() as memory:
        for _ in range(50):
            step()
    assert memory.live == 0


def test_start_and_stop() -> None:
    model = _model()
    losses = _losses(model)
    matrix = _rows(model, losses)
    heard = Engine(model).listen(losses)
    heard.start()
    heard.start()
    losses.sum().backward()
    heard.stop()
    heard.stop()
    torch.testing.assert_close(heard.jacobian.matrix(), matrix)
    assert heard.jacobian is heard.jacobian
    with pytest.raises(ListeningError, match=r"after stop.*\n.*for each new output"):
        heard.start()


def test_outputs_without_a_row_are_refused() -> None:
    model = _model()
    engine = Engine(model)
    with pytest.raises(NoPosesError, match=r"shape \[0\]"):
        engine.listen(_losses(model, 0))
    with pytest.raises(NotDifferentiableError, match="carries no graph"):
        engine.listen(_losses(model).detach())
    with pytest.raises(NotDifferentiableError, match="another model"):
        engine.listen(_losses(_model()))
