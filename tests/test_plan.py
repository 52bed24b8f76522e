"""The reader of optimized HLO counts small programs written by hand as one would; the command refuses in one line."""

import dataclasses
import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl

from benchmarks import job
from benchmarks.plan import __main__ as command
from benchmarks.plan import machine_code, parts, report, targets, traffic
from benchmarks.plan.compile import as_if_on, estimates
from benchmarks.plan.parts import Estimate, Work
from benchmarks.plan.program import Frame, Program, Shape
from harness.cli import run
from recipe.mesh import MeshShape
from recipe.presets import get_preset

ROOT = Path(__file__).resolve().parents[1]
TINY = get_preset("tiny").model
CUBLAS = (
    'custom_call_target="__cublas$gemm", backend_config={"gemm_backend_config":{"alpha_real":1,"beta":%s,'
    '"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"]}}}'
)


def module(entry: str, *others: str, head: str = "") -> Program:
    """A module with this ENTRY body and these other computations."""
    blocks = [*others, "ENTRY %main (x: f32[8]) -> f32[8] {\n" + entry + "\n}"]
    return Program("HloModule test, is_scheduled=true\n" + head + "\n" + "\n\n".join(blocks) + "\n")


def single(entry: str, *others: str):
    """The one launch of such a module."""
    (launch,) = module(entry, *others).launches
    return launch


def test_an_elementwise_instruction_reads_its_operands_and_writes_its_result():
    launch = single("  %x = f32[3,5]{1,0} parameter(0)\n  ROOT %y = bf16[3,5]{1,0} convert(%x)")
    assert (launch.times, launch.bytes, launch.flops) == (1, 15 * 4 + 15 * 2, 0)
    assert launch.shapes == (Shape("bf16", (3, 5)), Shape("f32", (3, 5)))


def test_what_costs_nothing_is_no_launch():
    entry = """
  %x = f32[8]{0} parameter(0)
  %c = f32[] constant(2)
  %t = (f32[8]{0}, f32[]) tuple(%x, %c)
  %y = f32[8]{0} get-tuple-element(%t), index=0
  ROOT %z = f32[2,4]{1,0} bitcast(%y)"""
    assert module(entry).launches == ()


def test_a_product_counts_two_for_every_multiply_add():
    launch = single("""
  %x = bf16[6,3,5]{2,1,0} parameter(0)
  %y = bf16[6,5,7]{2,1,0} parameter(1)
  ROOT %z = f32[6,3,7]{2,1,0} dot(%x, %y), lhs_batch_dims={0}, rhs_batch_dims={0}, lhs_contracting_dims={2}""")
    assert launch.flops == 2 * 6 * 3 * 5 * 7
    assert launch.products[0].dtypes == "bf16 x bf16 -> f32"
    assert launch.bytes == 2 * 6 * 15 + 2 * 6 * 35 + 4 * 6 * 21


@pytest.mark.parametrize(
    ("left", "right", "result", "how", "depth"),
    [
        ("8,5", "5,7", "8,7", "dim_labels=bf_io->bf", 5),
        ("3,6,5", "3,5,7", "3,6,7", "window={size=3 stride=2 lhs_dilate=3}, dim_labels=0bf_0io->0bf", 5),
        ("2,6,5", "2,5,7", "2,6,7", "window={size=2 lhs_dilate=2}, dim_labels=0bf_0io->0bf", 5),
        ("4,6,5", "4,7,5", "4,6,7", "window={size=4 stride=4 pad=3_3 lhs_dilate=3 rhs_reversal=1}, "
         "dim_labels=0bf_0oi->0bf", 5),
        ("4,6,5", "4,5,7", "6,7,1", "window={size=4}, dim_labels=0bf_0io->bf0", 4 * 5),
        ("3,4,1,5", "1,6,2,5", "3,4,6,2", "window={size=1x6 pad=0_0x5_5 rhs_reversal=0x1}, "
         "dim_labels=0b1f_01oi->0b1f", 5),
    ],
    ids=["plain", "a batch", "a batch of two", "a batch, reversed", "summed over two axes", "two axes of results"],
)  # fmt: skip
def test_a_convolution_counts_the_product_that_it_was_made_of(left, right, result, how, depth):
    launch = single(
        f"  %x = bf16[{left}] parameter(0)\n  %y = bf16[{right}] parameter(1)\n"
        f"  ROOT %z = f32[{result}] convolution(%x, %y), {how}"
    )
    assert launch.flops == 2 * launch.products[0].result.elements * depth


def test_a_cublas_call_reads_the_sum_it_adds_to_and_its_workspace_is_no_data():
    inputs = "  %x = bf16[3,5]{1,0} parameter(0)\n  %y = bf16[5,7]{1,0} parameter(1)\n"
    plain = single(f"{inputs}  ROOT %z = (f32[3,7]{{1,0}}, s8[33554432]{{0}}) custom-call(%x, %y), {CUBLAS % 0}")
    assert (plain.flops, plain.bytes) == (2 * 3 * 5 * 7, 2 * 15 + 2 * 35 + 4 * 21)
    added = single(
        f"{inputs}  %c = f32[3,7]{{1,0}} parameter(2)\n"
        f"  ROOT %z = (f32[3,7]{{1,0}}, s8[4194304]{{0}}) custom-call(%x, %y, %c), {CUBLAS % 1}"
    )
    assert added.bytes == plain.bytes + 4 * 21


FUSED = "  %i = s32[] parameter(1)\n  %x = f32[8,16]{1,0} parameter(0)\n"


def test_a_fusion_reads_a_slice_as_the_slice():
    fused = """%fused (p: f32[8,16], i: s32[]) -> f32[1,16] {
  %p = f32[8,16]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %b = f32[8,16]{1,0} bitcast(%p)
  %s = f32[1,16]{1,0} dynamic-slice(%b, %i, %i), dynamic_slice_sizes={1,16}
  ROOT %m = f32[1,16]{1,0} multiply(%s, %s)
}"""
    launch = single(FUSED + "  ROOT %y = f32[1,16]{1,0} fusion(%x, %i), kind=kLoop, calls=%fused", fused)
    assert launch.bytes == 64 + 4 + 64
    whole = fused.replace("multiply(%s, %s)", "reduce(%p, %s)")
    launch = single(FUSED + "  ROOT %y = f32[1,16]{1,0} fusion(%x, %i), kind=kLoop, calls=%fused", whole)
    assert launch.bytes == 8 * 64 + 4 + 64, "read as a whole too"


def test_a_fusion_that_updates_in_place_writes_the_update_and_reads_nothing_of_the_rest():
    fused = """%fused (p: f32[8,16], i: s32[], u: f32[1,16]) -> (f32[8,16], f32[1,16]) {
  %p = f32[8,16]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %u = f32[1,16]{1,0} parameter(2)
  %d = f32[8,16]{1,0} dynamic-update-slice(%p, %u, %i, %i)
  %n = f32[1,16]{1,0} negate(%u)
  ROOT %t = (f32[8,16]{1,0}, f32[1,16]{1,0}) tuple(%d, %n)
}"""
    entry = FUSED + "  %u = f32[1,16]{1,0} parameter(2)\n"
    entry += "  ROOT %y = (f32[8,16]{1,0}, f32[1,16]{1,0}) fusion(%x, %i, %u), kind=kLoop, calls=%fused"
    assert single(entry, fused).bytes == 4 + 64 + 64 + 64


def test_a_scatter_writes_its_updates():
    launch = single("""
  %x = f32[100,16]{1,0} parameter(0)
  %i = s32[3]{0} parameter(1)
  %u = f32[3,16]{1,0} parameter(2)
  ROOT %y = f32[100,16]{1,0} scatter(%x, %i, %u), to_apply=%add""")
    assert launch.bytes == 2 * 3 * 64 + 12


def test_products_and_random_words_inside_a_fusion_are_counted():
    shifts = "\n".join(f"  %s{n} = u32[40]{{0}} shift-left(%r, %r)" for n in range(20))
    fused = f"""%fused (p: bf16[3,5]) -> f32[3,3] {{
  %p = bf16[3,5]{{1,0}} parameter(0)
  %r = u32[40]{{0}} iota(), iota_dimension=0
{shifts}
  ROOT %d = f32[3,3]{{1,0}} dot(%p, %p), lhs_contracting_dims={{1}}, rhs_contracting_dims={{1}}
}}"""
    entry = "  %x = bf16[3,5]{1,0} parameter(0)\n  ROOT %y = f32[3,3]{1,0} fusion(%x), kind=kOutput, calls=%fused"
    launch = single(entry, fused)
    assert (launch.flops, launch.words) == (2 * 3 * 5 * 3, 40)


def loop(trips: int, inner: str) -> str:
    known = f', backend_config={{"known_trip_count":{{"n":"{trips}"}}}}' if trips else ""
    return f"  %w = (s32[], f32[8]{{0}}) while(%t), condition=%cond, body=%{inner}{known}"


BODY = """%{name} (t: (s32[], f32[8])) -> (s32[], f32[8]) {{
  %t = (s32[], f32[8]{{0}}) parameter(0)
  %x = f32[8]{{0}} get-tuple-element(%t), index=1
{extra}
  %y = f32[8]{{0}} negate(%x)
  ROOT %r = (s32[], f32[8]{{0}}) tuple(%x, %y)
}}"""


def test_a_loop_counts_as_often_as_it_runs():
    inner, outer = BODY.format(name="inner", extra=""), BODY.format(name="outer", extra=loop(5, "inner"))
    program = module("  %t = (s32[], f32[8]{0}) parameter(0)\n" + loop(4, "outer"), inner, outer)
    assert sorted((launch.times, len(launch.loops)) for launch in program.launches) == [(4, 1), (20, 2)]
    assert [(found.trips, found.starts) for found in program.loops] == [(4, 1), (5, 4)]
    assert program.loops[0].carried == (Shape("s32", ()), Shape("f32", (8,)))
    alone = "  %t = (s32[], f32[8]{0}) parameter(0)\n" + loop(0, "inner")
    unknown = module(alone, inner)
    assert (unknown.loops[0].trips, unknown.launches[0].times) == (0, 1)
    condition = """%cond (t: (s32[], f32[8])) -> pred[] {
  %n = s32[] constant(7)
  %t = (s32[], f32[8]{0}) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}"""
    assert module(alone, inner, condition).launches[0].times == 7
    assert module(alone, inner, condition.replace("LT", "NE")).launches[0].times == 1


def test_of_a_branch_the_costlier_way_counts():
    ways = [f"%{name} (x: f32[{n}]) -> f32[{n}] {{\n  %x = f32[{n}]{{0}} parameter(0)\n"
            f"  ROOT %y = f32[{n}]{{0}} negate(%x)\n}}" for name, n in (("small", 2), ("large", 9))]  # fmt: skip
    entry = "  %p = pred[] parameter(0)\n  ROOT %c = f32[] conditional(%p, %p, %p), "
    for written in ("branch_computations={%small, %large}", "true_computation=%large, false_computation=%small"):
        program = module(entry + written, *ways)
        assert [launch.bytes for launch in program.launches] == [72] and program.branches == ["c"]


@pytest.mark.parametrize(
    ("line", "kind", "payload"),
    [
        ("%y = f32[8]{0} all-reduce(%x), to_apply=%add", "all-reduce", 32),
        ("%y = f32[8]{0} all-reduce-start(%x), to_apply=%add", "all-reduce", 32),
        ("%y = (f32[8]{0}, f32[32]{0}) all-gather-start(%x), dimensions={0}", "all-gather", 128),
        ("%y = f32[2]{0} reduce-scatter(%x), dimensions={0}, to_apply=%add", "reduce-scatter", 32),
        ("%y = (f32[8]{0}, f32[8]{0}, u32[], u32[]) collective-permute-start(%x)", "collective-permute", 32),
    ],
)
def test_a_collective_sends_the_larger_of_what_goes_in_and_out(line, kind, payload):
    finish = "\n  ROOT %z = f32[8]{0} all-reduce-done(%y)"
    (launch,) = module("  %x = f32[8]{0} parameter(0)\n  " + line + finish).launches
    assert (launch.collective, launch.payload, parts.part(launch, TINY)) == (kind, payload, parts.COLLECTIVES)


@pytest.mark.parametrize(
    ("written", "groups"),
    [
        ("{{0,1},{2,3}}", ((0, 1), (2, 3))),
        ("[2,3]<=[6]", ((0, 1, 2), (3, 4, 5))),
        ("[3,2]<=[2,3]T(1,0)", ((0, 3), (1, 4), (2, 5))),
        ("[2,4]<=[2,2,2]T(1,0,2)", ((0, 1, 4, 5), (2, 3, 6, 7))),
        ("{}", ()),
    ],
)
def test_the_groups_of_a_collective_are_read(written, groups):
    x = "  %x = f32[8]{0} parameter(0)\n"
    line = f"{x}  ROOT %y = f32[8]{{0}} all-reduce(%x), replica_groups={written}, to_apply=%add"
    (launch,) = module(line).launches
    ways = len(groups[0]) if groups else 0
    assert launch.groups == groups
    assert launch.sent == (2 * 32 * (ways - 1) // ways if ways else 64)


def test_groups_are_named_by_the_axes_along_which_devices_differ():
    shape = MeshShape(2, 2, 2)
    expected = {"tensor": ((0, 1), (2, 3), (4, 5), (6, 7)), "fsdp": ((0, 2), (1, 3), (4, 6), (5, 7)),
                "data+fsdp": ((0, 2, 4, 6), (1, 3, 5, 7)), "data+fsdp+tensor": (tuple(range(8)),)}  # fmt: skip
    for axes, groups in expected.items():
        assert traffic.axes_of(shape, groups) == axes
        assert traffic.axes_of(shape, groups[::-1]) == axes
    assert traffic.axes_of(shape, ((0, 3), (1, 2), (4, 5), (6, 7))) == traffic.axes_of(shape, ()) == "?"
    assert traffic.axes_of(MeshShape(fsdp=4), (tuple(range(4)),)) == "fsdp", "an axis of one device joins nothing"


@pytest.mark.parametrize(
    ("said", "overlaps"),
    [
        ('all-gather-start(%x), backend_config={"is_sync":false}', True),
        ('all-gather-start(%x), backend_config={"is_sync":true}', False),
        ("all-gather-start(%x)", True),
        ("all-gather(%x)", None),
    ],
)
def test_a_collective_overlaps_if_xla_has_scheduled_it_so(said, overlaps):
    (launch,) = module(f"  %x = f32[8]{{0}} parameter(0)\n  %y = (f32[8]{{0}}, f32[32]{{0}}) {said}").launches
    assert launch.overlaps is overlaps


def test_links_are_as_fast_as_the_group_allows():
    h100, v5e, v5p = (targets.get_target(name) for name in ("h100", "v5e", "v5p"))
    links, network = h100.rates.links, h100.rates.network
    assert h100.link_rate(8, range(8)) == links
    assert h100.link_rate(16, range(16)) == min(links, 8 * network)
    assert h100.link_rate(16, (3, 11)) == network, "one of each host"
    assert h100.link_rate(16, (2, 3, 10, 11)) == 2 * network
    assert v5e.link_rate(256, range(256)) == v5e.rates.links
    assert v5e.link_rate(256, range(16)) == v5e.rates.links / 2, "one of two dimensions"
    assert v5e.link_rate(64, range(64)) == v5e.rates.links / 2, "eight are no ring"
    assert v5p.link_rate(64, range(4)) == v5p.rates.links / 3


@pytest.mark.parametrize(
    ("frames", "expected"),
    [
        (["sharded._fused", "transforms.scale_by_muon"], "muon"),
        (["exchange._all_gather", "exchange.in_use", "train.mean_gradient"], "weights"),
        (["exchange.reduced", "train.mean_gradient"], "gradients"),
        (["exchange._gathered_backward", "exchange.AtRest.__getitem__"], "gradients"),
        (["exchange.norm.<locals>.squares"], traffic.NUMBERS),
        (["exchange.total", "loss.peak_and_total"], "activations"),
        (["exchange.total", "exchange.whole_product", "model.Linear.multiply"], "activations"),
        ([], traffic.UNKNOWN),
        (["random.key"], traffic.UNKNOWN),
    ],
)
def test_a_collective_is_for_what_its_frames_say(frames, expected):
    (launch,) = module("  %x = f32[8]{0} parameter(0)\n  ROOT %y = f32[8]{0} all-reduce(%x), to_apply=%add").launches
    known = tuple(Frame(*frame.split(".", 1)) for frame in frames)
    assert traffic.purpose(dataclasses.replace(launch, frames=known)) == expected
    few = dataclasses.replace(launch, frames=(), payload=8)
    assert traffic.purpose(few) == traffic.NUMBERS, "XLA merges the two and loses their lines"


def test_what_is_scattered_by_layer_are_gradients():
    line = "  %x = f32[8]{0} parameter(0)\n  ROOT %y = f32[2]{0} reduce-scatter(%x), dimensions={0}, to_apply=%add"
    (launch,) = module(line).launches
    known = (Frame("exchange", "_gathered"), Frame("exchange", "AtRest.__getitem__"))
    assert traffic.purpose(dataclasses.replace(launch, frames=known)) == "gradients"


def test_what_was_compiled_stands_beside_what_was_expected():
    found = [{"part": "weights", "kind": "all-gather", "axes": "fsdp", "launches": 1, "in_loops": 0, "overlap": 1,
              "sent": 3e6, "seconds": 0.002}]  # fmt: skip
    paper = [{"part": "weights", "kind": "all-gather", "axes": "fsdp", "arrays": 9, "sent": 4e6}]
    text = "\n".join(traffic.markdown(found, paper))
    assert "| all-gather over fsdp | 1 | 0 | 1 | 3.00 | 9 | 4.00 | 0.7500 | 2.00 |" in text
    assert "| weights | 1 | 0 | 1 | 3.00 | 9 | 4.00 | 0.7500 | 2.00 |" in text
    assert "| 3.00 | – | – | – | 2.00 |" in "\n".join(traffic.markdown(found, []))


HEAD = """
FileNames
1 "/somewhere/jax_impl/model.py"
2 "/somewhere/jax_impl/loss.py"

FunctionNames
1 "Qwen3ForCausalLM.loss"
2 "_chunks"

FileLocations
1 {file_name_id=1 function_name_id=1 line=3 end_line=3 column=1 end_column=2}
2 {file_name_id=2 function_name_id=2 line=9 end_line=9 column=1 end_column=2}

StackFrames
1 {file_location_id=1%s}
2 {file_location_id=2 parent_frame_id=%d}
"""


@pytest.mark.parametrize("head", [HEAD % (" parent_frame_id=1", 2), HEAD % ("", 1)], ids=["jaxlib 0.10", "plain"])
def test_a_launch_knows_the_source_that_made_it(head):
    entry = (
        '  %x = f32[8]{0} parameter(0)\n  ROOT %y = f32[8]{0} negate(%x), metadata={op_name="a/neg" stack_frame_id=2}'
    )
    (launch,) = module(entry, head=head).launches
    assert launch.frames == (Frame("loss", "_chunks"), Frame("model", "Qwen3ForCausalLM.loss"))
    assert parts.part(launch, TINY) == parts.HEAD


def test_a_text_without_an_entry_is_refused():
    with pytest.raises(ValueError, match="no ENTRY"):
        Program("HloModule nothing\n")


@pytest.mark.parametrize(
    ("frames", "expected"),
    [
        (["newton_schulz.orthogonalize_via_newton_schulz", "batches.orthogonalize"], parts.NEWTON_SCHULZ),
        (["batches._in_batches", "transforms.scale_by_muon.<locals>.update_fn"], parts.NEWTON_SCHULZ),
        (["products.product", "model.Linear.multiply", "model.Qwen3MLP.__call__"], parts.LINEAR),
        (["products.product", "attention.attend_block"], parts.ATTENTION),
        (["random.drop", "random.dropout", "model.Qwen3MLP.__call__"], "SwiGLU"),
        (["random.drop", "train.make_train_step.<locals>.train_step"], "dropout"),
        (["flash.forward", "model.Qwen3Attention.__call__"], parts.ATTENTION),
        (["_tree_math.tree_sum", "hybrid.clip_by_global_norm"], parts.OPTIMIZER),
        (["train.make_train_step.<locals>.train_step.<locals>.add_gradient"], parts.SUMS),
        ([], parts.OPTIMIZER),
    ],
)
def test_the_innermost_known_frame_names_the_part(frames, expected):
    launch = single("  %x = f32[8]{0} parameter(0)\n  ROOT %y = f32[8]{0} negate(%x)")
    known = tuple(Frame(*frame.split(".", 1)) for frame in frames)
    assert parts.part(dataclasses.replace(launch, frames=known), TINY) == expected


def test_a_product_without_a_source_line_is_told_by_its_shape():
    V, D = TINY.vocab_size, TINY.hidden_size
    line = "  %x = bf16[9,A]{1,0} parameter(0)\n  ROOT %y = f32[A,B]{1,0} dot(%x, %z), lhs_contracting_dims={0}"
    line = "  %z = bf16[9,B]{1,0} parameter(1)\n" + line
    for rows, expected in ((V, parts.HEAD), (3 * D, parts.LINEAR)):
        launch = single(line.replace("A", str(rows)).replace("B", str(D)))
        assert parts.part(launch, TINY) == expected


PALLAS = (
    "  %x = bf16[3,5]{1,0} parameter(0)\n"
    '  ROOT %y = bf16[3,7]{1,0} custom-call(%x), custom_call_target="__gpu$xla.gpu.triton", metadata={op_name='
    '"jit(f)/my_path/pallas_call"}, backend_config={grid_x = 4 : i32, ir = "ML\\"R (", name = "my_kernel"}'
)


def test_a_kernel_written_by_hand_has_the_work_it_states(monkeypatch):
    launch = single(PALLAS)
    assert (launch.kernel, launch.bytes) == ("my_kernel", 30 + 42)
    opaque = PALLAS.replace("__gpu$xla.gpu.triton", "triton_kernel_call").replace(', name = "my_kernel"', "")
    assert single(opaque).kernel == "my_path"
    assert parts.work(launch, TINY) is None, "nobody states it"
    stated = {("my_kernel", ((3, 7),)): Estimate("my_kernel", ((3, 7),), 210.0, 72.0)}
    assert parts.work(launch, TINY, stated) == Work(210.0, "kernels")
    monkeypatch.setitem(parts.KERNELS, "my_k", lambda launch: Work(1.0, words=launch.bytes))
    assert parts.work(launch, TINY, stated) == Work(1.0, "products", 72), "a formula goes before an estimate"


def test_a_pallas_kernels_estimate_is_read_from_the_traced_program():
    shape = jax.ShapeDtypeStruct((4, 8), jnp.float32)
    cost = pl.CostEstimate(flops=12, bytes_accessed=34, transcendentals=5)

    def kernel(x_ref, y_ref):
        y_ref[...] = x_ref[...]

    def f(x):
        return jax.lax.map(pl.pallas_call(kernel, out_shape=shape, name="copy", cost_estimate=cost), x)

    traced = jax.make_jaxpr(jax.jit(f))(jax.ShapeDtypeStruct((3, 4, 8), jnp.float32))
    assert estimates(traced.jaxpr) == {("copy", ((4, 8),)): Estimate("copy", ((4, 8),), 12.0, 34.0, 5.0)}


def test_cudnns_attention_counts_the_visible_scores():
    call = (
        '  ROOT %y = (bf16[2,4,6,8]{3,2,1,0}, u8[0]{0}) custom-call(%x), custom_call_target="__cudnn$fmhaSoftmax", '
        'backend_config={"cudnn_fmha_backend_config":{"intermediate_tensor_shape":{"dimensions":["2","4","6","6"]},'
        '"sliding_window_length":WINDOW}}'
    )
    entry = "  %x = bf16[2,4,6,8]{3,2,1,0} parameter(0)\n" + call
    forward = parts.work(single(entry.replace("WINDOW", "0")), TINY)
    assert forward == Work(2 * 2 * 2 * 4 * 8 * (1 + 2 + 3 + 4 + 5 + 6), "attention_forward")
    windowed = parts.work(single(entry.replace("WINDOW", "2")), TINY)
    assert windowed.flops == 2 * 2 * 2 * 4 * 8 * (1 + 2 + 2 + 2 + 2 + 2)
    backward = parts.work(single(entry.replace("Softmax", "SoftmaxBackward").replace("WINDOW", "0")), TINY)
    assert backward == Work(2.5 * forward.flops, "attention_backward")


def test_the_paper_time_is_that_of_the_slowest_resource():
    config, rates = get_preset("tiny"), targets.H100.rates
    entry = "  %x = bf16[N,N]{1,0} parameter(0)\n  ROOT %z = DT[N,N]{1,0} dot(%x, %x), lhs_contracting_dims={1}"

    def seconds(n: int, entry=entry) -> float:
        (cost,) = parts.costs(module(entry.replace("N", str(n)).replace("DT", "bf16")), config, rates)
        return cost.seconds

    assert seconds(8) == rates.least
    assert seconds(8192) == 2 * 8192**3 / rates.products
    assert seconds(8192, entry.replace("%x = bf16", "%x = f32")) == 2 * 8192**3 / rates.wide_products
    assert seconds(128, entry.replace("N,N", "N,N,8192").replace("{1,0}", "{2,1,0}").replace("dot", "add")) == (
        3 * 2 * 128 * 128 * 8192 / rates.memory
    )
    # Sent twice: once to be summed, once to come back.
    reduce = "  %x = f32[N]{0} parameter(0)\n  ROOT %y = f32[N]{0} all-reduce(%x), to_apply=%add"
    assert seconds(2**28, reduce) == 2 * 2**30 / rates.links


PTXAS = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'my_kernel' for 'sm_90a'
ptxas info    : Function properties for my_kernel
    24 bytes stack frame, 16 bytes spill stores, 20 bytes spill loads
ptxas info    : Used 70 registers, used 1 barriers, 4096 bytes smem
ptxas info    : Compiling entry function 'other' for 'sm_90a'
ptxas info    : Function properties for other
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 8 registers, used 0 barriers
"""


def test_registers_spills_and_shared_memory_are_read_from_the_assembler(tmp_path, monkeypatch):
    assert machine_code.entries(PTXAS) == {
        "my_kernel": machine_code.Code(70, 36, 4096),
        "other": machine_code.Code(8, 0, 0),
    }
    assembler = tmp_path / "ptxas"
    assembler.write_text(f"#!/bin/sh\ncat >&2 <<'END'\n{PTXAS}END\n")
    assembler.chmod(0o755)
    monkeypatch.setattr(machine_code, "_assembler", lambda: str(assembler))
    (tmp_path / "module.ptx").write_text("//")
    (tmp_path / "module_empty.ptx").write_text("")
    (tmp_path / "module.thunk_sequence.txt").write_text(
        "002: kCustomKernel [prev=001 (1) | next=003 (1)] my_kernel grid: [4, 2, 1] threads: [128, 1, 1]  "
        "shared_memory: 32768 bytes\n"
    )
    found = machine_code.read(tmp_path)
    assert found["my_kernel"] == machine_code.Code(70, 36, 32768, (4, 2, 1), 128)
    assert found["other"] == machine_code.Code(8, 0, 0, (), 0)


def record(entry: str, preset: str = "tiny", code=None):
    """The plan of a hand-written module."""
    config, program = get_preset(preset), module(entry)
    made = report.summarise(
        program,
        parts.costs(program, config, targets.H100.rates),
        config,
        targets.H100,
        devices=1,
        memory=dict.fromkeys(("arguments", "results", "aliased", "temporaries", "program", "total"), 2**20),
        state_arrays=3,
        code=code or {},
    )
    how = {"command": "python -m benchmarks.plan", "git_commit": "abc", "versions": {"jax": "1"}, "options": {"a": "b"}}
    return json.loads(json.dumps({**how, "products_by": "cublas", **made}))


def test_a_plan_names_the_logits_and_the_hand_written_kernels():
    V, tokens = get_preset("tiny").model.vocab_size, 16 * 256
    held = f"  %x = f32[{tokens},{V}]{{1,0}} parameter(0)\n  ROOT %y = f32[{tokens},{V}]{{1,0}} negate(%x)"
    assert record(held)["logits"] == [f"f32[{tokens},{V}]"]
    assert record(held.replace(str(tokens), str(tokens - 1)))["logits"] == []
    code = {"my_kernel": machine_code.Code(70, 36, 32768, (4, 2, 1), 128)}
    plan = record(PALLAS, code=code)
    assert (plan["kernels"][0]["name"], plan["kernels"][0]["flops_known"]) == ("my_kernel", False)
    text = report.markdown(plan)
    assert "| my_kernel | 1 | unknown | 0.0 | 0.00 | 70 | 36 | 32768 | 4·2·1 x 128 |" in text
    assert "spilling: my_kernel 36 bytes" in text and "a=b" in text


def test_the_difference_of_two_plans_is_shown_by_part_and_in_total():
    small = record("  %x = f32[1048576]{0} parameter(0)\n  ROOT %y = f32[1048576]{0} negate(%x)")
    large = record("  %x = f32[2097152]{0} parameter(0)\n  ROOT %y = f32[2097152]{0} negate(%x)")
    text = report.difference(small, large)
    changed = "| 1 | 0.000 | 0.0 | 0.00 -> 0.01 (+0.00) |"
    assert f"| {parts.OPTIMIZER} {changed}" in text and f"| all {changed}" in text
    assert report.difference(small, small).count("->") == 0


def test_the_expected_flops_are_the_benchmarks():
    config = get_preset("seed")
    expected = report.expected_product_flops(config)
    total = sum(job.part_flops(config)[name] for name in ("attention",)) + expected["without attention"]
    assert total == job.flops_per_update(config)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target", "h200"], "--target h200 is unknown; choose from h100, v5e"),
        (["--mesh", "3"], "--mesh 3 is not a number of h100 devices; choose 1, 2, 4, 8"),
        (["--mesh", "rows=2"], "--mesh='rows=2' must be AXIS=DEVICES"),
        (["--mesh", "fsdp=16"], "batch_size=24 does not divide among the data * fsdp = 16 devices"),
        (["--option", "fast"], "--option fast is not NAME=VALUE"),
        (["--preset", "sed"], "did you mean seed"),
        (["--against", "README.md"], "README.md is not a plan"),
        (["--out", "README"], "README.md exists"),
    ],
)
def test_a_mistake_is_one_line(arguments, message, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["plan", *arguments])
    assert run(command.main) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1


def test_a_missing_package_is_one_line_that_says_what_to_install(monkeypatch, capsys):
    def version(name):
        if name == "jax":
            return "0.10.2"
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    for target, remedy in (("h100", "pip install -e '.[plan]'"), ("v5e", "pip install 'jax[tpu]'")):
        monkeypatch.setattr(sys, "argv", ["plan", "--target", target])
        assert run(command.main) == 2
        said = capsys.readouterr().err
        assert said.startswith(f"error: --target {target} needs ") and remedy in said and said.count("\n") == 1


def test_a_plugin_of_another_version_than_jax_is_refused(monkeypatch, capsys):
    versions = {"jax": "0.10.2", "jax-cuda13-plugin": "0.10.2", "jax-cuda13-pjrt": "0.11.0"}
    monkeypatch.setattr(importlib.metadata, "version", lambda name: versions.get(name, "13"))
    monkeypatch.setattr(sys, "argv", ["plan"])
    assert run(command.main) == 2
    said = capsys.readouterr().err
    assert "jax-cuda13-pjrt is 0.11.0 and jax is 0.10.2" in said
    assert "jax-cuda13-plugin==0.10.2 jax-cuda13-pjrt==0.10.2" in said and said.count("\n") == 1


def test_a_plan_wants_a_process_of_its_own():
    with pytest.raises(RuntimeError, match="process of its own"):
        command.prepare(targets.get_target("host"), 1)


def test_the_branches_taken_go_back_to_this_machines_even_after_an_error():
    own = jax.default_backend
    with pytest.raises(KeyError), as_if_on("gpu"):
        assert jax.default_backend() == "gpu"
        raise KeyError
    assert jax.default_backend is own


SMALL = {"model": {"num_hidden_layers": 1, "hidden_size": 32, "vocab_size": 128}}


def command_for_the_host(out: Path, *more: str) -> subprocess.CompletedProcess:
    """The command asked for a small plan for this machine's processor."""
    flags = [
        "--target",
        "host",
        "--preset",
        "tiny",
        "--batch_size",
        "2",
        "--sequence_length",
        "32",
        "--dtype",
        "float32",
    ]
    flags += ["--newton_schulz", "float32", "--overrides", json.dumps(SMALL), "--out", str(out), *more]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XLA_"))}
    words = [sys.executable, "-m", "benchmarks.plan", *flags]
    return subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def plan_of_the_host(out: Path, *more: str) -> dict:
    """Such a plan."""
    done = command_for_the_host(out, *more)
    assert done.returncode == 0, done.stderr
    (plan,) = json.loads(Path(f"{out}.json").read_text(encoding="utf-8"))
    assert Path(f"{out}.md").read_text(encoding="utf-8").strip() in done.stdout
    return plan


@pytest.mark.slow
def test_the_command_counts_this_machines_program_and_two_devices_share_its_batch(tmp_path):
    """Data parallel: each device holds the state, multiplies half of the rows and iterates on its share of matrices."""
    alone = plan_of_the_host(tmp_path / "alone")
    assert alone["product_flops"] == alone["product_flops_expected"]
    assert alone["aliased"] == alone["state_arrays"] > 20 and alone["collectives"] == {}
    assert alone["float32_operands"] == sum(alone["products"].values()) > 0
    two = plan_of_the_host(tmp_path / "two", "--mesh", "2", "--against", str(tmp_path / "alone.json"))
    assert two["aliased"] == two["state_arrays"] == alone["state_arrays"]
    assert two["product_flops"][parts.HEAD] == alone["product_flops"][parts.HEAD] / 2
    shares = [plan["product_flops"][parts.NEWTON_SCHULZ] for plan in (alone, two)]
    assert shares[0] <= 2 * shares[1] < 2 * shares[0], "and a matrix of zeros where they do not divide"
    assert two["collectives"]["all-reduce"]["bytes"] >= 4 * 32 * 128, "at least the head's gradient"
    sent, paper = (sum(one["sent"] for one in two[name]) for name in ("travels", "formula"))
    assert sent == paper > 0 and {one["axes"] for one in two["travels"]} == {"data"}
    assert "### against tiny, 1 x 2 x 32 tokens" in (tmp_path / "two.md").read_text(encoding="utf-8")


def test_an_option_that_xla_does_not_know_is_one_line(tmp_path):
    done = command_for_the_host(tmp_path / "plan", "--option", "xla_no_such=1")
    assert done.returncode == 2 and "--option xla_no_such is unknown to this XLA" in done.stderr
    assert not list(tmp_path.iterdir())
