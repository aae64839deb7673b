"""Kernels of engine/ compiled for GPUs, without one: what Triton's interpreter takes and the
compiler does not is seen here, and that products are those of tensor cores.
"""

import os
import subprocess
import sys

import pytest
from conftest import ROOT

COMPILE = """
import sys
from triton import compile as compile_kernel
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource
from engine import triton_hopper as h
from engine import triton_attention, triton_hopper_attention as ha, triton_kernels as k
from engine import triton_loss, triton_norm

WHOLE = "tokens num_rows num_inputs width half of_gate of_shift of_scale".split()
WHOLE += "by_group then_by_group by_row".split()
INT32 = "then_sum row_sum row_sum2 zero_point then_zero_point w_zero w_sum correction".split()

def check(name, kernel, capability, tile, lacks, types, instruction, constants,
          made_of=ASTSource, **options):
    *sizes, warps, stages = tile
    found, given = {}, {}
    for i, argument in enumerate(kernel.arg_names):
        if argument in constants or argument in lacks:
            found[argument], given[i,] = "constexpr", constants.get(argument)
        else:
            kind = "i32" if argument in WHOLE else "*i32" if argument in INT32 else "*fp32"
            found[argument] = types.get(argument, "*i64" if argument == "group" else kind)
    aligned = {(i,): [["tt.divisibility", 16]] for i, argument in enumerate(kernel.arg_names)
               if found[argument][0] == "*" or argument in ("num_inputs", "width")}
    source = made_of(kernel, found, given, aligned)
    options |= dict(num_warps=warps, num_stages=stages, enable_fp_fusion=False)
    made = compile_kernel(source, target=GPUTarget("cuda", capability, 32), options=options)
    word = "wgmma.mma_async" if capability == 90 else "mma.sync"
    ours = [x for x in made.asm["ptx"].splitlines() if word in x and instruction in x]
    there = bool(ours) or not instruction
    print("ok" if there and made.asm["cubin"] else f"{name} {capability}: missing")

last = ["then_scale", "then_scale2", "then_zero_point", "smooth"]
onto = ["inverse", "lowest", "highest"]
layers = {
    ("uniform", "bf16"): ["scale2", "row_sum2", *last, *onto],
    ("after GELU", "fp32"): ["zero_point", *last, *onto],
    ("in steps", "bf16"): ["scale2", "row_sum2", *last],
    ("before MRQ", "i8"): ["scale2", "row_sum2", "then_zero_point", *onto],
    ("before MRQ", "bf16"): ["scale2", "row_sum2", "then_zero_point", *onto],
    ("before folded MRQ", "i8"): ["scale2", "row_sum2", "then_scale2", "group", *onto],
}
losses = {"uniform": ["codes2", "scale2", "row_sum2"], "after GELU": ["zero_point"]}
widths = {72: (64, 16), 64: (64, 0), 8: (16, 0)}
of_norm = dict(codes="*i8", h="*bf16", gate="*bf16", shift="*bf16", scale="*bf16")
for capability in (80, 90):
    for (kind, out), lacks in layers.items():
        R, O, I, *_ = tile = k.TWO_SUMS if kind == "after GELU" else k.TILE
        types = dict(codes=f"i8[{R}, {I}]", weight=f"i8[{O}, {I}]", out=f"{out}[{R}, {O}]")
        types = {name: f"tensordesc<{part}>" for name, part in types.items()}
        blocks = dict(BLOCK_R=R, BLOCK_O=O, BLOCK_I=I)
        check(kind, k.linear_kernel, capability, tile, lacks, types, "s32.s8.s8", blocks)
        if capability == 90 and "scale2" in lacks:
            tile, bits = h.TILE, dict(codes=8, weight=8, out=int(out.lstrip("bfi")))
            blocks = dict(SLOTS=h.SLOTS, REGISTERS=h.REGISTERS, OF_LOADING=h.OF_LOADING)
            types = {name: f"{part[:-1]},{h.layout_of(O, bits[name])!r}>"
                     for name, part in types.items()}
            lacks = lacks if kind == "before folded MRQ" else [*lacks, "then_sum"]
            check(kind, h.linear_kernel, capability, (*tile, 4, 1), lacks, types, "s32.s8.s8",
                  blocks, GluonASTSource, maxnreg=h.MEAN)
    for kind, lacks in losses.items():
        R, O, I, *_ = tile = triton_loss.TWO_SUMS if kind == "after GELU" else triton_loss.TILE
        codes, weight = f"tensordesc<i8[{R}, {I}]>", f"tensordesc<i8[{O}, {I}]>"
        types = dict(codes=codes, codes2=codes, weight=weight)
        blocks = dict(BLOCK_R=R, BLOCK_O=O, BLOCK_I=I)
        check(kind, triton_loss.loss_kernel, capability, tile, lacks, types, "s32.s8.s8", blocks)
    for width, parts in widths.items():
        assert triton_attention.parts_of(256, width) == k.split(width) == parts
        for tokens in 256, 64:  # several tiles of keys, or one
            head, tail = triton_attention.parts_of(tokens, width)
            assert tokens == 256 or not tail
            sizes = dict(S=tokens, HEADS=16, WIDTH=width, HEAD=head, TAIL=tail)
            sizes |= dict(zip("MN", triton_attention.TILE))
            types = dict(out="*i8", qkv="*bf16", levels="fp32")
            check("attention", triton_attention.attention_kernel, capability,
                  triton_attention.TILE, [], types, "f32.bf16.bf16", sizes)
        for tokens in (128, 256) if capability == 90 else ():
            head, tail = k.split(width)
            types = {"of_q": (64, head), "of_q2": (64, tail), "of_kv": (tokens, head),
                     "of_kv2": (tokens, tail)}
            lacks = [name for name, (_, columns) in types.items() if not columns]
            types = {name: f"tensordesc<bf16[1, {rows}, {columns}],{ha.layout_of(columns)!r}>"
                     for name, (rows, columns) in types.items() if columns}
            types |= dict(out="*i8", levels="fp32")
            sizes = dict(S=tokens, HEADS=16, WIDTH=width, SLOTS=ha.SLOTS)
            check("attention on Hopper", ha.attention_kernel, capability, (4, 1), lacks, types,
                  "f32.bf16.bf16", sizes, GluonASTSource, maxnreg=255)
        head, tail = k.split(16 * width)
        sizes = dict(WIDTH=16 * width, HEAD=head, TAIL=tail)
        for lacks in ["h", "gate", "summed"], []:
            check("norm", triton_norm.norm_kernel, capability, (triton_norm.WARPS, 1), lacks,
                  of_norm, "", sizes)
"""


@pytest.mark.slow
def test_kernels_compile_to_int8_tensor_core_instructions(tmp_path):
    """Without a GPU: what the interpreter takes and the compiler does not would be seen here."""
    pytest.importorskip("triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= dict(PYTHONPATH=os.pathsep.join([str(ROOT), *sys.path]))
    environment |= dict(TRITON_CACHE_DIR=str(tmp_path / "cache"))
    (tmp_path / "script.py").write_text(COMPILE)
    command = [sys.executable, tmp_path / "script.py"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == ["ok"] * 51
