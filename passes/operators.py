"""The table of operators: one row holds every known fact about one operator.

    operator(node).elementwise         replaces a set of names, and checks the domain of the node

A row tells how an operator treats the channels of its data. Facts that need code (which channels of a Reshape go
together, say) are found by ``kind``: operators of one kind share a rule in ``links``, ``maps`` and the like. The tests
run every operator to check its row. A new operator needs a row here, and a rule only if the operator moves channels.

Facts about a runtime, such as the operators that a runtime fuses, do not belong here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import onnx_graphsurgeon as gs

from channelfold.runtime.io import edit

EVERY = ()  # the value of ``data`` for an operator whose inputs all hold data


@dataclass(frozen=True)
class Operator:
    """One operator at inference, with its default attributes.

    ``kind`` names the rules that follow the channels; "" where there are none. ``data`` lists the inputs that hold data
    and no parameters. The following facts hold for the function f of all data inputs together:

        linear    f(x + y) + f(0) = f(x) + f(y)
        scale     f(s x) = s f(x), with a scale by channel, of any sign or positive; "" where no scale passes
        shift     f(x + z) = f(x) + z, with a shift by channel
        moves     each element of f(x) is an element of x, or zero

    An ``arithmetic`` operator with a constant operand scales the other operand, or shifts it if ``linear``. The second
    operand ``neutral`` leaves the first operand unchanged. An operator that ``rectifies`` shrinks negative values more
    than positive values. An operator that ``sums`` reduces its input, and zeros add nothing to the result. Two runs of
    a ``random`` operator may differ. Input ``gamma`` of a norm scales the result by channel; with ``beta`` the next
    input shifts the result. ``gates`` counts the blocks of rows in the weights of a recurrent cell. Input ``sized`` is
    the shape of the result.
    """

    kind: str = ""
    data: tuple[int, ...] = (0,)
    linear: bool = False
    scale: Literal["any", "positive", ""] = ""
    shift: bool = False
    moves: bool = False
    arithmetic: bool = False
    neutral: float | None = None
    rectifies: bool = False
    sums: bool = False
    random: bool = False
    gamma: int = 0
    beta: bool = False
    gates: int = 0
    sized: int | None = None

    @property
    def elementwise(self) -> bool:
        """Whether the operator treats every element alike in all channels. Operands broadcast to each other."""
        return self.kind == "elementwise"

    @property
    def weighted(self) -> bool:
        """Whether the operator multiplies by a weight as a linear layer does."""
        return self.kind in ("conv", "gemm", "matmul")

    @property
    def weights(self) -> tuple[int, ...]:
        """The inputs whose constants are weights, with channels in rows and columns."""
        return _WEIGHTS.get(self.kind, ())

    @property
    def asks_shape(self) -> bool:
        """Whether the operator reads nothing but the shape of its input."""
        return self.kind in ("shape", "size")

    @property
    def copies(self) -> bool:
        """Whether the result holds the elements of the input in the same order, in any type or shape."""
        same = self.elementwise and self.data == (0,) and self.linear and self.shift
        return same or self.kind == "reshape"

    @property
    def adds(self) -> bool:
        return self.arithmetic and self.linear

    @property
    def multiplies(self) -> bool:
        return self.arithmetic and not self.linear

    @property
    def joins(self) -> bool:
        """Whether one scale for all operands, which broadcast to each other, becomes the scale of the result."""
        return self.elementwise and self.data == EVERY and bool(self.scale)

    @property
    def merges(self) -> bool:
        """Whether the result holds elements of several inputs, each element from one input."""
        several = len(self.data) != 1 and self.kind != "pad"
        return several and (self.moves or (bool(self.scale) and not self.joins))

    @property
    def source(self) -> int | None:
        """The only input whose channels the result has; None where the result has the channels of several inputs."""
        return None if self.data == EVERY or self.merges else self.data[0]

    @property
    def norm_axis(self) -> int:
        """The axis of the channels that gamma of a norm scales."""
        return 1 if self.kind in ("batch_norm", "instance_norm", "group_norm") else -1

    def inputs(self, node: gs.Node) -> tuple[int, ...]:
        """The inputs of a node of this operator that hold data."""
        return self.data or tuple(range(len(node.inputs)))


_WEIGHTS = {
    "conv": (1,), "gemm": (1,), "matmul": (0, 1), "einsum": (0, 1, 2), "recurrent": (1, 2), "embedding": (2, 3, 4),
    "fused_conv": (1,), "fused_gemm": (1,), "fused_matmul": (0, 1), "packed_attention": (1,),
}  # fmt: skip


def _move(kind: str, data: tuple[int, ...] = (0,), shift: bool = True, sized: int | None = None) -> Operator:
    return Operator(kind, data, linear=True, scale="any", shift=shift, moves=True, sized=sized)


_ELEMENTWISE = Operator("elementwise")
_OF_SEVERAL = Operator("elementwise", EVERY)
_ACTIVATION = Operator("elementwise", rectifies=True)
_RECTIFIER = Operator("elementwise", scale="positive", rectifies=True)
_NORM = Operator("norm", gamma=1, beta=True)

_STANDARD = {
    "Acos Acosh Asin Asinh Atan Atanh BitwiseNot Ceil Cos Cosh Exp Floor": _ELEMENTWISE,
    "IsInf IsNaN Log Not Reciprocal Round Shrink Sign Sin Sinh Softsign Sqrt Tan Tanh": _ELEMENTWISE,
    "BitwiseAnd BitwiseOr BitwiseXor Equal Greater GreaterOrEqual Less LessOrEqual Mod": _OF_SEVERAL,
    "And": Operator("elementwise", EVERY, neutral=True),
    "Or Xor": Operator("elementwise", EVERY, neutral=False),
    "Celu Clip Elu Erf Gelu HardSigmoid HardSwish Mish Selu Sigmoid Softplus Swish ThresholdedRelu": _ACTIVATION,
    "LeakyRelu PRelu Relu": _RECTIFIER,
    "Abs": Operator("elementwise", scale="positive"),
    "Neg": Operator("elementwise", linear=True, scale="any"),
    "Cast": Operator("elementwise", linear=True, scale="any", shift=True),
    "Identity": _move("elementwise"),
    "Dropout": Operator("elementwise", linear=True, scale="any", shift=True, moves=True, random=True),
    "Add Sub": Operator("elementwise", EVERY, linear=True, scale="any", arithmetic=True, neutral=0),
    "Mul Div": Operator("elementwise", EVERY, arithmetic=True, neutral=1),
    "Pow": Operator("elementwise", EVERY, neutral=1),
    "Sum": Operator("elementwise", EVERY, linear=True, scale="any"),
    "Mean": Operator("elementwise", EVERY, linear=True, scale="any", shift=True),
    "Max Min": Operator("elementwise", EVERY, scale="positive", shift=True),
    "Where": Operator("elementwise", (1, 2), scale="any", shift=True),

    "Conv ConvTranspose": Operator("conv", linear=True),
    "Gemm": Operator("gemm", linear=True),
    "MatMul": Operator("matmul", linear=True),
    "Einsum": Operator("einsum"),
    "LSTM": Operator("recurrent", gates=4),
    "GRU": Operator("recurrent", gates=3),
    "RNN": Operator("recurrent", gates=1),
    "Attention": Operator("attention", (2,), scale="any"),
    "RotaryEmbedding": Operator("rotary"),

    "LayerNormalization": _NORM,
    "RMSNormalization SimplifiedLayerNormalization": Operator("norm", gamma=1),
    "BatchNormalization": Operator("batch_norm", linear=True, gamma=1, beta=True),
    "InstanceNormalization": Operator("instance_norm", gamma=1, beta=True),
    "GroupNormalization": Operator("group_norm", gamma=1, beta=True),
    "LpNormalization": Operator("lp_norm"),
    "LRN": Operator("lrn"),
    "Hardmax LogSoftmax Softmax": Operator("softmax"),

    "AveragePool GlobalAveragePool": Operator("pool", linear=True, scale="any", shift=True),
    "GlobalMaxPool MaxPool": Operator("pool", scale="positive", shift=True),
    "GlobalLpPool LpPool": Operator("pool", scale="positive"),
    "ReduceMean": Operator("reduce", linear=True, scale="any", shift=True),
    "ReduceMax ReduceMin": Operator("reduce", scale="positive", shift=True),
    "ReduceSum": Operator("reduce", linear=True, scale="any", sums=True),
    "ReduceL1 ReduceL2": Operator("reduce", scale="positive", sums=True),
    "ReduceSumSquare": Operator("reduce", sums=True),
    "ReduceLogSum ReduceLogSumExp ReduceProd": Operator("reduce"),
    "CumSum": Operator("along_axis", linear=True, scale="any"),
    "ArgMax ArgMin TopK": Operator("along_axis"),

    "Transpose": _move("transpose"),
    "Flatten Squeeze Unsqueeze": _move("reshape"),
    "Reshape": _move("reshape", sized=1),
    "Concat": _move("concat", EVERY),
    "Split": _move("split"),
    "Slice": _move("slice"),
    "Gather": _move("gather"),
    "Expand": _move("expand", sized=1),
    "Tile": _move("tile"),
    "Pad": _move("pad", (0, 2), shift=False),
    "DepthToSpace SpaceToDepth": Operator("depth_to_space", linear=True, scale="any", shift=True),
    "GatherElements GatherND": _move(""),
    "ScatterElements ScatterND": _move("", (0, 2)),
    "TensorScatter": _move("scatter", (0, 1)),
    "Resize": Operator("resize", linear=True, scale="any", shift=True, sized=3),
    "Upsample": Operator("resize", linear=True, scale="any", shift=True),
    "GridSample RoiAlign": Operator("sampled", linear=True, scale="any"),
    "MaxRoiPool": Operator("sampled", scale="positive"),

    "Shape": Operator("shape"),
    "Size": Operator("size"),
    "ConstantOfShape": Operator("constant_of_shape", sized=0),
    "DequantizeLinear QuantizeLinear": Operator("quantize"),
    "DynamicQuantizeLinear": Operator("dynamic_quantize"),
    "Bernoulli Multinomial RandomNormal RandomNormalLike RandomUniform RandomUniformLike": Operator(random=True),
}  # fmt: skip

_MICROSOFT = {
    "BiasGelu FastGelu": Operator("elementwise", EVERY, rectifies=True),  # the second input is a bias
    "Gelu QuickGelu": _ACTIVATION,
    "SkipLayerNormalization": Operator("norm", gamma=2, beta=True),  # what follows them is a bias in front of it
    "SkipSimplifiedLayerNormalization": Operator("norm", gamma=2),
    "EmbedLayerNormalization": Operator("embedding", gamma=5, beta=True),
    "GroupQueryAttention MultiHeadAttention": Operator("attention", (2,), scale="any"),
    "Attention": Operator("packed_attention"),
    "FusedConv": Operator("fused_conv"),  # with an activation, as the next one
    "FusedGemm": Operator("fused_gemm"),
    "FusedMatMul": Operator("fused_matmul"),
    "RotaryEmbedding": Operator("rotary"),
    "DequantizeLinear QuantizeLinear": Operator("quantize"),
}

OPERATORS = {
    (domain, op): row
    for domain, rows in (("", _STANDARD), ("com.microsoft", _MICROSOFT))
    for ops, row in rows.items()
    for op in ops.split()
}
_UNKNOWN = Operator()


def operator(node: gs.Node) -> Operator:
    """The row of the operator of a node; an empty row for an unknown operator, such as a function of the model."""
    return OPERATORS.get(("" if edit.is_standard(node) else node.domain, node.op), _UNKNOWN)
