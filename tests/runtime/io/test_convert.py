"""ModelProto to gs.Graph and back: what must survive, and where constants go."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.parser
import onnx_graphsurgeon as gs
import pytest
from onnx import TensorProto, helper, numpy_helper

from channelfold.runtime.errors import ModelError
from channelfold.runtime.io.convert import all_graphs, export, export_skeleton, import_model
from channelfold.runtime.io.files import check, infer_shapes, load, raise_opset, save, session
from channelfold.runtime.io.session import Session
from channelfold.runtime.io.weights import MappedValues, read

FLOAT = TensorProto.FLOAT


def _parse(text: str, *tensors: onnx.TensorProto, ir: int = 10, opset: int = 17) -> onnx.ModelProto:
    imports = f'"":{opset}, "com.microsoft":1, "local":1'
    model = onnx.parser.parse_model(f"<ir_version: {ir}, opset_import: [{imports}]> {text}")
    model.graph.initializer.extend(tensors)
    return model


def _weight(name: str, *shape: int, seed: int = 0) -> onnx.TensorProto:
    values = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    return numpy_helper.from_array(values, name)


def _copy(model: onnx.ModelProto) -> onnx.ModelProto:
    return onnx.ModelProto.FromString(model.SerializeToString())


def _back(model: onnx.ModelProto) -> onnx.ModelProto:
    out, large = export(import_model(_copy(model)))
    out.graph.initializer.extend(numpy_helper.from_array(values, proto.name) for proto, values in large)
    return out


def _outputs(model: onnx.ModelProto | gs.Graph, tmp_path, **feed) -> list:
    path = tmp_path / "run.onnx"
    if isinstance(model, gs.Graph):
        save(model, path)
    else:
        path.write_bytes(model.SerializeToString())
    return list(Session(path).run(feed).values())


def _everything() -> onnx.ModelProto:
    """A model with a word in every place where ONNX has room for one, and every kind of attribute and type."""
    text = """
    g (float[N,2] x, float[2] scale)
        => (float[N,2] y, seq(float[N,2]) s, optional(float[N]) o, float[2] w)
    <float[2] w = {1, 2}, float[2] scale = {3, 4}, float zero_point = {0}, float hidden = {5}>
    {
        [first] a = local.twice(x)
        [second] b = Add(a, w)
        m = Mul(b, scale)
        s = SequenceConstruct(b, m)
        o = Optional<type: type_proto = optional(float[N])>()
        c = com.microsoft.Anything<none: ints = [], texts: strings = [], numbers: floats = [], l = [1, 2],
            t = float[2] {1.5, 2.5}, f = 0.1, i = 7, s = "text", fs = [0.1, 0.2], ss = ["a", "b"]>(b, "", w, "")
        y = Relu(m)
    }
    <opset_import: ["" : 17], domain: "local"> twice (p) => (q) { q = Add(p, p) }
    """
    model = _parse(text)
    model.producer_name, model.producer_version, model.domain, model.model_version = "maker", "1.2", "org.made", 3
    model.doc_string, model.graph.doc_string = "about the model", "about the graph"
    for holder in (model, model.graph, model.graph.node[0], model.graph.input[0], model.functions[0]):
        holder.metadata_props.add(key="k", value="v")
    node = model.graph.node[-2]
    node.doc_string, node.overload = "about a node", "variant"
    node.attribute.append(helper.make_attribute("bytes", b"\xff\xfe"))
    node.attribute.append(helper.make_attribute("mixed", [b"a", b"\xff"]))
    node.attribute.append(helper.make_attribute("tensors", [_weight("", 2), _weight("", 3)]))
    indices = numpy_helper.from_array(np.array([1, 4]), "i")
    node.attribute.append(helper.make_attribute("sparse", helper.make_sparse_tensor(_weight("v", 2), indices, [6])))
    node.attribute.append(helper.make_attribute("graphs", [helper.make_graph([], "empty", [], [])]))
    node.attribute[-1].doc_string = "about an attribute"
    model.graph.input[0].type.denotation = "IMAGE"
    model.graph.input[0].type.tensor_type.shape.dim[0].denotation = "DATA_BATCH"
    model.graph.value_info.append(helper.make_tensor_value_info("b", FLOAT, ["N", 2], "about a tensor"))
    info = helper.make_map_type_proto(TensorProto.STRING, helper.make_tensor_type_proto(FLOAT, ["N"]))
    model.graph.value_info.append(helper.make_value_info("c", info))
    annotation = model.graph.quantization_annotation.add(tensor_name="b")
    annotation.quant_parameter_tensor_names.add(key="SCALE_TENSOR", value="w")
    annotation.quant_parameter_tensor_names.add(key="ZERO_POINT_TENSOR", value="zero_point")
    model.training_info.add().algorithm.name = "none"
    return model


def test_everything_survives(canonical):
    model = _everything()
    out = _back(model)
    assert canonical(out) == canonical(model)
    assert "hidden" not in {tensor.name for tensor in out.graph.initializer}  # nobody reads it
    assert canonical(_back(out)) == canonical(model)


def test_what_gs_cannot_hold_does_not_show(canonical):
    graph = import_model(_everything())
    tensors = graph.tensors()
    assert [t.dtype for t in graph.outputs[1:3]] == [None, None]  # a sequence and an optional are no tensors
    assert tensors["b"].dtype == np.float32
    assert tensors["b"].shape == ["N", 2]
    (node,) = (node for node in graph.nodes if node.op == "Anything")
    assert node.attrs["none"] == node.attrs["texts"] == node.attrs["numbers"] == []
    assert not {"bytes", "mixed", "tensors", "sparse", "graphs"} & set(node.attrs)
    assert [t.name for t in node.inputs] == ["b", "", "w", ""]


ALL_TYPES = [
    n for n, v in TensorProto.DataType.items() if v not in (TensorProto.UNDEFINED, TensorProto.STRING)
]  # fmt: skip


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (5,), (3, 1001)], ids=str)
@pytest.mark.parametrize("kind", ALL_TYPES)
def test_every_type_survives_the_file(kind, shape, tmp_path):
    """Odd sizes, so that types below 8 bits end inside a byte; the large ones are mapped from the file."""
    data_type = TensorProto.DataType.Value(kind)
    dtype = helper.tensor_dtype_to_np_dtype(data_type)
    values = (np.arange(int(np.prod(shape))) % 3 - (1 if kind.startswith(("INT", "FLOAT", "B")) else 0)).reshape(shape)
    tensor = numpy_helper.from_array(
        np.abs(values).astype(dtype) if kind == "FLOAT8E8M0" else values.astype(dtype), "w"
    )
    assert tensor.data_type == data_type
    graph = helper.make_graph(
        [helper.make_node("Identity", ["w"], ["y"])],
        "g",
        [],
        [helper.make_tensor_value_info("y", data_type, shape)],
        [tensor],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 25)], ir_version=13)
    path = tmp_path / "m.onnx"
    path.write_bytes(model.SerializeToString())
    loaded = load(path)
    (constant,) = (t for t in loaded.tensors().values() if isinstance(t, gs.Constant))
    assert isinstance(constant._values, MappedValues) == (len(tensor.raw_data) >= 1024)
    assert (constant.dtype, tuple(constant.shape)) == (dtype, shape)
    assert read(constant).tobytes() == numpy_helper.to_array(tensor).tobytes()
    for external in (False, True):
        save(loaded, path, external=external)
        out = onnx.load(path)
        assert out.graph.initializer[0].raw_data == tensor.raw_data
        assert list(out.graph.initializer[0].dims) == list(shape)
        loaded = load(path)


def test_strings_survive():
    names = numpy_helper.from_array(np.array(["a", "", "ü"] * 600, object), "s")
    broken = TensorProto(name="b", data_type=TensorProto.STRING, dims=[2], string_data=[b"\xff", b"ok"])
    model = _parse("g () => (string[1800] y, string[2] z) { y = Identity(s) z = Identity(b) }", names, broken)
    out = _back(model)
    assert list(out.graph.initializer[0].string_data) == list(names.string_data)
    assert list(out.graph.initializer[1].string_data) == [b"\xff", b"ok"]


def test_initializers_that_are_inputs(tmp_path):
    """Up to IR version 3 they had to be listed, and are constants; from 4 on they are defaults for the caller."""
    text = "g (float[2] x, float[2] w) => (float[2] y) { y = Mul(x, w) }"
    w = numpy_helper.from_array(np.array([2, 3], np.float32), "w")
    x, other = np.ones(2, np.float32), np.array([5, 7], np.float32)
    for size in (2, 2000):  # small, and mapped
        w = numpy_helper.from_array(np.full(size, 2, np.float32), "w")
        x, other = np.ones(size, np.float32), np.full(size, 5, np.float32)
        path = tmp_path / "m.onnx"
        path.write_bytes(_parse(text.replace("[2]", f"[{size}]"), w, ir=3, opset=7).SerializeToString())
        graph = load(path)
        assert [t.name for t in graph.inputs] == ["x"]
        assert np.array_equal(_outputs(graph, tmp_path, x=x)[0], x * 2)
        path.write_bytes(_parse(text.replace("[2]", f"[{size}]"), w).SerializeToString())
        graph = load(path)
        assert [t.name for t in graph.inputs] == ["x", "w"]
        assert np.array_equal(_outputs(graph, tmp_path, x=x)[0], x * 2)
        assert np.array_equal(_outputs(graph, tmp_path, x=x, w=other)[0], x * 5)
        graph.inputs.pop()
        graph.nodes[0].inputs[1] = gs.Constant("w", other)
        assert np.array_equal(_outputs(graph, tmp_path, x=x)[0], x * 5)


def test_outputs_without_a_node(tmp_path):
    model = _parse(
        "g (float[N] x) => (float[N] x, float[3] w, int64[2] c, float[500] big) { c = Constant<value_ints=[1, 2]>() }",
        _weight("w", 3), _weight("big", 500),
    )  # fmt: skip
    out = _back(model)
    assert [value.name for value in out.graph.output] == ["x", "w", "c", "big"]
    assert list(out.graph.output) == list(model.graph.output)
    feed = {"x": np.ones(2, np.float32)}
    for a, b in zip(_outputs(model, tmp_path, **feed), _outputs(out, tmp_path, **feed), strict=True):
        assert np.array_equal(a, b)


def test_node_names():
    model = _parse("g (float[2] x) => (float[2] y) { [n] a = Relu(x) [n] b = Neg(a) c = Abs(b) y = Exp(c) }")
    graph = import_model(_copy(model))
    assert [node.name for node in graph.nodes] == ["n", "n_1", "Abs_2", "Exp_3"]
    assert [node.name for node in export(graph)[0].graph.node] == ["n", "n_1", "Abs_2", "Exp_3"]


def test_names_that_are_made_up_meet_none_of_the_file(tmp_path):
    model = _parse(
        """g (bool c, float[2] x) => (float[2] y) {
            a = Relu(x)  [Relu_0] b = Neg(a)  [n] d = Abs(b)  [n_1] e = Exp(d)  [n] f = Neg(e)
            [n] y = If (c) <then_branch = p () => (float[2] k) { [n] k = Neg(f) },
                            else_branch = q () => (float[2] l) { [Neg_0] m = Abs(f) l = Neg(m) }> }"""
    )
    graph = import_model(_copy(model))
    names = [[node.name for node in part.nodes] for part in all_graphs(graph)]
    assert names == [["Relu_0_1", "Relu_0", "n", "n_1", "n_2", "n_3"], ["n"], ["Neg_0", "Neg_1"]]
    graph.nodes[1].name = graph.nodes[0].name  # as a pass may do
    written = export(graph)[0].graph.node
    assert len({node.name for node in written}) == len(written)
    feed = {"c": np.array(True), "x": np.ones(2, np.float32)}
    assert np.allclose(_outputs(graph, tmp_path, **feed)[0], [np.e, np.e], rtol=1e-6)


def test_constant_nodes_become_constants():
    graph = import_model(
        _parse(
            """g (float[2] x) => (float[2] y, string s, float[2] z)
            {
                a = Constant<value = float[2] {1, 2}>()   b = Constant<value_float = 2.0>()
                c = Constant<value_ints = [1, 2]>()       d = Constant<value_int = 3>()
                e = Constant<value_floats = [1.0]>()      s = Constant<value_string = "text">()
                y = Add(x, late)                          late = Constant<value_floats = [1.0, 2.0]>()
                z = Constant<sparse_value = sp>()         k = com.microsoft.Five(a, b, c, d, e)
            }""".replace("z = Constant<sparse_value = sp>()", "z = Neg(x)")
        )
    )
    assert [node.op for node in graph.nodes] == ["Add", "Neg", "Five"]
    values = {n: t._values for n, t in graph.tensors().items() if isinstance(t, gs.Constant)}
    assert {n: (v.dtype.name, v.shape, v.tolist()) for n, v in values.items()} == {
        "a": ("float32", (2,), [1, 2]), "b": ("float32", (), 2), "c": ("int64", (2,), [1, 2]), "d": ("int64", (), 3),
        "e": ("float32", (1,), [1]), "s": ("object", (), "text"), "late": ("float32", (2,), [1, 2]),
    }  # fmt: skip


def test_sparse_tensors(tmp_path, canonical):
    model = _parse("g (float[2,3] x) => (float[2,3] y, float[2,3] z) { a = Add(x, s) y = Add(a, t) z = Add(x, k) }")
    for name, indices in (("s", np.array([1, 5])), ("t", np.array([[0, 1], [1, 2]]))):
        values = numpy_helper.from_array(np.array([2.5, -1], np.float32), name)
        pair = helper.make_sparse_tensor(values, numpy_helper.from_array(indices, f"{name}_indices"), [2, 3])
        model.graph.sparse_initializer.append(pair)
    pair = helper.make_sparse_tensor(values, numpy_helper.from_array(indices), [2, 3])
    model.graph.node.insert(0, helper.make_node("Constant", [], ["k"], "k_node", sparse_value=pair))
    graph = import_model(_copy(model))
    dense = {n: read(t) for n, t in graph.tensors().items() if isinstance(t, gs.Constant)}
    expected = np.array([[0, 2.5, 0], [0, 0, -1]], np.float32)
    assert dense.keys() == {"s", "t"}  # a sparse Constant stays a node
    assert all(np.array_equal(values, expected) and values.dtype == np.float32 for values in dense.values())
    assert canonical(_back(model)) == canonical(model)
    x = np.ones((2, 3), np.float32)
    assert all(np.array_equal(a, b) for a, b in zip(*(_outputs(m, tmp_path, x=x) for m in (model, graph)), strict=True))


BRANCHES = """
g (bool c, float[300] x) => (float[300] y)
{
    t = Neg(x)
    b = If (c) <
        then_branch = then_graph () => (float[300] p)
            <float[300] own = {OWN}, float small = {2}>
            { u = Mul(t, own)  v = Mul(u, outer)  w = Mul(v, small)  q = Add(w, once)
              p = If (c) <then_branch = deep () => (float[300] e) { e = Add(q, outer) },
                          else_branch = other () => (float[300] f) { f = Sub(q, own) }> },
        else_branch = else_graph () => (float[300] r)
            <float[300] own = {OTHER}, float small = {3}>
            { m = Mul(t, own)  n = Mul(m, small)  r = Add(n, outer) }>
    y = Add(b, outer)
}"""


def _branches() -> onnx.ModelProto:
    rng = np.random.default_rng(0)
    numbers = (", ".join(map(str, rng.standard_normal(300).round(3))) for _ in range(2))
    text = BRANCHES.replace("OWN", next(numbers)).replace("OTHER", next(numbers))
    return _parse(text, _weight("outer", 300, seed=1), _weight("once", 300, seed=2))


def _graph_protos(graph: onnx.GraphProto) -> dict[str, onnx.GraphProto]:
    found = {graph.name: graph}
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                found |= _graph_protos(attribute.g)
    return found


def test_constants_of_subgraphs(tmp_path):
    """Large ones are written once, in the main graph, under a free name; small ones stay where they were."""
    model = _branches()
    path = tmp_path / "m.onnx"
    path.write_bytes(model.SerializeToString())
    graph = load(path)
    assert [part.name for part in all_graphs(graph)] == ["g", "then_graph", "deep", "other", "else_graph"]
    skeleton, large = export_skeleton(graph)
    assert sorted(proto.name for proto, _ in large) == ["once", "outer", "own_", "own__"]
    assert all(isinstance(constant._values, MappedValues) for _, constant in large)
    small = {name: [t.name for t in part.initializer] for name, part in _graph_protos(skeleton.graph).items()}
    assert small == {"g": [], "then_graph": ["small"], "deep": [], "other": [], "else_graph": ["small"]}
    x = np.linspace(-1, 1, 300, dtype=np.float32)
    for c in (True, False):
        feed = {"c": np.array(c), "x": x}
        expected = _outputs(model, tmp_path, **feed)[0]
        assert np.array_equal(_outputs(graph, tmp_path, **feed)[0], expected)
        assert np.array_equal(session(graph).run(feed)["y"], expected)
    for external in (False, True):
        save(graph, path, external=external)
        onnx.checker.check_model(path, full_check=True)
        assert path.stat().st_size < (2000 if external else 9000)
        graph = load(path)


def test_a_constant_that_a_subgraph_returns_stays_there(tmp_path):
    numbers = ", ".join(map(str, range(300)))
    model = _parse(
        """g (bool c, float[300] x) => (float[300] y) {
            b = If (c) <then_branch = p () => (float[300] k) <float[300] k = {NUMBERS}> { u = Neg(k) },
                        else_branch = q () => (float[300] k2) { k2 = Neg(x) }>
            y = Add(b, x) }""".replace("NUMBERS", numbers)
    )  # fmt: skip
    graph = import_model(_copy(model))
    assert export(graph)[1] == []
    feed = {"c": np.array(True), "x": np.ones(300, np.float32)}
    assert np.array_equal(_outputs(graph, tmp_path, **feed)[0], np.arange(300) + 1)


def test_shadowed_names(tmp_path, canonical):
    """The standard forbids them and runtimes disagree on them: they stay exactly as they are."""
    model = _parse(
        """g (bool c, float[2] x) => (float[2] y) <float[2] w = {1, 2}> {
            b = If (c) <then_branch = p () => (float[2] k) <float[2] w = {10, 20}> { k = Add(x, w) },
                        else_branch = q () => (float[2] l) { l = Sub(x, w) }>
            y = Add(b, w) }"""
    )
    assert canonical(_back(model)) == canonical(model)
    outer, inner = (part.tensors()["w"] for part in list(all_graphs(import_model(_copy(model))))[:2])
    assert (read(outer).tolist(), read(inner).tolist()) == ([1, 2], [10, 20])


def test_loops(tmp_path, canonical):
    model = _parse(
        """g (float[2] x) => (float[2] y, float[3,2] z) <int64 n = {3}, bool go = {1}, float[2] step = {1, 2}> {
            y, z = Loop (n, go, x) <body = body
                (int64 i, bool cond, float[2] state) => (bool out, float[2] next, float[2] trace)
                { out = Identity(cond)  next = Add(state, step)  trace = Mul(next, step) }> }"""
    )
    assert canonical(_back(model)) == canonical(model)
    x = np.ones(2, np.float32)
    assert np.array_equal(_outputs(import_model(model), tmp_path, x=x)[0], [4, 7])


def test_functions(tmp_path):
    text = """g (float[2] x) => (float[2] y) { a = local.twice(x) y = local.twice(a) }
    <opset_import: ["" : 17], domain: "local"> twice (p) => (q) { k = Constant<value_float = 2.0>() q = Mul(p, k) }"""
    graph = import_model(_parse(text))
    for same in (graph, raise_opset(graph, 21)):
        check(same)
        assert np.array_equal(_outputs(same, tmp_path, x=np.ones(2, np.float32))[0], [4, 4])


def test_edits_show():
    graph = import_model(_everything())
    tensors = graph.tensors()
    tensors["b"].name = "renamed"
    tensors["m"].shape = ["N", 3]
    graph.outputs[0].shape = ["M", 2]
    graph.inputs[0].dtype = np.dtype(np.float16)
    graph.nodes[2].domain = "com.new"
    out = export(graph)[0]
    assert [value.name for value in out.graph.value_info] == ["renamed", "c"]
    assert out.graph.value_info[0].doc_string == "about a tensor"
    assert out.graph.output[0].type.tensor_type.shape.dim[0].dim_param == "M"
    assert out.graph.input[0].type.tensor_type.elem_type == TensorProto.FLOAT16
    assert out.graph.input[0].metadata_props[0].value == "v"
    assert not out.graph.quantization_annotation  # its tensor is gone
    assert ("com.new", 1) in {(entry.domain, entry.version) for entry in out.opset_import}


def test_graphs_made_by_hand(tmp_path):
    """No carried extras, shared names, a type for a number, a function, a shape with -1."""
    x = gs.Variable("x", np.float32, (-1, 400))
    w, same = (gs.Constant("w", np.full((400,), value, np.float32)) for value in (2, 3))
    a, b, c = (gs.Variable(name) for name in "abc")
    y = gs.Variable("y", np.dtype(np.float16), ("N", 400))
    function = gs.Function("half", "made", inputs=[gs.Variable("p")], outputs=[gs.Variable("q")], opset=17)
    weight = gs.Constant("h", np.array(0.5, np.float32))
    function.nodes = [gs.Node("Mul", inputs=[function.inputs[0], weight], outputs=[function.outputs[0]])]
    nodes = [
        gs.Node("Mul", inputs=[x, w], outputs=[a]),
        gs.Node("Add", inputs=[a, same], outputs=[b]),
        gs.Node("half", domain="made", inputs=[b], outputs=[c]),
        gs.Node("Cast", attrs={"to": np.float16}, inputs=[c], outputs=[y]),
    ]
    graph = gs.Graph(nodes, [x], [y], opset=17, functions=[function])
    check(graph)
    feed = np.ones((2, 400), np.float32)
    for made in (graph, raise_opset(graph, 21)):
        (out,) = _outputs(made, tmp_path, x=feed)
        assert out.dtype == np.float16
        assert np.array_equal(out, np.full((2, 400), 2.5))
        assert np.array_equal(session(made).run({"x": feed})["y"], out)
    assert export(graph)[0].ir_version == 8  # what opset 17 needs, not the newest that onnx knows
    infer_shapes(graph)
    assert a.shape == [None, 400]
    assert [proto.name for proto, _ in export(graph)[1]] == ["w", "w_"]


def test_copies_that_gs_makes_lose_only_the_extras(tmp_path):
    graph = import_model(_branches())
    feed = {"c": np.array(True), "x": np.ones(300, np.float32)}
    assert np.array_equal(_outputs(graph.copy(), tmp_path, **feed)[0], _outputs(graph, tmp_path, **feed)[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.ClearField("graph"), "no graph"),
        (lambda m: m.ClearField("opset_import"), "no graph or no opset"),
        (lambda m: m.graph.initializer[0].dims.append(-2), "'w' are broken: its dims"),
        (lambda m: m.graph.initializer[0].dims.append(2), "'w' are broken"),
        (lambda m: m.graph.initializer[0].dims.extend([2**62, 2**62]), "'w' are broken"),
        (lambda m: setattr(m.graph.initializer[0], "data_type", 99), "'w' are broken"),
        (lambda m: setattr(m.graph.initializer[0], "data_type", 0), "'w' are broken"),
        (lambda m: setattr(m.graph.initializer[0], "raw_data", b"12345"), "'w' are broken"),
        (lambda m: setattr(m.graph.initializer[0], "data_location", 1), "cannot be found"),
        (lambda m: m.graph.initializer[0].segment.SetInParent(), "'w' are broken"),
        (lambda m: setattr(m.graph.input[0].type.tensor_type, "elem_type", 99), "cannot be understood"),
        (lambda m: setattr(m.graph.node[0].attribute.add(name="t", type=4).t, "data_type", 77), "are broken"),
    ],
)
def test_nonsense(change, message):
    model = _parse("g (float[2] x) => (float[2] y) { y = Add(x, w) }", _weight("w", 2))
    change(model)
    with pytest.raises(ModelError, match=message):
        import_model(model)


def test_an_attribute_that_was_empty_can_be_given_a_value():
    model = _parse("g (float[1,1,4,4] x, float[1,1,3,3] w) => (float[1,1,4,4] y) { y = Conv(x, w) }")
    model.graph.node[0].attribute.add(name="pads", type=onnx.AttributeProto.INTS)
    graph = import_model(model)
    assert export(graph)[0].graph.node[0].attribute == model.graph.node[0].attribute
    graph.nodes[0].attrs["pads"] = [1, 1, 1, 1]
    (pads,) = export(graph)[0].graph.node[0].attribute
    assert list(pads.ints) == [1, 1, 1, 1]
    check(graph)
