"""The table of rules: what TensorRT and ONNX Runtime refuse, compute wrongly without a word, or run slowly.

Rules of TensorRT were tried with engines of tensorrt_rtx 1.7 whose plans were read back, those of ONNX Runtime with
version 1.32 on CPUs. A new rule is a row here, a function in ``find`` or ``structure``, and the smallest graph that
breaks the rule in the tests.
"""

from __future__ import annotations

from channelfold.runtime.lint import Rule, find, repair, structure, unfuse

BOTH = ("tensorrt", "onnxruntime")
ORT = ("onnxruntime",)
_FLOAT = "The node runs in float, without a word"
_REFUSED = "TensorRT refuses the file"

RULES: tuple[Rule, ...] = (
    # ---- both ----
    Rule(
        "initializer-input", "warning", "No initializer is an input of the graph.",
        "A caller may override every weight, so nothing can be folded, fused or quantized",
        "Make it a constant: keep_initializers_as_inputs=False in torch.onnx.export, or --fix",
        structure.initializers_as_inputs, BOTH, repair=repair.constants_of_defaults,
    ),
    Rule(
        "stale-shapes", "warning", "value_info agrees with the shapes of the inputs.",
        "Tools that trust the old shapes build a wrong graph, or refuse the file",
        "Remove value_info and infer it again: --fix writes a file without the old shapes",
        structure.stale_shapes, BOTH,
    ),
    Rule(
        "not-finite", "error", "Weights and biases are finite.",
        "The outputs are NaN or infinite", "Export the network again, from a sound checkpoint",
        structure.not_finite, BOTH,
    ),
    Rule(
        "mixed-types", "error", "All operands of a node have one floating point type.",
        "The file is refused", "Put a Cast in front of the odd operand", structure.mixed_types, BOTH,
    ),
    Rule(
        "scale-not-positive", "error", "Scales are finite and above zero.",
        "TensorRT refuses the file; ONNX Runtime computes NaN or zeros",
        "Give dead channels a small positive scale, and codes of 0",
        find.scales_not_positive, BOTH, repair=repair.dead_channels,
    ),
    # ---- TensorRT: operators ----
    Rule(
        "operator-on-codes", "error", "No operator computes on codes, as QLinearConv does.",
        _REFUSED, "Write it as the float operator between DequantizeLinear and QuantizeLinear",
        unfuse.fused, repair=unfuse.unfuse,
    ),
    Rule(
        "operator", "error", "No operator of ONNX Runtime alone, and no products of integers.",
        _REFUSED, "Export without the optimizations of ONNX Runtime; quantize statically, with QDQ nodes",
        structure.refused_operators,
    ),
    Rule(
        "attention-cache", "error", "Attention has one output, and not the keys and values of a cache.",
        _REFUSED, "Build the cache with Concat or TensorScatter in front of Attention", structure.caching_attention,
    ),
    Rule(
        "conv-transpose-bf16", "error", "ConvTranspose does not compute in bfloat16.",
        _REFUSED, "Cast around it, or convert the model to float16",
        structure.of_operator("ConvTranspose", kind="bfloat16"),
    ),
    Rule(
        "conv-transpose-int8", "warning", "ConvTranspose is not quantized.",
        f"{_FLOAT}; its quantizers cost time", "Leave it in float: --exclude-op ConvTranspose",
        structure.of_operator("ConvTranspose", quantized_alone=True),
    ),
    Rule(
        "squeeze-axes", "warning", "A Squeeze names its axes where sizes are open.",
        _REFUSED, "Give the axes; channelfold build does, where they are the same for all shapes", structure.squeezes,
    ),
    Rule(
        "open-sizes", "note", "Inputs with open sizes need an optimization profile.",
        "TensorRT refuses them without one", "Build with --shape NAME:MIN:OPT:MAX, or with --data",
        structure.open_sizes,
    ),
    Rule(
        "alike-sizes", "warning", "Open sizes that may differ have different names.",
        "TensorRT takes sizes of one name to be equal, and refuses a profile in which they differ",
        "Name the sizes apart in the export; channelfold build does, where their ranges differ", structure.alike_sizes,
    ),
    Rule(
        "opset", "warning", "The opset is one that TensorRT's parser knows: 9 to 25.",
        "The parser refuses it, or reads it by old rules and does not say so", "Export with opset 17 to 23",
        structure.opsets,
    ),
    # ---- TensorRT: codes, zero points, scales ----
    Rule(
        "uint8-activation", "error", "Activations are int8.",
        "TensorRT clamps uint8 to -128 … 127: half of the range is lost, with a warning at most",
        "Quantize symmetrically to int8: channelfold quantize --target tensorrt",
        find.unsigned_activations, repair=repair.symmetric_activations, late=True,
    ),
    Rule(
        "no-zero-point", "error", "A QuantizeLinear says its type by a zero point.",
        "Its type is uint8 then, and TensorRT clamps half of the range away", "Write a zero point: int8, 0",
        find.unwritten_zero_points, repair=repair.symmetric_activations, late=True,
    ),
    Rule(
        "zero-point", "error", "Zero points are constants of the value 0.",
        _REFUSED, "Quantize symmetrically", find.zero_points, repair=repair.symmetric_activations, late=True,
    ),
    Rule(
        "uint8-weight", "error", "Weights of 8 bits are int8.",
        _REFUSED, "Store the weight as int8 with the zero point 0",
        find.of_type("uint8", weights=True), repair=repair.signed_weights,
    ),
    Rule(
        "weight-rounded-on-call", "note", "Weights are stored as codes, and not as float behind a QuantizeLinear.",
        "The file is four times as large as it could be", "Store the codes", find.rounded_weights,
        BOTH, repair=repair.stored_codes,
    ),
    Rule(
        "type-of-codes", "error", "Codes are int8, int4, float8 E4M3 or float4 E2M1.",
        _REFUSED, "Quantize to one of these types",
        find.of_type("uint4", "int2", "uint2", "int16", "uint16", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz"),
    ),
    Rule(
        "int32-bias", "error", "Biases are float.", _REFUSED, "Store b = b_q s as float",
        find.integer_biases, repair=repair.float_biases,
    ),
    Rule(
        "scale-shape", "warning", "The scale of the activation of a Conv is a scalar.",
        _FLOAT, "Reshape the scale from [1] to a scalar", find.activation_scale_shapes, repair=repair.scalar_scales,
    ),
    Rule(
        "activation-by-channel", "warning", "Activations have one scale.",
        _FLOAT, "Quantize activations by tensor; level their channels with channelfold smooth",
        find.activation_scales_by_channel,
    ),
    Rule(
        "weight-axis", "warning", "The scales of a weight are along its output channels.",
        f"{_FLOAT}: the weight is only stored in 8 bits", "Quantize the weight by output channel", find.weight_axes,
    ),
    Rule(
        "scale-type", "warning", "Scales have the type in which the node computes.",
        "The weight is dequantized by a kernel of its own, or the file is refused",
        "Store the scales in the type of the data, without a Cast behind DequantizeLinear", find.scale_types,
    ),
    Rule(
        "output-type", "error", "A DequantizeLinear writes the type of its scale.",
        _REFUSED, "Store the scales in that type", find.output_types,
    ),
    Rule(
        "blocks-and-activation", "error", "A weight with scales by block has a float activation.",
        "TensorRT computes wrongly: every block gets the scales of the first, without a warning",
        "Leave the activation in float, or quantize the weight by output channel",
        find.blocks_with_quantized_activations,
    ),
    Rule(
        "one-block", "warning", "There are at least two blocks along the summed axis.",
        "The weight is dequantized in front of every product", "Take blocks of half the inputs or fewer",
        find.single_blocks,
    ),
    Rule(
        "int4-by-channel", "warning", "int4 weights with float activations have scales by block.",
        "The weight is dequantized in front of every product", "Quantize in blocks: --weights int4 --group 128",
        find.low_bits_without_blocks,
    ),
    Rule(
        "blocks-of-8-bits", "warning", "Weights of 8 bits with float activations have scales by channel.",
        "The weight is dequantized in front of every product", "Quantize by output channel", find.wide_blocks,
    ),
    Rule(
        "mixed-codes", "error", "Activation and weight are both int8 or both fp8.",
        _REFUSED, "Quantize both to one type", find.mixed_codes,
    ),
    Rule(
        "gather-of-codes", "error", "A table is dequantized before its rows are taken.",
        _REFUSED, "Put DequantizeLinear in front of the Gather: it stays small in memory", find.computed_codes,
    ),
    Rule(
        "narrow", "note", f"Quantized products have at least {find.NARROW} input and output channels.",
        "They run in float, or slower than in float", "Leave them in float: --exclude", find.narrow,
    ),
    Rule(
        "needless-quantizer", "warning", "A product reads what a pair of quantizers restores.",
        "The pair costs accuracy, and keeps a Conv and its BatchNormalization, activation or Add from being one kernel",
        "Remove the pair", find.needless, repair=repair.needless_pairs,
    ),
    # ---- TensorRT: GPUs ----
    Rule(
        "fp8-gpu", "error", "fp8 needs a GPU from SM 89 on.", _REFUSED, "Build for SM 89 or later, or take int8",
        find.of_type("float8_e4m3fn"), below=89,
    ),
    Rule(
        "fp4-gpu", "error", "fp4 needs a GPU from SM 100 on.", _REFUSED, "Build for SM 120, or take int4",
        find.of_type("float4_e2m1fn"), below=100,
    ),
    Rule(
        "int4-gpu", "error", "int4 needs a GPU from SM 80 on.", _REFUSED, "Take int8", find.of_type("int4"), below=80,
    ),
    Rule(
        "bf16-gpu", "error", "bfloat16 needs a GPU from SM 80 on.", _REFUSED, "Convert the model to float16",
        structure.in_type("bfloat16"), below=80,
    ),
    Rule(
        "float-product-gpu", "error", "MatMul and Gemm in float32 need a GPU from SM 80 on.",
        _REFUSED, "Convert the model to float16", structure.float_products, below=80,
    ),
    Rule(
        "float16-conv-gpu", "warning", "int8 Conv in a float16 graph needs a GPU from SM 80 on.",
        "The node runs in float16", "Leave the graph in float32", structure.half_convs, below=80,
    ),
    # ---- ONNX Runtime on CPUs ----
    Rule(
        "unknown-operator", "error", "ONNX, ONNX Runtime or the file itself defines every operator.",
        "ONNX Runtime refuses the file", "Register the library of the operator, or export without it",
        structure.unknown_operators, ORT,
    ),
    Rule(
        "transposed-codes", "error", "No Transpose reads int8 codes through DequantizeLinear from opset 21 on.",
        "ONNX Runtime 1.32 fails to load the file", "Transpose the codes, and dequantize behind",
        find.transposed_codes, ORT, repair=repair.transposed_codes,
    ),
    Rule(
        "int2-columns", "error", "The output channels of int2 weights are a multiple of 4.",
        "ONNX Runtime computes wrongly, without a warning", "Pad the output channels, or take int4",
        find.narrow_columns, ORT,
    ),
    Rule(
        "float16-bias", "error", "b / (s_x s_W) of a quantized node fits float16.",
        "ONNX Runtime turns the bias into int32 by way of float16, which overflows: the outputs collapse",
        "Store the bias as int32 behind DequantizeLinear, or convert the model to float32",
        find.overflowing_biases, ORT,
    ),
    Rule(
        "bf16", "error", "Products are not in bfloat16.", "ONNX Runtime has no such kernels on CPUs",
        "Convert the model to float32", structure.in_type("bfloat16", of_linears=True), ORT,
    ),
    Rule(
        "fp4", "error", "Codes are not fp4.", "ONNX Runtime has no such kernels on CPUs", "Take int4",
        find.of_type("float4_e2m1fn"), ORT,
    ),
    Rule(
        "saturation", "note", "Weights next to uint8 activations have 7 bits.",
        "x86 processors without VNNI add products in 16 bits, which saturate", "Quantize with --reduce-range on",
        find.saturating, ORT,
    ),
    Rule(
        "expanded-weight", "warning", "Low-bit weights are stored (in, out), with blocks along axis 0.",
        "The weight is dequantized on every call: slower than float", "channelfold quantize --target onnxruntime",
        find.expanded_on_every_call, ORT,
    ),
    Rule(
        "expanded-table", "warning", "Tables are not dequantized in front of Gather.",
        "The whole table is dequantized on every call", "channelfold quantize --target onnxruntime",
        find.expanded_tables, ORT,
    ),
    Rule(
        "rounded-on-call", "warning", "No QuantizeLinear rounds what a DequantizeLinear makes of a stored weight.",
        "ONNX Runtime rounds the weight again on every call", "Store the result", find.quantized_on_every_call, ORT,
    ),
    Rule(
        "group-index", "warning", "MatMulNBits has no g_idx.", "A naive kernel runs, 15 times as slow as float",
        "Permute the inputs with a Gather in front", structure.permuted_groups, ORT,
    ),
    Rule(
        "accuracy-level", "warning", "MatMulNBits of 2 and 8 bits has accuracy_level 4.",
        "A naive kernel runs, 20 times as slow as float", "Set accuracy_level to 4", structure.naive_kernels, ORT,
    ),
    Rule(
        "float-gemm", "warning", "No Add of a vector follows an int8 MatMul of matrices.",
        "ONNX Runtime makes one float Gemm of both before it looks for quantizers",
        "channelfold quantize --target onnxruntime", find.float_gemms, ORT,
    ),
    Rule(
        "int8-activation", "note", "Activations are uint8.",
        "ONNX Runtime fuses less around int8", "channelfold quantize --target onnxruntime",
        find.of_type("int8", op="QuantizeLinear", weights=False), ORT,
    ),
)  # fmt: skip
