"""The table of operators: all that is known of one by its name.

A row says how poses move through an operator, where a parameter may enter and how its closed form
is read there, and whether the operator only rearranges. An operator without a row is read exactly
too, but slower: it is probed, alone, and rows of a parameter that enters it take its own vjp.
"""

from collections.abc import Mapping
from typing import NamedTuple, final

from posegrad.graph._cuts import CutMove, joined, parted, piled, sliced, taken, unbound
from posegrad.graph._images import (
    convolved,
    group_norm,
    pooled,
    pooled_to_size,
    sampled,
    shuffled_channels,
    spread_channels,
    spread_pixels,
)
from posegrad.graph._indexed import IndexMove, added, added_each, picked, picked_each
from posegrad.graph._layouts import Move
from posegrad.graph._matrices import (
    between_two,
    distances,
    matrices,
    outer,
    plus_vector,
    product,
    reflected,
    rows_alone,
    summed_products,
    system,
    system_or_vectors,
    times_vector,
)
from posegrad.graph._moves import (
    aligned,
    along,
    along_each,
    attention,
    batch_norm,
    classes,
    diagonal,
    first_alone,
    flipped,
    layer_norm,
    layer_norm_backward,
    padded,
    permuted,
    put_in,
    reduced,
    repeated,
    rotated,
    same_front,
    selected,
    sequences,
    stacked,
    transposed,
    viewed,
    windows,
    within_last,
)
from posegrad.graph._pointwise import pointwise
from posegrad.graph._read import (
    Reader,
    bags,
    batch_scale,
    batched_factor,
    channel_bias,
    copies,
    denominator,
    distances_to,
    experts,
    factor,
    group_scale,
    kernel,
    layer_scale,
    layer_scale_in_backward,
    middle,
    numbered,
    root_mean_square_scale,
    scaled_by,
    slope,
    summand,
    table,
    vector,
)
from posegrad.graph._recurrent import (
    GATES,
    Opening,
    gate_bias,
    input_weight,
    recurrent,
    state_weight,
)
from posegrad.graph._strided import restrided

__all__ = ["OPERATORS", "UNKNOWN", "Kind", "kind_of"]


@final
class Kind(NamedTuple):
    """What is known of a kind of operator.

    Args:
        moves: How poses move from its output to its arguments; None if nothing is known.
        told: The names under which it saved what `moves` looks at.
        picks: In place of `moves`, where that depends on numbers that the operator saved.
        cuts: In addition to `moves`, where tensors are put together along the poses or cut out.
        forms: By argument, how the closed form of a parameter there is read.
        opens: How to get at a product inside the operator, if the forms are of that product.
        rearranges: Whether it only rearranges: what it makes of a parameter is read in its place.
        keeps: Whether it keeps the order of numbers, so that it does nothing if the shape stays.
        is_transparent: Whether gradients keep their numbers as they pass it: a transpose, a cast.
        casts: Whether it is a cast.
        multiplies: Whether data meets a parameter in it; an argument without a graph is data.
        looks_up: Whether it looks up rows of its first argument by number.
        is_unbatched: Whether torch has no rule to run its backward on a batch of cotangents, or one
            that is no faster than running it on each of them.
    """

    moves: Move | None = None
    told: tuple[str, ...] = ()
    picks: IndexMove | None = None
    cuts: CutMove | None = None
    forms: Mapping[int, Reader] = {}
    opens: Opening | None = None
    rearranges: bool = False
    keeps: bool = False
    is_transparent: bool = False
    casts: bool = False
    multiplies: bool = False
    looks_up: bool = False
    is_unbatched: bool = False

    @property
    def is_surely_batched(self) -> bool:
        """Whether torch's rule for its batches is known to be right: it is made of simple ones."""
        return self.rearranges or self.moves in (aligned, repeated, _MATRICES)


_MATRICES = product(0, 1)

UNKNOWN = Kind()


def kind_of(name: str) -> Kind:
    """What is known of the operator of a node of that name; copies of views are like views."""
    return OPERATORS.get(name) or OPERATORS.get(name.removesuffix("_copy"), UNKNOWN)


def _all(names: str, kind: Kind) -> dict[str, Kind]:
    """One row for several names, as `Relu` for `ReluBackward0`; `Sum/1` for `SumBackward1`."""
    parts = [name.partition("/") for name in names.split()]
    return {f"{name}Backward{number or 0}": kind for name, _, number in parts}


def _elementwise(names: str) -> dict[str, Kind]:
    """Operators that are one element by element in every variant: with numbers, with tensors."""
    kind = Kind(aligned, forms={argument: pointwise(argument) for argument in range(3)})
    return {f"{name}Backward{i}": kind for name in names.split() for i in range(4)}


_DIM = ("dim",)

_POINTWISE = """
    Abs Acos Acosh Add Addcdiv Addcmul Angle Asin Asinh Atan Atan2 Atanh Ceil Celu Clamp ClampMax
    ClampMin Complex Conj ConjPhysical Copysign Cos Cosh Deg2Rad Digamma Div Elu Erf Erfc Erfinv
    Exp Exp2 Expm1 Floor Fmax Fmin Fmod Frac Gelu Hardshrink Hardsigmoid Hardswish Hardtanh Hypot
    I0 LeakyRelu Ldexp Lerp Lgamma Log Log10 Log1P Log2 LogSigmoid Logaddexp Logaddexp2 Logit
    MaskedFill Maximum Minimum Mish Mul Mvlgamma NanToNum NativeDropout Neg Nextafter Polar
    Polygamma Pow PreluKernel Rad2Deg Reciprocal Relu Remainder Round RreluWithNoise Rsqrt Rsub
    Sgn Sigmoid Sign Silu Sin Sinc Sinh Softplus Softshrink SpecialEntr SpecialErfcx SpecialI0E
    SpecialI1 SpecialI1E SpecialLogNdtr SpecialNdtri SpecialXlog1Py Sqrt Sub Tan Tanh Threshold
    ToCopy Tril Triu Trunc Where Xlogy
    BinaryCrossEntropy BinaryCrossEntropyWithLogits HuberLoss MseLoss SmoothL1Loss SoftMarginLoss
    EluBackward GeluBackward NativeDropoutBackward HardtanhBackward HardswishBackward
    LeakyReluBackward LogSigmoidBackward MishBackward MseLossBackward SigmoidBackward SiluBackward
    SmoothL1LossBackward SoftplusBackward SoftshrinkBackward TanhBackward ThresholdBackward
"""

OPERATORS: dict[str, Kind] = {
    # Element by element; losses too, unless they are reduced to one number, which is no pose
    **_elementwise(_POINTWISE),
    "AddBackward0": Kind(aligned, forms={0: summand(), 1: summand(name="alpha")}),
    "SubBackward0": Kind(aligned, forms={0: summand(), 1: summand(name="alpha", sign=-1.0)}),
    "MulBackward0": Kind(aligned, forms={0: scaled_by("other"), 1: scaled_by("self")}),
    "DivBackward0": Kind(aligned, forms={0: scaled_by("other", inverse=True), 1: denominator}),
    "PreluKernelBackward0": Kind(aligned, forms={1: slope}),
    "ExpandBackward0": Kind(aligned, forms={0: summand()}, keeps=True),
    "RepeatBackward0": Kind(repeated, forms={0: copies}),
    "CloneBackward0": Kind(aligned, rearranges=True, keeps=True),
    "ToCopyBackward0": Kind(aligned, rearranges=True, is_transparent=True, casts=True),
    "torch::autograd::CopyBackwards": Kind(aligned),
    # The same numbers in the same order
    **_all("Alias ReshapeAlias UnsafeView View", Kind(viewed, rearranges=True, keeps=True)),
    **_all(
        "Squeeze Squeeze/1 Squeeze/2 Squeeze/3 Squeeze/4 Unsqueeze", Kind(viewed, rearranges=True)
    ),
    "UnflattenBackward0": Kind(rearranges=True),
    # The same numbers in another order, or some of them
    "TBackward0": Kind(flipped, rearranges=True, is_transparent=True),
    **_all("Transpose Transpose/1", Kind(transposed, ("dim0", "dim1"), rearranges=True)),
    "PermuteBackward0": Kind(permuted, ("dims",), rearranges=True),
    "SelectBackward0": Kind(selected, _DIM, cuts=taken, rearranges=True),
    "SliceBackward0": Kind(along, _DIM, cuts=sliced, rearranges=True),
    "UnbindBackward0": Kind(selected, _DIM, cuts=unbound, rearranges=True),
    **_all(
        "Split SplitWithSizes UnsafeSplit UnsafeSplitWithSizes",
        Kind(along, _DIM, cuts=parted, rearranges=True),
    ),
    **_all("Sort Sort/1 Topk", Kind(along, _DIM)),
    "CatBackward0": Kind(along, _DIM, cuts=joined),
    "StackBackward0": Kind(stacked, _DIM, cuts=piled),
    **_all("Flip Roll", Kind(along_each, ("dims",), rearranges=True)),
    "Rot90Backward0": Kind(rotated, ("dims", "k")),
    "SelectScatterBackward0": Kind(put_in, _DIM),
    "DiagonalBackward0": Kind(diagonal, ("dim1", "dim2")),
    "UnfoldBackward0": Kind(windows, ("dimension",)),
    **_all("ViewAsComplex ViewAsReal", Kind(same_front)),
    # Along one dimension, or several
    **_all("Cummax Cummin Cumprod Cumsum Glu Logcumsumexp LinalgCross", Kind(along, _DIM)),
    **_all("LogSoftmax MaskedSoftmax SafeSoftmax Softmax", Kind(along, _DIM)),
    **_all("LogSoftmaxBackwardData SoftmaxBackwardData", Kind(along, _DIM)),
    **_all("FftC2C FftC2R FftR2C", Kind(along_each, _DIM)),
    **_all("Amax Amin Aminmax Kthvalue LinalgVectorNorm Logsumexp Max", Kind(reduced, _DIM)),
    **_all("Mean/1 Median/1 Min Mode Nanmedian/1 Nansum Norm/1 Norm/2", Kind(reduced, _DIM)),
    **_all("Norm/3 Norm/4 Prod/1 Std StdMean Sum/1 Var VarMean", Kind(reduced, _DIM)),
    # By numbers
    "IndexBackward0": Kind(picks=picked, forms={0: numbered}, looks_up=True),
    "IndexSelectBackward0": Kind(picks=picked, forms={0: numbered}, looks_up=True),
    "GatherBackward0": Kind(picks=picked_each),
    "AsStridedBackward0": Kind(picks=restrided),
    "AsStridedBackward1": Kind(picks=restrided),
    **_all("IndexAdd IndexCopy IndexFill IndexPut IndexPutImpl IndexReduce", Kind(picks=added)),
    **_all("Scatter Scatter/1 ScatterAdd ScatterReduce", Kind(picks=added_each)),
    "EmbeddingBackward0": Kind(forms={0: table}, looks_up=True),
    "EmbeddingBagBackward0": Kind(forms={0: bags}),
    # Products and systems of matrices
    "AddmmBackward0": Kind(
        product(1, 2),
        forms={
            0: summand(name="beta"),
            1: factor("mat2", on_left=True, has_scale=True),
            2: factor("mat1", on_left=False, has_scale=True),
        },
        multiplies=True,
    ),
    "MmBackward0": Kind(
        _MATRICES,
        forms={
            0: factor("mat2", on_left=True, has_scale=False),
            1: factor("self", on_left=False, has_scale=False),
        },
        multiplies=True,
    ),
    "BaddbmmBackward0": Kind(
        product(1, 2),
        forms={
            0: summand(name="beta"),
            1: batched_factor("batch2", on_left=True, has_scale=True),
            2: batched_factor("batch1", on_left=False, has_scale=True),
        },
    ),
    "BmmBackward0": Kind(
        _MATRICES,
        forms={
            0: batched_factor("mat2", on_left=True, has_scale=False),
            1: batched_factor("self", on_left=False, has_scale=False),
        },
        multiplies=True,
    ),
    "GroupedMmBackward0": Kind(rows_alone, forms={1: experts}, multiplies=True),
    "MvBackward0": Kind(times_vector, forms={1: vector}),
    "AddbmmBackward0": Kind(summed_products),
    "AddmvBackward0": Kind(plus_vector),
    "AddrBackward0": Kind(outer),
    "TrilinearBackward0": Kind(
        between_two, ("expand1", "expand2", "expand3", "sumdim"), forms={1: middle}
    ),
    "CdistBackward0": Kind(
        distances,
        forms={
            0: distances_to("x1", "x2", on_left=True),
            1: distances_to("x2", "x1", on_left=False),
        },
    ),
    "EuclideanDistBackward0": Kind(
        distances,
        forms={
            0: distances_to("x1", "x2", on_left=True, by_products=True),
            1: distances_to("x2", "x1", on_left=False, by_products=True),
        },
    ),
    **_all("Cholesky CholeskyInverse LinalgCholeskyEx LinalgDet LinalgEig", Kind(matrices)),
    **_all("LinalgEigh LinalgHouseholderProduct LinalgInvEx LinalgLu", Kind(matrices)),
    **_all("LinalgLuFactorEx LinalgMatrixExp LinalgPinv LinalgQr LinalgSlogdet", Kind(matrices)),
    "LinalgSvdBackward0": Kind(matrices),
    "LuUnpackBackward0": Kind(aligned),
    **_all("CholeskySolve TriangularSolve", Kind(system(0))),
    **_all("LinalgLuSolve LinalgSolveTriangular", Kind(system(1), ("left",))),
    "LinalgSolveExBackward0": Kind(system_or_vectors),
    "OrmqrBackward0": Kind(reflected, ("left",)),
    # Images
    "ConvolutionBackward0": Kind(
        convolved,
        ("groups", "padding", "transposed"),
        forms={1: kernel, 2: channel_bias},
        multiplies=True,
        is_unbatched=True,
    ),
    **_all("AvgPool2D MaxPool2DWithIndices", Kind(pooled(2), ("kernel_size",))),
    **_all("AvgPool3D MaxPool3DWithIndices", Kind(pooled(3), ("kernel_size",))),
    **_all("AdaptiveAvgPool2D AdaptiveMaxPool2D", Kind(pooled_to_size)),
    **_all("AdaptiveAvgPool3D AdaptiveMaxPool3D", Kind(pooled_to_size)),
    **_all("FractionalMaxPool2D MaxUnpool2D UpsampleBicubic2D", Kind(within_last(2))),
    **_all("FractionalMaxPool3D MaxUnpool3D", Kind(within_last(3))),
    **_all("UpsampleLinear1D UpsampleNearest1D UpsampleNearestExact1D", Kind(within_last(1))),
    **_all("UpsampleBilinear2D UpsampleBicubic2DAa UpsampleBilinear2DAa", Kind(within_last(2))),
    **_all("UpsampleNearest2D UpsampleNearestExact2D", Kind(within_last(2))),
    **_all("UpsampleNearest3D UpsampleNearestExact3D UpsampleTrilinear3D", Kind(within_last(3))),
    "ChannelShuffleBackward0": Kind(shuffled_channels),
    "PixelShuffleBackward0": Kind(spread_channels, ("upscale_factor",)),
    "PixelUnshuffleBackward0": Kind(spread_pixels, ("downscale_factor",)),
    **_all("GridSampler2D GridSampler3D", Kind(sampled)),
    **_all("AffineGridGenerator Col2Im Im2Col", Kind(first_alone)),
    "ConstantPadNdBackward0": Kind(padded, ("pad",)),
    **_all("ReflectionPad1D ReflectionPad2D ReflectionPad3D", Kind(padded, ("padding",))),
    **_all("ReplicationPad1D ReplicationPad2D ReplicationPad3D", Kind(padded, ("padding",))),
    # Statistics
    "NativeLayerNormBackward0": Kind(
        layer_norm, ("normalized_shape",), forms={1: layer_scale, 2: summand()}
    ),
    "NativeLayerNormBackwardBackward0": Kind(
        layer_norm_backward, ("normalized_shape",), forms={4: layer_scale_in_backward}
    ),
    "FusedRmsNormBackward0": Kind(
        layer_norm, ("normalized_shape",), forms={1: root_mean_square_scale}
    ),
    "NativeGroupNormBackward0": Kind(
        group_norm, ("group",), forms={1: group_scale, 2: channel_bias}
    ),
    "NativeBatchNormLegitBackward0": Kind(batch_norm, ("training",)),
    "NativeBatchNormBackward0": Kind(
        batch_norm, ("training",), forms={1: batch_scale, 2: channel_bias}
    ),
    # Told, so that a layer in training and in evaluation are two structures
    **_all("CudnnBatchNorm MiopenBatchNorm", Kind(told=("training",))),
    # An LSTM's layer in one operator
    "MkldnnRnnLayerBackward0": Kind(
        recurrent,
        forms={1: input_weight, 2: state_weight, 3: gate_bias, 4: gate_bias},
        opens=GATES,
        multiplies=True,
        is_unbatched=True,
    ),
    # Attention
    **_all("ScaledDotProductCudnnAttention ScaledDotProductEfficientAttention", Kind(attention)),
    **_all("ScaledDotProductFlashAttention", Kind(attention)),
    "ScaledDotProductFlashAttentionForCpuBackward0": Kind(attention, is_unbatched=True),
    # Losses that pick a class
    **_all("NllLoss NllLoss2D", Kind(classes)),
    **_all("MultiMarginLoss MultilabelMarginLoss", Kind(first_alone)),
    "CtcLossBackward0": Kind(sequences),
}
"""By the name of the node."""
