"""What is known of operators."""

from __future__ import annotations

NORMS = (
    "LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization", "SkipLayerNormalization",
    "SkipSimplifiedLayerNormalization", "InstanceNormalization", "BatchNormalization", "GroupNormalization",
)  # fmt: skip


UNBIASED_NORMS = ("RMSNormalization", "SimplifiedLayerNormalization", "SkipSimplifiedLayerNormalization")


SKIP_NORMS = ("SkipLayerNormalization", "SkipSimplifiedLayerNormalization")


_OVER_AXIS_1 = ("InstanceNormalization", "BatchNormalization", "GroupNormalization")


ELEMENTWISE = {
    "Abs", "Acos", "Acosh", "Add", "And", "Asin", "Asinh", "Atan", "Atanh", "BitwiseAnd", "BitwiseNot", "BitwiseOr",
    "BitwiseXor", "Cast", "Ceil", "Celu", "Clip", "Cos", "Cosh", "Div", "Dropout", "Elu", "Equal", "Erf", "Exp",
    "Floor", "Gelu", "Greater", "GreaterOrEqual", "HardSigmoid", "HardSwish", "Identity", "IsInf", "IsNaN", "LeakyRelu",
    "Less", "LessOrEqual", "Log", "Max", "Mean", "Min", "Mish", "Mod", "Mul", "Neg", "Not", "Or", "PRelu", "Pow",
    "Reciprocal", "Relu", "Round", "Selu", "Shrink", "Sigmoid", "Sign", "Sin", "Sinh", "Softplus", "Softsign", "Sqrt",
    "Sub", "Sum", "Swish", "Tan", "Tanh", "ThresholdedRelu", "Where", "Xor",
}  # fmt: skip


VENDOR_ELEMENTWISE = {"BiasGelu", "FastGelu", "Gelu", "QuickGelu"}  # of com.microsoft; FastGelu and BiasGelu add a bias


LAST_AXIS_NORMS = ("LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization")


RECURRENT = {"LSTM": 4, "GRU": 3, "RNN": 1}


LINEAR_OPS = ("Conv", "ConvTranspose", "Gemm", "MatMul")


RESHAPES = ("Reshape", "Flatten", "Squeeze", "Unsqueeze")


REDUCTIONS = ("ReduceMean", "ReduceSum", "ReduceMax")


ATTENTIONS = ("Attention", "MultiHeadAttention", "GroupQueryAttention")


POOLS = ("MaxPool", "AveragePool", "GlobalMaxPool", "GlobalAveragePool")


ALONGSIDE = (  # what keeps every channel where it is
    *POOLS, "Identity", "Dropout", "Relu", "LeakyRelu", "PRelu", "Pad", "Neg", "Abs", "Cast", "Resize",
)  # fmt: skip
