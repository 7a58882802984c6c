"""What random feeds of a model hold: what its graph says of its inputs, and the steps of rollouts of a decoder."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import onnx.parser
import pytest

from channelfold.passes.verify import Verifier, Violation
from channelfold.runtime.data.probes import PREFILL, STEPS, random_data, random_feeds, rolls
from channelfold.runtime.io.facts import required_inputs
from channelfold.runtime.io.files import import_model, session
from channelfold.runtime.io.meanings import cache_pairs
from channelfold.runtime.io.snapshot import Snapshot
from channelfold.tests.decoders import DECODER, decoder
from channelfold.tests.graphs import build


def graph_of(text: str):
    return import_model(onnx.parser.parse_model('<ir_version: 9, opset_import: ["": 23, "com.microsoft": 1]> ' + text))


def test_a_decoder_is_understood_by_its_graph():
    said = {spec.name: spec.meaning for spec in required_inputs(decoder())}
    assert {name: meaning.kind for name, meaning in said.items()} == {
        "tokens": "ids", "seen": "mask", "place": "position", "past": "past",
    }  # fmt: skip
    assert (said["tokens"].below, said["past"].present, said["past"].axis) == (50, "now", 2)


@pytest.mark.parametrize("size", [32, 8, 1])
def test_random_feeds_of_a_decoder_fit_together(size):
    graph = decoder()
    data = random_data(required_inputs(graph), 4, size=size)
    for feed in data:
        past, new = feed["past"].shape[2], feed["tokens"].shape[1]
        assert (past, new) == (size // 2, size - size // 2)
        assert feed["seen"].tolist() == [[1] * size]
        assert feed["place"].tolist() == [list(range(past, size))]
        session(graph).run(feed)
    assert max(feed["tokens"].max() for feed in random_data(required_inputs(graph), 8)) > 40


def test_a_rollout_feeds_the_cache_that_the_model_returned():
    graph = decoder()
    inputs, run = required_inputs(graph), session(graph).run
    feeds = list(random_data(inputs, 20, run=run))
    assert [feed["tokens"].shape[1] for feed in feeds[: 1 + STEPS]] == [PREFILL] + [1] * STEPS
    assert [feed["past"].shape[2] for feed in feeds[: 1 + STEPS]] == [0, *range(PREFILL, PREFILL + STEPS)]
    for feed, later in pairwise(feeds[: 1 + STEPS]):
        np.testing.assert_array_equal(run(feed)["now"], later["past"])
    assert feeds[1 + STEPS]["past"].shape[2] == 0  # the next rollout, of other tokens
    assert not np.array_equal(feeds[1 + STEPS]["tokens"], feeds[0]["tokens"])
    assert random_data(inputs, 20, run=run).description == "20 rollout steps (seed 0)"


def test_a_model_that_cannot_roll_out_gets_plain_feeds():
    graph = decoder(DECODER.replace("float[b,1,p,4] past", "float[b,1,5,4] past"))
    assert not rolls(required_inputs(graph))
    feed = next(random_feeds(required_inputs(graph), 0, run=session(graph).run))
    assert (feed["past"].shape[2], feed["seen"].shape[1]) == (5, 5 + feed["tokens"].shape[1])
    session(graph).run(feed)


def test_a_step_is_verified_on_a_rollout():
    before = Snapshot.of(decoder())
    assert Verifier().verify(before, Snapshot.of(decoder())).record["probes"] == 1 + STEPS
    longer = DECODER.replace("now = Concat<axis = 2>(past, k)", "double = Add(past, past) half = Mul(double, unit) "
                             "now = Concat<axis = 2>(half, k)")  # fmt: skip
    with pytest.raises(Violation, match=r"probe 2 of 9"):  # right for as long as the cache is empty
        Verifier().verify(before, Snapshot.of(decoder(longer)))


def test_ids_may_index_several_tables_and_masks_are_ones():
    graph = graph_of("""m (int64[b,s] ids, bool[b,s] attention_mask, float[b,s] x) => (float[b,s,2] y)
        <float[3,2] small = {0,0,0,0,0,0}, float[4,2] large = {0,0,0,0,0,0,0,0}>
        { a = Gather(small, ids) f = Reshape(ids, n) g = Gather(large, f) y = Add(a, a) }""")
    said = {spec.name: spec.meaning for spec in required_inputs(graph)}
    assert (said["ids"].kind, said["ids"].below, said["attention_mask"].kind, said["x"]) == ("ids", 3, "mask", None)


def test_grouped_query_attention_is_a_cache():
    graph = graph_of("""m (float[b,s,32] q, float[b,s,16] k, float[b,s,16] v, float[b,2,p,w] a, float[b,2,p,w] c,
        int32[b] lengths, int32 total) => (float[b,s,32] y, float[b,2,u,8] d, float[b,2,u,8] e)
        { y, d, e = com.microsoft.GroupQueryAttention<num_heads = 4, kv_num_heads = 2>
          (q, k, v, a, c, lengths, total) }""")
    said = {spec.name: spec.meaning for spec in required_inputs(graph)}
    assert [(said[name].present, said[name].axis) for name in "ac"] == [("d", 2), ("e", 2)]
    assert said["a"].width == 8  # the input leaves the size open, and the operator takes no other
    assert (said["lengths"].kind, said["total"].kind) == ("last_position", "total_length")
    feeds = list(random_data(required_inputs(graph), 3, run=session(graph).run))
    assert [(int(feed["lengths"][0]), int(feed["total"])) for feed in feeds] == [(15, 16), (16, 17), (17, 18)]


def test_the_attention_of_opset_23_and_a_scatter_are_caches():
    graph = graph_of("""m (float[b,2,s,4] q, float[b,2,s,4] k, float[b,2,s,4] v, float[b,2,p,4] a, float[b,2,p,4] c)
        => (float[b,2,s,4] y, float[b,2,u,4] d, float[b,2,u,4] e) { y, d, e = Attention(q, k, v, , a, c) }""")
    said = {spec.name: spec.meaning for spec in required_inputs(graph)}
    assert [(said[name].present, said[name].axis) for name in "ac"] == [("d", 2), ("e", 2)]
    graph = graph_of("""m (float[b,2,9,4] a, float[b,2,s,4] k, int64[b] at) => (float[b,2,9,4] d)
        { d = TensorScatter(a, k, at) }""")
    said = {spec.name: spec.meaning for spec in required_inputs(graph)}
    assert (said["a"].present, said["a"].axis, said["at"].kind) == ("d", None, "past_length")


def test_a_joined_feature_map_and_a_copied_input_are_no_caches():
    graph = graph_of("m (float[b,3,h,w] x, float[b] z) => (float[b,6,h,w] y, float[b] k) { r = Relu(x) k = Identity(z) "
                     "y = Concat<axis = 1>(x, r) }")  # fmt: skip
    assert [spec.meaning for spec in required_inputs(graph)] == [None, None]


MERGED = """m (float[b,s,2] x, float[b,p,2] past, float[b,e,2] past_encoder, float[b,e,2] states, bool[1] cached)
    => (float[b,t,2] present, float[b,f,2] present_encoder) {
        present, present_encoder = If (cached) <
            then_branch = g () => (float[b,t,2] present, float[o,f,2] present_encoder)
                <float[0,1,2] none = {}> { present = Concat<axis = 1>(past, x) present_encoder = Identity(none) },
            else_branch = h () => (float[b,t,2] present, float[b,f,2] present_encoder)
                { present = Identity(x) present_encoder = Identity(states) }> }"""


def test_a_merged_decoder_takes_both_branches():
    graph = graph_of(MERGED)
    feeds = list(random_data(required_inputs(graph), 1 + STEPS, run=session(graph).run))
    assert [bool(feed["cached"][0]) for feed in feeds] == [False] + [True] * STEPS
    assert [feed["past"].shape[1] for feed in feeds[1:]] == [*range(PREFILL, PREFILL + STEPS)]
    for feed in feeds[1:]:  # what the first step returned, because the later ones return nothing
        np.testing.assert_array_equal(feed["past_encoder"], feeds[0]["states"])


def test_a_cache_behind_a_concat_of_one_input_and_what_keeps_its_interface():
    """transformers joins an empty cache with the past first; scales and selections stand at the interface."""
    graph = build(
        "(float[B,P,4] past, float[B,Q,4] scaled, float[B,T,4] x) => (float[] present, float[] other)",
        """a = Concat<axis=1>(past) present = Concat<axis=1>(a, x)
        b = Mul(scaled, half) c = Gather<axis=2>(b, kept) d = Gather<axis=2>(x, kept) e = Concat<axis=1>(c, d)
        f = Mul(e, two) g = Pad(f, pads) other = Gather<axis=2>(g, places)""",
        kind="float", half=0.5, two=2.0, kept=np.array([0, 2]), pads=np.array([0, 0, 0, 0, 0, 1]),
        places=np.array([0, 2, 1, 2]),
    )  # fmt: skip
    assert cache_pairs(graph) == {"past": "present", "scaled": "other"}
    graph = build("(float[B,P,4] past, float[B,T,4] x) => (float[] y)", "z = Concat<axis=1>(past, x) y = Relu(z)",
                  kind="float")  # fmt: skip
    assert cache_pairs(graph) == {}
