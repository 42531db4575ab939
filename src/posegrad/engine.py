"""The engine: runs the poses of a group, and reads gradients off graphs."""

from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from functools import partial
from typing import Any, TypeVar, final

import torch
from torch import Tensor, nn
from torch.amp import GradScaler

from posegrad.combination._base import Rule
from posegrad.errors import UnsupportedModuleError
from posegrad.graph import Gatherer, Listening
from posegrad.jacobian import Jacobian, PoseJacobian, check_whole, of_all, step_of_batches
from posegrad.model import Roster, Wanted, check_modules, unwrapped
from posegrad.schedule._blocks import Gathering
from posegrad.schedule._call import call_of, plan_of
from posegrad.schedule._chunks import ChunkSize
from posegrad.schedule._combine import combine
from posegrad.schedule._embed import Embeddings
from posegrad.schedule._gather import Loss, gather, in_form
from posegrad.schedule._loss import LossCall
from posegrad.schedule._options import Options
from posegrad.schedule._plan import Plan, ReadingPlan, may_be_output, reading_plan
from posegrad.schedule._poses import Pose
from posegrad.schedule._progress import bar
from posegrad.schedule._replay import Start
from posegrad.schedule._result import Combined
from posegrad.schedule._shared_tiles import gramian_of_ranks
from posegrad.schedule._tiles import gramian, planned
from posegrad.schedule._tiles_plan import GramianPlan
from posegrad.weighting._batches import check_batches
from posegrad.weighting._rules import AnyRule, is_noise_alone

__all__ = ["Engine"]

T = TypeVar("T")


@final
class Engine:
    r"""Scores groups of poses and gives their combined prediction exact gradients.

    A model scores one pose, :math:`\hat y_i = f_\theta(X_i)`; a rule combines m of them. The
    gradient of any loss of the result is :math:`w^\top J`, with one weight for each pose and row i
    of J the gradient of :math:`\hat y_i`. The engine finds w first and differentiates only what w
    needs, one pose at a time, so that m graphs are never alive together.

    Where a rule looks at gradients, the engine reads J off a batch's graph: `jacobian`, `backward`,
    `loss`, `gather`, `gramian`. `listen` reads it from a backward that runs anyway. Nothing is
    added to the model, and no global random number is drawn.

    Args:
        modules: The model; or several modules, none inside another.
        predict: Called as `predict(*modules, pose)` to score a pose or a chunk of them; several
            modules need it for that. Default: `model(pose)`; `lambda model, pose: model(**pose)`
            unpacks a dict.
        collate: Joins poses of a list into what the model takes, e.g. `torch.stack`. The model must
            then return one row per pose, `[c, ...]`. PyG's graphs need none, nor does a batch.
        chunk_size: How many poses are scored together, in one graph; a `Budget` bounds the sum of
            their sizes instead, e.g. of their atoms. `"auto"`: as many as fit into `memory`; poses
            that are walked without `collate`, one by one. A number or a `Budget` also accepts poses
            that influence each other within a chunk.
        memory: The bytes that graphs may take together, as a number or as text, `"2GiB"`. It bounds
            the tensors that graphs keep; the temporaries of one chunk come on top. `"auto"`: on an
            accelerator half of what is free when the engine is made, on a CPU 1 GiB. What the graph
            of a pose takes is measured in the first call for poses of a kind. Rows of a Jacobian
            without a closed form are computed in pieces of an eighth of it.
        check: When a Jacobian is compared with a plain backward: on the `"first"` gather of every
            structure of graph, `"always"`, or `"never"`. Parameters whose rows disagree are read
            again by slower ways.
        batch_dim: `"auto"` finds out which dimension of an output counts poses; a number is trusted
            to be it, as in TorchJD. None takes a backward for every row.
        process_group: A `torch.distributed` group of processes with copies of the model that share
            every group of poses: a call takes the poses of this process, its result is that of all.
            Default: that of a DistributedDataParallel or `fully_shard` model; else none.

    Raises:
        TypeError: if a module is not an `nn.Module`.
        ValueError: if there is no module, or an option is unknown.
        UnsupportedModuleError: if one is inside another, or has parts wrapped for DDP or FSDP1.

    Example:
        >>> model = nn.Linear(3, 1)
        >>> prediction, per_pose = Engine(model).combine(torch.randn(5, 3), Min(scale=1000.0))
        >>> prediction.shape, per_pose.shape
        (torch.Size([]), torch.Size([5]))
        >>> (prediction - 1.0).square().backward()  # adds to model.weight.grad, as usual
    """

    def __init__(
        self,
        *modules: nn.Module,
        predict: Callable[..., Tensor] | None = None,
        collate: Callable[[list[Pose]], Any] | None = None,
        chunk_size: ChunkSize = "auto",
        memory: int | str = "auto",
        check: str = "first",
        batch_dim: int | str | None = "auto",
        process_group: Any = None,
    ) -> None:
        self.given = modules
        modules, self._ranks = unwrapped(modules, process_group)
        check_modules(modules)
        self.modules = modules
        self._roster = Roster(modules, sharded=self._ranks is not None and self._ranks.sharded)
        self._options = Options(
            modules, predict, collate, chunk_size, memory, self._ranks, self._roster
        )
        shared = self._ranks is not None
        self._block_bytes = max(1, self._options.memory // 8)
        self._gatherer = Gatherer(check, batch_dim, self._block_bytes, self._roster.tensors, shared)

    def combine(
        self,
        poses: Iterable[Pose],
        rule: Rule,
        *,
        groups: Tensor | Sequence[int] | None = None,
        schedule: str = "auto",
        skip_below: float = 0.0,
    ) -> Combined:
        r"""Scores the poses of one group, or of several, and combines their predictions.

        Both results carry gradients for any loss: `loss.backward()` adds them to `.grad` as usual,
        for the model's parameters, the rule's, and tensors inside the poses that require grad.

        Args:
            poses: A batch is sliced: a stacked tensor, or a mapping, dataclass or named tuple of
                tensors with the same dimension 0, or a PyG Batch. The model is called with slices
                `[c, ...]` of it and returns a row for each pose. A list, tuple, generator or other
                iterable is walked: the model is called with one pose after another, which is
                whatever it takes, a tensor, a tuple, a dict, a dataclass, a PyG Data.
            rule: A combination rule, or any function from predictions `[m, ...]` to `[...]`.
            groups: For n groups at once, the number of each pose's group, a tensor `[m]`; or a list
                of the groups' sizes. The prediction then is `[n, ...]`; a loss may couple groups.
            schedule: `"retain"`, `"store"`, `"stream"`, `"recompute"`; `"auto"` takes the one of
                least time that fits into `memory`. All give the same numbers; see `plan`.
            skip_below: Leave out of the gradient the poses whose weight is below this share of the
                largest of their group. The error is at most `skip_below * max|w|` times the sum of
                the norms of the gradients left out; 0 is exact.

        Returns:
            `(prediction, per_pose)`; under `torch.no_grad()` without gradients, for m forwards.

        Raises:
            NoPosesError: if there are none.
            PosesError: if they are one object that is no batch.
            PosesMixError: if poses of a batch influence each other, without `chunk_size`.
            NonFinitePredictionError: if predictions are nan or infinite; names the poses.
            ShapeMismatchError: if predictions do not fit the chunk or each other.
            NotDifferentiableError: if predictions cannot carry a gradient.
            UntrackedTensorError: if a prediction depends on a tensor that requires grad and is
                neither a parameter nor part of its pose.
            ValueError: if the schedule is unknown or cannot serve the call, or `predict` is needed.

        In backward:
            StaleParametersError: if a parameter was changed since.
            PerPoseLossError: if the loss depends on `per_pose` under `stream`.
            ReplayError: if a pose scored again gives another prediction (`recompute`).
            HigherOrderError: if a second derivative is asked for (not under `retain`).

        Shape:
            predictions of shape `[...]` for a pose give `per_pose` `[m, ...]` and a `prediction`
            `[...]`. A prediction of one number counts as `[]`, be it `[1]` or `[1, 1]`.

        Note:
            Time in forwards F and backwards B, memory beyond the poses: `stream` m F + K m B, in
            chunks, or m (F + B), one chunk's graph and K sums of parameter size; `recompute`
            m F + k (F + B), one chunk's graph, where k poses have a weight that is not exactly
            zero; `store` m (F + B), m rows; `retain` m (F + B), m graphs. The first call of an
            engine scores all poses with graphs.

        Example:
            >>> prediction, per_pose = Engine(nn.Linear(3, 1)).combine(torch.eye(3), Mean())
            >>> bool(prediction == per_pose.mean())
            True
        """
        call = partial(call_of, self._options, poses, rule, groups, schedule, skip_below)
        return combine(call, self._gatherer)

    def embed(self, poses: Iterable[Pose]) -> Tensor:
        r"""What the model makes of each pose, as one tensor with a gradient, for any loss.

        For losses that compare poses: contrastive ones over two encoders, with an engine each, or
        heads that look at all instances of a bag. The backward of the loss ends at `[m, d]`
        numbers; from there each chunk is scored again and differentiated, so that one graph is
        alive at a time. Gradients are those of `torch.cat([model(chunk), ...])`.

        Args:
            poses: As for `combine`.

        Returns:
            `[m, ...]`; `[m]` if the model returns one number per pose. If several processes share
            the poses, the embeddings of all of them. Under `torch.no_grad()` without gradient.

        Raises:
            NoPosesError: if there are none. Other errors, also in backward, are those of `combine`.

        Note:
            The schedule is `recompute`. Time: m F + k (F + B), where k poses have a cotangent that
            is not exactly zero. Memory: one chunk's graph. Poses that all fit into one chunk are
            scored once, and their graph is kept. A second backward, with `retain_graph=True`,
            scores the chunks again.

        References:
            Gao, Zhang, Han, Callan, "Scaling Deep Contrastive Learning Batch Size under Memory
            Limited Setup", RepL4NLP 2021 (GradCache).

        Example:
            >>> engine = Engine(nn.Linear(3, 4), chunk_size=2)
            >>> embeddings = engine.embed(torch.randn(6, 3))
            >>> similarities = embeddings @ embeddings.T  # [6, 6], of all pairs
            >>> similarities.logsumexp(1).sum().backward()  # three chunks, scored again
        """
        call = partial(call_of, self._options, poses, Embeddings())
        return combine(call, self._gatherer).prediction

    def jacobian(
        self,
        output: Tensor,
        *,
        params: Wanted = None,
        pose_index: Tensor | Sequence[Tensor] | None = None,
        retain_graph: bool = False,
    ) -> Jacobian:
        r"""Reads the Jacobian of an output off its graph; the graph is freed.

        Any output will do: predictions, losses, several numbers per pose. Which rows of the
        activations belong to which pose is found out.

        Args:
            output: Of any shape, computed with a graph from the engine's modules.
            params: Names or parameters to differentiate by; default: all trainable ones. Also
                other tensors that the output was computed from, activations or inputs that require
                grad; number i of `params` then goes by the name `"params[i]"`, and `backward`
                refuses them.
            pose_index: The pose of each row of a ragged batch, one tensor for each kind of row
                (atoms, edges). It saves the search for owners, and is trusted.
            retain_graph: Leave the graph for another backward.

        Returns:
            J as a linear operator; a `SharedJacobian` if several processes share the poses.

        Raises:
            NoPosesError: if the output is empty.
            NotDifferentiableError: if it has no graph, or depends on none of the parameters.
            ReentrantCheckpointError: if a reentrant checkpoint is in its graph.
            StaleFactorError: if a tensor the forward saved was changed in place.
            ValueError: if `params` names what is not there.
            UnsupportedModuleError: if `params` has activations, and several processes share the
                poses.

        Warns:
            UserWarning: once for every structure in which poses depend on each other; if gradients
                are nan.

        Note:
            Time: one backward to the activations, which computes no parameter's gradient; a second
            where owners do not follow from the graph; one for each row where poses mix. Memory:
            the layers' inputs and cotangents, about as much as the graph, and the rows of
            parameters without a closed form.

        Example:
            >>> model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
            >>> Engine(model).jacobian(model(torch.randn(6, 3)).squeeze(1)).gramian().shape
            torch.Size([6, 6])
        """
        index = [pose_index] if isinstance(pose_index, Tensor) else list(pose_index or ())
        params, activations = self._roster.parted(params)
        if activations:
            if self._ranks is not None:
                raise UnsupportedModuleError(
                    f"{', '.join(activations)}: each rank has activations of its own poses, and a "
                    f"Jacobian that ranks share has columns that are the same for all.\n"
                    f"Use Engine(model), without process_group, on each rank."
                )
            return self._gatherer.read_at(
                output,
                activations,
                self._trained(params),
                pose_index=index,
                keep_graph=retain_graph,
            )
        own = partial(self._gatherer.read, output, pose_index=index, keep_graph=retain_graph)
        return of_all(own, partial(self._trained, params), self._ranks)

    def listen(self, output: Tensor) -> Listening:
        r"""Reads the Jacobian of an output from the backward that runs anyway.

        The backward is the user's own, of any loss of the output: a mean, a sum, weighted, scaled.
        Its gradients are the same as without listening, bit for bit.

        Args:
            output: One number for each pose, computed with a graph from the engine's modules.

        Returns:
            A `Listening`, for a `with` block or for `start()` and `stop()`; its `jacobian` is J.

        Raises:
            ListeningError: if the rows cannot be told from one backward: poses mix, numbers of a
                pose share rows, parameters enter through computed tensors or inside a checkpoint.
            NoPosesError: if the output is empty.
            NotDifferentiableError: as for `jacobian`.

        Note:
            Time: hooks on the operators behind the output, some 6 us each; for a structure that was
            not met before, one `jacobian`; an activation-only backward each time where owners do
            not follow from the graph. Memory: until J is dropped, the layers' inputs, which
            a backward would free as it goes, and the cotangents of their outputs.

        Example:
            >>> model = nn.Linear(3, 1)
            >>> losses = model(torch.ones(2, 3)).squeeze(1)
            >>> with Engine(model).listen(losses) as heard:
            ...     losses.mean().backward()
            >>> heard.jacobian.gramian()
            tensor([[4., 4.],
                    [4., 4.]])
        """
        check_whole(self._ranks)
        outlined = partial(self._gatherer.listen, output, self._trained())
        finish = partial(of_all, trainable=self._trained, ranks=self._ranks)
        return Listening.of(outlined, finish, is_shared=self._ranks is not None)

    def gather(
        self, poses: Iterable[Pose], *, loss: Loss | None = None, form: str = "auto"
    ) -> Jacobian:
        """Scores poses chunk by chunk and gathers their Jacobian; each chunk's graph is freed.

        Args:
            poses: As for `combine`.
            loss: Called with the predictions `[c, ...]` of a chunk and the numbers `[c]` of its
                poses, to pick their targets by; returns `[c, ...]`. J then has the rows of these.
            form: How each parameter's rows are held: as `"factors"`, `"dense"`, or as the smaller
                of the two, `"auto"`.

        Returns:
            J with the rows of all poses.

        Raises:
            NoPosesError: if there are none.
            ShapeMismatchError: if predictions, or rows of the loss, are not one for each pose.
            NotDifferentiableError: if none depends on a parameter. Other errors are `jacobian`'s.

        Note:
            Time: m forwards, and `jacobian` for each chunk. Memory: one chunk's graph, and m rows
            in the form that was asked for.

        Example:
            >>> targets = torch.zeros(5)
            >>> squares = lambda predictions, i: (predictions - targets[i]).square()
            >>> Engine(nn.Linear(3, 1)).gather(torch.randn(5, 3), loss=squares).matrix().shape
            torch.Size([5, 4])
        """

        def own(parameters: Mapping[str, nn.Parameter]) -> PoseJacobian:
            return PoseJacobian.joined(self._gathered(poses, parameters, loss, in_form(form)))

        return of_all(own, self._trained, self._ranks)

    def gramian(
        self,
        poses: Iterable[Pose],
        other: Iterable[Pose] | None = None,
        *,
        loss: Loss | None = None,
        progress: bool = False,
    ) -> Tensor:
        r"""The Gramian of more poses than fit, or inner products with the rows of other poses.

        The poses are divided into blocks that hold an eighth of `memory`, and gathered block by
        block: a tile of the Gramian is the product of two blocks. Tiles below the diagonal mirror
        those above it.

        Args:
            poses: As for `combine`. What has a length and can be indexed is fetched pose by pose,
                each time that a block is gathered; a generator is turned into a list.
            other: Poses to take inner products with, in place of the first ones.
            loss: As for `gather`. The numbers of `other` follow those of the poses, so that one
                tensor may hold the targets of both.
            progress: Whether a bar counts the gathers. Needs tqdm, `posegrad[progress]`; over ranks
                the first one shows it.

        Returns:
            :math:`J J^\top`, or :math:`J K^\top` with K the rows of the others, in the shape of
            `Jacobian.gramian`: `[N, N]` or `[N, N']` for one number per pose. If several processes
            share the poses, each passes its own, and has the products of all, rank after rank.

        Raises:
            NoPosesError: if there are none, or no others.
            ReplayError: if poses that are scored again give other predictions.
            MissingExtraError: if tqdm is asked for and missing. Other errors are `gather`'s.

        Note:
            Time: with B blocks, a block is gathered some `B^2 / 2` times, with B and B' blocks some
            `B B'` times; the first poses once more, to measure them. `plan_gramian` tells the
            numbers. Memory: two blocks, the graph of a chunk, the result, and for each block a copy
            of the buffers: poses that are scored again find the random state and the buffers of the
            first time. Blocks end where chunks of a stated `chunk_size` do; under a `Budget`, each
            block begins a chunk. Each of several ranks with B blocks gathers some `B^2`, and sends
            each of these to all.

        Example:
            >>> Engine(nn.Linear(3, 1)).gramian(torch.randn(50, 3), torch.randn(20, 3)).shape
            torch.Size([50, 20])
        """
        check_whole(self._ranks)
        parameters = self._trained()
        how = self._gathering(parameters, loss)
        if self._ranks is None:
            return gramian(poses, other, how, partial(bar, unit="block", shown=progress))
        shown = partial(bar, unit="block", shown=progress and self._ranks.own == 0)
        return gramian_of_ranks(poses, other, how, parameters, self._ranks, shown)

    def plan_gramian(
        self,
        poses: Iterable[Pose],
        other: Iterable[Pose] | None = None,
        *,
        loss: Loss | None = None,
    ) -> GramianPlan:
        """How often `gramian` would gather poses, and what it would hold.

        Args:
            poses: As for `gramian`; a generator is used up.
            other: As for `gramian`; a generator is used up.
            loss: As for `gramian`.

        Returns:
            Something to print.

        Raises:
            NoPosesError: if there are none, or no others.
            UnsupportedModuleError: if several processes share the poses. Other errors are
                `gather`'s.

        Note:
            The first poses are gathered, to see what one holds; random state and buffers are put
            back.

        Example:
            >>> engine = Engine(nn.Linear(999, 1), memory="1MiB")
            >>> engine.plan_gramian(torch.randn(100, 999)).gathers
            7
        """
        if self._ranks is not None:
            raise UnsupportedModuleError(
                "Ranks share the poses of this engine, and what each gathers depends on those of "
                "all.\nPlan with Engine(model) and the poses of one rank: for B blocks there, each "
                "of the ranks gathers some B^2."
            )
        return planned(poses, other, self._gathering(self._trained(), loss))

    def _gathering(self, parameters: Mapping[str, nn.Parameter], loss: Loss | None) -> Gathering:
        """How blocks of poses are gathered."""

        def own(part: Any, start: int) -> PoseJacobian:
            kept = in_form("auto")
            return PoseJacobian.joined(self._gathered(part, parameters, loss, kept, start))

        note = partial(Start, parameters.values(), self._roster.parts())
        return Gathering(own, self._block_bytes, self._options.stated_chunk, note)

    def project(
        self, poses: Iterable[Pose], k: int, seed: int = 0, *, loss: Loss | None = None
    ) -> Tensor:
        """Random projections of the rows of any number of poses, chunk by chunk.

        Args:
            poses: As for `combine`.
            k: As for `Jacobian.project`, which tells what a projection is and how exact.
            seed: As for `Jacobian.project`.
            loss: As for `gather`.

        Returns:
            `[N, k]` for one number per pose. To keep a data set's on disk, save this tensor.

        Raises:
            ValueError: if k is no positive number. Other errors are `gather`'s.

        Note:
            Time: as `gather`, and some products of a projection's width. Memory: one chunk's
            factors, and the result; if several processes share the poses, all factors.

        Example:
            >>> Engine(nn.Linear(3, 1)).project(torch.randn(50, 3), 16).shape
            torch.Size([50, 16])
        """
        if self._ranks is not None:
            return self.gather(poses, loss=loss).project(k, seed)
        return torch.cat(
            self._gathered(poses, self._trained(), loss, lambda J: J.consumed().project(k, seed))
        )

    def compute_gramian(self, output: Tensor) -> Tensor:
        """The Gramian of an output's gradients, as by TorchJD's engine; the graph is kept.

        Returns:
            Of shape `output.shape + reversed(output.shape)`, which for `[m]` is `[m, m]`.

        Note:
            Outputs, time, memory and errors: those of `jacobian`, then of `Jacobian.gramian`.

        Example:
            >>> model = nn.Linear(3, 1)
            >>> losses = model(torch.ones(2, 3)).squeeze(1)
            >>> Engine(model).compute_gramian(losses)
            tensor([[4., 4.],
                    [4., 4.]])
            >>> losses.backward(torch.ones(2))
        """
        return self.jacobian(output, retain_graph=True).consumed().gramian()

    def backward(
        self,
        output: Tensor | tuple[Tensor, ...],
        rule: Tensor | AnyRule,
        *,
        scaler: GradScaler | None = None,
    ) -> Tensor | None:
        r"""Adds the gradient a rule makes of an output's Jacobian to the parameters' `.grad`.

        Args:
            output: As for `jacobian`; not scaled, if there is a scaler. If it has no rows, a rule
                with noise gives noise alone. For TorchJD's `MoDoWeighting` and `SDMGradWeighting`,
                a tuple: the losses `[m]` of m tasks on two independent batches. Weights are made
                of :math:`J_1 J_2^\top`; the gradient is that of the mean of both batches.
                With a third batch, it is that of the third.
            rule: As for `Jacobian.backward`.
            scaler: As for `Jacobian.backward`.

        Returns:
            The weights, in the output's shape; None if the rule has none.

        Note:
            Time, memory and errors: those of `jacobian`, then of `Jacobian.backward`.

        Example:
            >>> model = nn.Linear(3, 1)
            >>> Engine(model).backward(model(torch.ones(2, 3)).squeeze(1), Mean())
            tensor([0.5000, 0.5000])
        """
        if isinstance(output, tuple):
            check_batches(rule, [one.shape for one in output])
            return step_of_batches([self.jacobian(one) for one in output], rule, scaler)
        if self._ranks is None and is_noise_alone(output, rule):
            nothing = PoseJacobian.empty(output, self._trained())
            return nothing.backward(rule, scaler=scaler)
        return self.jacobian(output).consumed().backward(rule, scaler=scaler)

    def loss(self, losses: Tensor, rule: Tensor | AnyRule, *, outside: str = "sum") -> Tensor:
        """A scalar for any trainer: its backward adds the rule's gradient to `.grad`.

        The rows are read and the rule is applied in this call. The backward multiplies the gradient
        by what comes from above: a scale, a share of accumulated steps, a sum with other losses.

        Args:
            losses: As the output of `backward`. Their graph is kept until the scalar's backward, so
                that other losses of the same forward can be added.
            rule: As for `Jacobian.backward`.
            outside: What to do with leaves of the graph that are not parameters of the engine's
                modules, such as heads behind a shared trunk, or inputs. `"sum"` gives them the
                gradient of `losses.sum()`, by a plain backward; `"error"` refuses them, and so does
                a rule with noise.

        Returns:
            The sum of the weighted losses, in float32 at least; their mean if the rule has no
            weights, and under `torch.no_grad()`.

        Raises:
            UntrackedTensorError: if such leaves are refused.
            ValueError: if `outside` is unknown. Other errors are `jacobian`'s and
                `Jacobian.backward`'s; but where gradients pass through float16, rows that are
                nan or infinite give nan, for a GradScaler to skip the step.

        In backward:
            StaleParametersError: if a parameter was changed since.
            HigherOrderError: with `create_graph=True`.

        Note:
            Time: that of `backward`; with leaves outside, one backward more, to these. Memory: the
            graph while rows are read, then one gradient. If ranks share the group, the scalar is
            that of all rows, and every rank's backward gives the whole gradient; leaves outside get
            that of this rank's own losses.

        Example:
            >>> model = nn.Linear(3, 1)
            >>> loss = Engine(model).loss(model(torch.ones(2, 3)).squeeze(1), Mean())
            >>> (loss / 4).backward()  # one of four steps that are accumulated
            >>> model.weight.grad
            tensor([[0.2500, 0.2500, 0.2500]])
        """
        named = self._named()
        call = LossCall(losses, rule, outside, self._gatherer, named, self._roster.parts())
        return call.value(self._trained, self._ranks)

    def plan(
        self,
        poses_or_output: Sized | Tensor,
        rule: Rule,
        *,
        groups: Tensor | Sequence[int] | None = None,
        schedule: str = "auto",
        skip_below: float = 0.0,
    ) -> Plan | ReadingPlan:
        """What `combine` or `backward` would do, without doing any of it.

        Args:
            poses_or_output: Poses as for `combine`, with a length; or an output with its graph.
                A tensor that was computed from the parameters counts as an output if the rule looks
                at gradients, or if it has one number per row; otherwise its rows are poses.
            rule: As for `combine` or `backward`.
            groups: As for `combine`; refused (ValueError) for an output.
            schedule: As for `combine`; refused for an output, too.
            skip_below: As for `combine`; refused for an output, too.

        Returns:
            Something to print. It supposes that a pose's prediction is one number.

        Raises:
            TypeError: if the poses have no length, as a generator.
            NoPosesError: if there are none.

        Example:
            >>> print(Engine(nn.Linear(3, 1)).plan(list(torch.zeros(64, 3)), Mean()))
            schedule   stream (the rule's weights separate)
            poses      64 in 64 chunks
            forwards   64
            backwards  1 to 64
            graphs     1 at a time
            holds      1 running sum: 16 B
            count      64 (until a call has shown)
            <BLANKLINE>
                       time  keeps
            retain     1.00  64 graphs
            store      1.00  1 KiB + 1 graph
            stream     1.00  16 B + 1 graph   chosen
            recompute  1.33  16 B + 1 graph
        """
        parameters = self._trained(real=False)
        wishes = rule, groups, schedule, skip_below
        output = poses_or_output if may_be_output(poses_or_output, rule) else None
        if outlook := self._gatherer.outlook(output, parameters):
            self._trained()
            return reading_plan(output, outlook, *wishes)
        return plan_of(self._options, poses_or_output, *wishes, parameters.values())

    def _gathered(
        self,
        poses: Iterable[Pose],
        parameters: Mapping[str, nn.Parameter],
        loss: Loss | None,
        keep: Callable[[PoseJacobian], T],
        start: int = 0,
    ) -> list[T]:
        options = self._options
        division = options.division(poses, self._named().values())
        return gather(
            self._gatherer,
            options.scorer(),
            options.portions(division),
            division.known.look,
            parameters,
            loss,
            keep,
            start,
        )

    def _named(self) -> dict[str, nn.Parameter]:
        return self._roster.named()

    def _trained(self, wanted: Wanted = None, *, real: bool = True) -> dict[str, nn.Parameter]:
        return self._roster.trainable(wanted, real=real)
