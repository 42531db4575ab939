"""Rows of the table: ways to use parameters, poses and states."""

import torch
from torch import nn
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import orthogonal, spectral_norm, weight_norm

from posegrad import (
    NoPosesError,
    NotDifferentiableError,
    ReentrantCheckpointError,
    StaleFactorError,
    UnsupportedModuleError,
)
from tests.architectures import graphs, shared, states
from tests.architectures.models import WIDTH, mlp
from tests.architectures.row import Architecture, M, batch, draw, score, tokens
from tests.architectures.states import PLAIN

A = Architecture
SLOW = "exact-slow"
T = 3  # tokens of a pose
IMAGE = (2, 5, 5)


def _seq(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(*layers)


def _encoder(**options: bool) -> nn.Module:
    return nn.TransformerEncoderLayer(WIDTH, 2, 6, dropout=0.0, **options)


SHARED = {
    "Tied, chained": A("one weight in two modules", shared.TiedChained, PLAIN, dense=True),
    "Tied, parallel": A("", shared.TiedParallel, PLAIN, dense=True),
    "Parent also uses a child's weight": A(
        "", lambda: shared.ParentUses(also=True), PLAIN, dense=True
    ),
    "Parent only uses a child's weight": A(
        "the child is never called", lambda: shared.ParentUses(also=False), PLAIN, dense=True
    ),
    "Tied embedding and head": A("", shared.TiedHead, batch(T, inputs=tokens), dense=True),
    "Deep equilibrium": A("one layer five times", shared.Repeated, PLAIN, dense=True),
    "Siamese": A("one module on two inputs", lambda: mlp(out=3), states.pairs, dense=True),
    "weight_norm": A("", lambda: _seq(weight_norm(nn.Linear(WIDTH, 3)), nn.Tanh()), PLAIN),
    "spectral_norm": A("", lambda: _seq(spectral_norm(nn.Linear(WIDTH, 3)), nn.Tanh()), PLAIN),
    "orthogonal": A("", lambda: _seq(orthogonal(nn.Linear(WIDTH, 3)), nn.Tanh()), PLAIN),
    "Pruned": A(
        "torch.nn.utils.prune",
        lambda: _seq(prune.random_unstructured(nn.Linear(WIDTH, 3), "weight", 0.5), nn.Tanh()),
        PLAIN,
    ),
    "LoRA": A("W x + B A x", lambda: shared.LoRA(merged=False), PLAIN, dense=True),
    "LoRA, merged": A("(W + B A) x", lambda: shared.LoRA(merged=True), PLAIN),
    "Generated weights": A("by a network, for all poses", shared.Generated, PLAIN),
    "Generated weights, each pose": A("by a network, for each", shared.Hyper, PLAIN, dense=True),
    "Weights replaced": A("torch.func.functional_call", mlp, states.functional),
    "Weight on the left": A("W X", shared.WeightOnTheLeft, PLAIN),
    "einsum": A("", shared.Einsum, batch(T, WIDTH), dense=True),
    "Poses that are parameters": A("divided by a whole number", shared.Thirds, PLAIN),
    "Distances to a parameter": A("torch.cdist", shared.Prototypes, PLAIN, dense=True),
    "Vector": A("inputs @ a vector of weights", shared.Vector, batch(T, WIDTH), dense=True),
    "Weights in a batch": A(
        "torch.bmm, poses in the rows of one and the columns of another",
        shared.Stacked,
        lambda model, seed: score(model(draw(seed, M, WIDTH)), dim=1),
    ),
    "Ensemble": A(
        "models in dimension 0, poses in 1: baddbmm",
        shared.Ensemble,
        lambda model, seed: score(model(draw(seed, M, WIDTH)), dim=1),
    ),
    "Weight standardisation": A("", shared.Standardised, batch(2, 3, 3)),
    "A sum of a parameter": A("repeated for each pose, added", shared.Offset, PLAIN, dense=True),
    "Pose embedding": A("rows of a parameter, by index", shared.Lookup, batch(inputs=tokens)),
    "Temperature, exp": A(
        "a trainable scalar", lambda: shared.Temperature(softplus=False), PLAIN, dense=True
    ),
    "Temperature, softplus": A("", lambda: shared.Temperature(softplus=True), PLAIN, dense=True),
    "autograd.Function": A(
        "with a backward of its own", shared.CustomFunction, PLAIN, SLOW, dense=True
    ),
    "Complex parameter": A(
        "",
        shared.Phases,
        PLAIN,
        UnsupportedModuleError,
        dtype=torch.complex128,
        match="view_as_real",
    ),
    "Fourier filter": A("complex in between", shared.Fourier, PLAIN, SLOW, dense=True),
}

POSES = {
    "One pose": A("", mlp, batch(WIDTH, m=1)),
    "A number": A("0-D output", mlp, batch(WIDTH, then=lambda y: y.sin().mean())),
    "[m, k]": A("several numbers per pose", lambda: mlp(out=3), batch(WIDTH, then=torch.sin)),
    "[k, m]": A("", lambda: mlp(out=3), batch(WIDTH, then=lambda y: y.T.sin())),
    "[m, 1]": A("", mlp, batch(WIDTH, then=lambda y: y)),
    "[2, m, 3]": A(
        "", lambda: mlp(out=6), batch(WIDTH, then=lambda y: y.unflatten(1, (2, 3)).movedim(1, 0))
    ),
    "One of the poses": A("loss of an index", mlp, batch(WIDTH, then=lambda y: y[2])),
    "A slice of the poses": A("", mlp, batch(WIDTH, then=lambda y: score(y)[1::2])),
    "A mask of the poses": A("loss of some of the batch", mlp, states.masked),
    "Pooled": A(
        "six rows, three predictions", mlp, batch(WIDTH, then=lambda y: y.view(3, 2).sum(1))
    ),
    "Permuted": A("sorted inside", lambda: states.Sorting(back=False), PLAIN),
    "Permuted and put back": A("", lambda: states.Sorting(back=True), PLAIN),
    "A loop": A("poses scored one by one, then stacked", mlp, states.loop),
    "An empty batch": A("", mlp, batch(WIDTH, m=0), NoPosesError, match="no prediction"),
    "Keyword arguments": A(
        "and a dict of outputs",
        states.Dictionary,
        lambda model, seed: model(draw(seed, M, WIDTH), extra=draw(seed, M, 2))["energy"],
        dense=True,
    ),
    "Several inputs": A(
        "and a tuple of outputs",
        states.Pair,
        lambda model, seed: score(model(draw(seed, M, WIDTH), draw(seed, M, 2))[0]),
        dense=True,
    ),
    "Mixture of experts": A("routed by index_select", shared.Experts, PLAIN),
    "Message passing": A("ragged, index_add", graphs.Messages, graphs.message_passing),
    "EGNN": A("ragged, coordinates move", graphs.Egnn, graphs.equivariant),
    "SchNet": A("PyTorch Geometric, ragged molecules", graphs.schnet, graphs.molecules),
    "Batches of other sizes": A("1, 6 and 70 poses", mlp, states.other_sizes),
    "One row for two predictions": A("in the second step", mlp, states.sharing, SLOW, warns=True),
    "[m, m]": A("as many numbers as poses", lambda: mlp(out=M), batch(WIDTH, then=torch.sin)),
    "Poses along a signal": A(
        "one convolution over all",
        lambda: nn.Conv1d(1, 2, 2, stride=2),
        lambda model, seed: score(model(draw(seed, 1, 1, 2 * M))[0], dim=1),
        SLOW,
    ),
    "Written in place": A("into slices of a result", shared.InSlices, batch(T, WIDTH), dense=True),
    "Forces": A("a loss of the gradient of the energy", mlp, states.forces),
    "torch.vmap": A("inside the model", mlp, states.vmapped),
}

STATES = {
    "Unused and frozen": A("zeros, and .grad stays None", states.Unused, PLAIN, dense=True),
    "Frozen, then unfrozen": A("between steps", mlp, states.thawing),
    "All frozen": A(
        "",
        lambda: mlp().requires_grad_(False),
        PLAIN,
        NotDifferentiableError,
        match="carries no graph",
    ),
    "no_grad": A("", mlp, states.without_graph, NotDifferentiableError, match="no_grad"),
    "A copy's output": A(
        "copy.deepcopy", mlp, states.copied, NotDifferentiableError, match="a copy"
    ),
    "Input changed in place": A(
        "before the Jacobian", mlp, states.changed_in_place, StaleFactorError, match="in place"
    ),
    "Side effects": A("a buffer changes in forward", states.Counting, PLAIN, dense=True),
    "Another forward before": A("", mlp, states.after_another_forward),
    "Training steps between": A("", mlp, states.after_training),
    "Two engines": A("on one model", mlp, states.with_another_engine),
    "Two forwards, two backwards": A("", mlp, states.two_forwards),
    "Replaced submodule": A("after the engine was made", mlp, states.replaced),
    "Training, then eval": A(
        "with BatchNorm", lambda: mlp(nn.BatchNorm1d(5)), states.switching, SLOW, warns=True
    ),
    "float32, then float64": A(
        "inside one model",
        shared.Mixed,
        lambda model, seed: score(model.mixed()(draw(seed, M, WIDTH))),
        tolerance=1e-6,
    ),
    "Checkpointed": A("use_reentrant=False", shared.Checkpointed, PLAIN, dense=True),
    "Checkpointed, several": A("", lambda: shared.Checkpointed(3), PLAIN, dense=True),
    "Checkpointed, reentrant": A(
        "use_reentrant=True",
        lambda: shared.Checkpointed(reentrant=True),
        PLAIN,
        ReentrantCheckpointError,
        match="use_reentrant=False",
    ),
    "Offloaded": A("save_on_cpu", mlp, states.offloaded, released=False),
    "Autocast": A(
        "bfloat16, around the forward only",
        mlp,
        states.under_autocast,
        dtype=torch.float32,
        tolerance=2e-2,
    ),
    "bfloat16": A(
        "the whole model",
        mlp,
        lambda model, seed: model(draw(seed, M, WIDTH, dtype=torch.bfloat16)).squeeze(1),
        dtype=torch.bfloat16,
        tolerance=4e-2,
    ),
    "Compiled": A("torch.compile", lambda: torch.compile(mlp(), backend="eager"), PLAIN),
    # After a plain backward an AOT graph can be used only once; test_traps.py has that.
    "Compiled, AOT": A(
        "torch.compile",
        lambda: torch.compile(mlp(), backend="aot_eager"),
        PLAIN,
        SLOW,
        released=False,
    ),
    "Compiled in part": A("a submodule", lambda: states.InPart("eager"), PLAIN),
    "Compiled in part, AOT": A("", lambda: states.InPart("aot_eager"), PLAIN, SLOW, released=False),
    "Hook that rescales": A("on an activation", lambda: states.Hooked(lambda g: 2 * g), PLAIN),
    "Hook that clips": A(
        "not linear: the rows are autograd's, wᵀJ is not a plain backward",
        lambda: states.Hooked(states.clip),
        PLAIN,
        SLOW,
        warns=True,
        linear=False,
    ),
}
