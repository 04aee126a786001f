"""The plugin: its PTX for every architecture without a GPU, its kernel's numbers, and NVIDIA's own code around it."""
import json
import os
import subprocess
import sys

import pytest
import torch
from op_cases import Case, error, inputs
from trt_bindings import REGISTRY, VERSIONS, run_with

from mvam_fast import reference

pytest.importorskip("triton")
from mvam_fast.export import plugin  # noqa: E402
from mvam_fast.kernels import tiles  # noqa: E402
from mvam_fast.kernels.plugin_forward import multi_view_pool_plugin  # noqa: E402
from mvam_fast.kernels.plugin_ptx import (  # noqa: E402
    SHARED_LIMIT,
    Tactic,
    constants,
    plugin_ptx,
    tactics,
    without_debug,
    without_hidden_parameters,
)

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
HALF = ("float16", "bfloat16")
WIDTHS = (384, 512, 640, 768, 1024, 1152, 1280)
COMPILE = """
import json, sys, torch
from mvam_fast.kernels.plugin_ptx import Tactic, plugin_ptx, tactics
for line in sys.stdin:
    capability, dtype, views, length, width, tactic = json.loads(line)
    dtype = getattr(torch, dtype)
    tactic = tactics(dtype, views, width)[tactic] if isinstance(tactic, int) else Tactic(*tactic)
    try:
        found = plugin_ptx(capability, dtype, views, length, width, width**-0.5, tactic)._asdict()
    except ValueError as error:
        found = {"error": str(error)}
    print(json.dumps({**found, "tactic": tactic}), flush=True)
"""
# Capability, dtype, M, N, D, which tactic of the table (or one that is not in it).
EVERY_TACTIC = [
    (80, HALF[index % 2], 16, 197, width, index)
    for width in WIDTHS
    for index in range(len(tactics(torch.float16, 16, width)))
]
EVERY_KIND = [
    (86, "float16", 16, 50, 384, 1), (86, "bfloat16", 8, 197, 1280, 1),
    (89, "bfloat16", 16, 77, 512, 0), (89, "float16", 4, 197, 1024, 1),
    (90, "float16", 16, 197, 768, 0), (90, "bfloat16", 64, 577, 1152, 0),
    (100, "bfloat16", 16, 197, 640, 0), (100, "float16", 33, 257, 1280, 0),
    (120, "float16", 16, 197, 768, 1), (120, "bfloat16", 17, 729, 1152, 1),
    (90, "float16", 1, 5, 123, 0), (80, "float16", 3, 1, 2048, 0),
    (90, "float32", 16, 50, 384, 0), (90, "float32", 16, 50, 512, 0), (90, "float32", 16, 50, 768, 1),
    (90, "float32", 16, 50, 1152, 0),
]  # fmt: skip
TOO_LARGE = (80, "float16", 16, 197, 1280, (16, 8, 3, 2))
SPILLS = {("float32", 1152): 32}  # bytes per thread, where there are any


@pytest.fixture(scope="module")
def compiled():
    """Configuration → its Ptx, or an error: from one process, because this one may have chosen the interpreter."""
    configurations = [*EVERY_TACTIC, *EVERY_KIND, TOO_LARGE]
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], input="\n".join(map(json.dumps, configurations)), capture_output=True,
        text=True, env={**os.environ, "TRITON_INTERPRET": "0"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return dict(zip(configurations, map(json.loads, done.stdout.splitlines()), strict=True))


@pytest.mark.parametrize("configuration", EVERY_TACTIC, ids=str)
def test_every_tactic_in_half_precision_fits_and_does_not_spill(compiled, configuration):
    ptx = compiled[configuration]
    assert ptx["shared_bytes"] <= SHARED_LIMIT
    assert ptx["registers"] * ptx["threads"] <= 65536
    assert ptx["spill_bytes"] == 0


@pytest.mark.parametrize("configuration", EVERY_KIND, ids=str)
def test_ptx_is_what_an_engine_launches(compiled, configuration):
    """Every architecture, dtype, few and many views, odd sizes; all of it was assembled after it had been reduced."""
    capability, dtype, views, _, width, _ = configuration
    ptx = compiled[configuration]
    version, target = ptx["text"].splitlines()[:2]
    oldest = {80: "7.8", 86: "7.8", 89: "7.8", 90: "8.0", 100: "8.6", 120: "8.7"}[capability]
    assert version == f".version {oldest}"
    assert target == f".target sm_{capability}{'a' if capability >= 90 else ''}"
    head, _, body = ptx["text"].partition("\n{\n")
    entry = ptx["entry"]
    assert head.count(".entry") == 1 and f".visible .entry {entry}(" in head
    names = [f"{entry}_param_{i}" for i in range(4)]
    parameters = [line.strip(" \t,") for line in head.splitlines() if ".param" in line]
    assert parameters == [f".param .u64 .ptr .global .align 1 {name}" for name in names]
    assert all(name in body for name in names) and "_param_4" not in body
    assert multi_view_pool_plugin.arg_names[:4] == ["X", "C", "MASK", "P"]  # inputs, no numbers, the output
    tactic = Tactic(*ptx["tactic"])
    assert f".reqntid {ptx['threads']}" in head and ptx["threads"] == 32 * tactic.num_warps
    assert ptx["groups"] == -(-views // tactic.views)
    assert ptx["shared_bytes"] <= SHARED_LIMIT
    assert ptx["registers"] * ptx["threads"] <= 65536
    assert ptx["spill_bytes"] <= SPILLS.get((dtype, width), 0)
    assert ROOT not in ptx["text"] and ".py" not in ptx["text"] and "debug" not in ptx["text"]


def test_what_cannot_be_is_refused_by_name(compiled):
    refusal = compiled[TOO_LARGE]["error"]
    assert refusal.startswith("the plugin for 16 views of width 1280 in float16 needs 90")
    assert refusal.endswith(f"a block of an engine has {SHARED_LIMIT}")
    with pytest.raises(ValueError, match="no plugin for compute capability 7.5, only for 8.0, "):
        plugin_ptx(75, torch.float16, 16, 197, 768, 0.1, Tactic(16, 8, 1, 1))
    with pytest.raises(ValueError, match="no plugin for these inputs: the kernels take up to 64 views, not 65"):
        tactics(torch.float16, 65, 768)
    with pytest.raises(ValueError, match="not torch.float64"):
        tactics(torch.float64, 16, 768)
    if tiles.interpreting():
        with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1 replaces Triton's compiler"):
            plugin_ptx(80, torch.float16, 16, 197, 768, 0.1, Tactic(16, 8, 1, 1))


PTX = """.version 8.0
.target sm_80 // a comment
.visible .entry pool(
\t.param .u64 .ptr .global .align 1 pool_param_0,
\t.param .u64 .ptr .global .align 1 pool_param_1
)
.reqntid 256
{
\t.loc\t1 16 0
\tld.param.b64 %rd1, [pool_param_0];
}
\t.file\t1 "somewhere/kernel.py"
\t.section\t.debug_info
\t{
.b32 5 // length
\t}
"""


def test_hidden_parameters_and_debug_information_are_taken_away():
    text = without_debug(PTX)
    assert not {".loc", ".file", "debug", "comment", "somewhere"} & {word for word in text.split()}
    stripped = without_hidden_parameters(text, "pool", 1)
    assert "pool_param_0\n)" in stripped and "pool_param_1" not in stripped and ".reqntid 256" in stripped
    with pytest.raises(RuntimeError, match="reads its hidden parameter pool_param_1"):
        without_hidden_parameters(text.replace("[pool_param_0]", "[pool_param_1]"), "pool", 1)
    with pytest.raises(RuntimeError, match=r"has the entries \['pool'\], not other alone"):
        without_hidden_parameters(text, "other", 1)
    number = text.replace(".u64 .ptr .global .align 1 pool_param_0", ".u32 pool_param_0")
    with pytest.raises(RuntimeError, match="expected are pointers"):
        without_hidden_parameters(number, "pool", 1)
    with pytest.raises(RuntimeError, match="expected are pointers, 3 at least"):
        without_hidden_parameters(text, "pool", 3)


CASES = [
    Case(4, 21, 64, 1, dtype=torch.float32),
    Case(3, 33, 384, 3, dtype=torch.float16),
    Case(4, 17, 512, 8, dtype=torch.bfloat16),
    Case(3, 50, 768, 16, dtype=torch.float16),
    Case(3, 15, 640, 16, dtype=torch.float32),
    Case(3, 19, 1280, 17, dtype=torch.bfloat16),
    Case(4, 23, 123, 33, dtype=torch.float16),
    Case(2, 16, 256, 64, dtype=torch.float16),
    Case(2, 16, 1152, 4, dtype=torch.float16),
    Case(3, 1, 2048, 5, dtype=torch.float32),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernel_agrees_with_float64(case, device):
    """Every tactic; NaN in tokens that take no part, a sample without a valid token, whole tiles of masked ones."""
    case = Case(**{**vars(case), "kind": "mask+garbage"})
    given = inputs(case, device)
    tokens, codes, valid = given["tokens"], given["codes"], given["mask"]
    mask = valid.to(torch.int32) * -3  # any value but 0 takes part
    scale = 0.21
    exact, _ = reference.multi_view_pool(tokens.double(), codes.double(), mask=valid, scale=scale, need_gram=False)
    plain, _ = reference.multi_view_pool(tokens, codes, mask=valid, scale=scale, need_gram=False)
    tolerance = 1e-5 if case.dtype == torch.float32 else 2 * error(plain, exact)
    for tactic in tactics(case.dtype, case.views, case.width):
        fixed = constants(case.dtype, case.views, case.length, case.width, scale, tactic)
        pooled = torch.empty(exact.shape, dtype=tiles.output_dtype(case.dtype), device=device)
        options = {} if tiles.interpreting() else {"num_warps": tactic.num_warps}
        grid = (case.batch * fixed["GROUPS"],)
        multi_view_pool_plugin[grid](tokens, codes, mask, pooled, **fixed, **options)
        pooled = pooled.to(case.dtype)
        assert error(pooled, exact) <= tolerance, tactic
        if case.batch > 1:
            assert (pooled[1] == 0).all(), tactic


GENUINE = REGISTRY + """
import json, warnings
import numpy as np, tensorrt as trt, tensorrt.plugin as trtp
from mvam_fast.export import plugin
plugin.register(90)
plugin.register(90)  # again: nothing more to do
(creator,) = CREATORS.values()
values = [trt.PluginField("scale", np.array([0.125], np.float32), trt.PluginFieldType.FLOAT32)]  # as the parser has it
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    made = creator.create_plugin(
        "MultiViewPool", "mvam", trt.PluginFieldCollection(values), trt.TensorRTPhase.BUILD,
        trt.QuickPluginCreationRequest.STRICT_AOT,
    )
half, int32 = trt.DataType.HALF, trt.DataType.INT32

def dimension(text):
    '''A symbol that only its builder below looks into: the class is TensorRT's, the object behind it is not made.'''
    made = Dimension.__new__(Dimension)
    made.text = text
    return made

class Dimension(trt.IDimensionExpr):
    pass

class Builder:
    def constant(self, value):
        return dimension(str(value))
    def operation(self, kind, one, other):
        return dimension(f"({one.text} {dict(PROD='*', SUM='+', FLOOR_DIV='//')[kind.name]} {other.text})")

def tensor(kind, *dims):
    described, inner = trt.DynamicPluginTensorDesc(), trt.PluginTensorDesc()
    inner.dims, inner.type, inner.format = trt.Dims(dims), kind, trt.TensorFormat.LINEAR
    described.desc = inner
    return described

class Kept(dict):
    pass

found = {"attributes": made.attrs, "fields": [[f.name, str(f.type)] for f in creator.field_names], "kernels": []}
found["type"] = type(made).__name__
assert made.get_output_data_types([half, half, int32], [3, 2, 2]) == [half]
symbols = [[dimension(text) for text in row] for row in (["batch", "50", "384"], ["33", "384"], ["batch", "50"])]
made.get_output_shapes(symbols, [], Builder())
found["output"] = [size._expr.text for size in made.output_descs[0].shape_expr]
io = [tensor(half, -1, 50, 384), tensor(half, 33, 384), tensor(int32, -1, 50), tensor(half, -1, 33, 384)]
supported = made.get_supported_format_combinations(io, 3)
found["types"] = [[str(s.type), str(s.format)] for s in supported]
made.configure_plugin(io[:3], io[3:])
describe = trtp._lib.QDP_REGISTRY["mvam::MultiViewPool"].aot_impl_func
for target in ((90, False), (90, True)):
    plugin.register(*target)
    for tactic in sorted(made.get_valid_tactics()):
        made.set_tactic(tactic)
        params, numbers = Kept(), Kept()
        made.get_launch_params([], io, 3, params, numbers, Builder())
        name, ptx = made.get_kernel([t.desc for t in io[:3]], [t.desc for t in io[3:]])
        trtp._tensor.SymIntExpr._exprBuilder = Builder()
        _, _, launch, _ = describe(*made.input_descs, 0.125, made.output_descs, tactic)
        trtp._tensor.SymIntExpr._exprBuilder = None
        fields = ("grid_x", "grid_y", "grid_z", "block_x", "block_y", "block_z", "shared_mem")
        assert set(vars(params)) == set(fields)
        found["kernels"].append({
            "name": name, "ptx": ptx.decode(), "numbers": numbers.nbSymExprs,
            **{field: getattr(launch, field)._expr.text for field in fields},
        })
print("RESULT" + json.dumps(found))
"""


@pytest.mark.parametrize("version", VERSIONS)
def test_nvidias_own_code_takes_the_plugin(version):
    """Registration, creation from the node's attributes, types, shapes, tactics and launch: only the registry and
    symbols of dimensions are stood in for."""
    found = json.loads(run_with(version, GENUINE, TRITON_INTERPRET="0").partition("RESULT")[2])
    assert found["type"] == "_TemplateAOTPlugin"
    assert found["fields"] == [["scale", "PluginFieldType.FLOAT64"]] and found["attributes"] == {"scale": 0.125}
    assert found["output"] == ["batch", "33", "384"]
    assert found["types"] == [[f"DataType.{t}", "TensorFormat.LINEAR"] for t in ("HALF", "HALF", "INT32", "HALF")]
    expected = tactics(torch.float16, 33, 384)
    assert len(found["kernels"]) == 2 * len(expected)
    for index, kernel in enumerate(found["kernels"]):
        tactic = expected[index % len(expected)]
        for batch in (1, 8, 129):
            grid = [eval(kernel[axis], {}, {"batch": batch}) for axis in ("grid_x", "grid_y", "grid_z")]
            assert grid == [batch * 3, 1, 1]  # 33 views, 16 to a program
        block = [kernel[axis] for axis in ("block_x", "block_y", "block_z")]
        assert block == [str(32 * tactic.num_warps), "1", "1"]
        assert 0 < int(kernel["shared_mem"]) <= SHARED_LIMIT and kernel["numbers"] == 0
        assert f".visible .entry {kernel['name']}(" in kernel["ptx"]
        target = "sm_90a" if index < len(expected) else "sm_80"  # the latter for any GPU from Ampere on
        assert f"\n.target {target}\n" in kernel["ptx"]


REFUSED = REGISTRY + """
import tensorrt as trt, tensorrt.plugin as trtp
from mvam_fast.export import plugin
for call in (lambda: plugin.register(75), lambda: plugin.register(90)):
    try:
        call()
    except (ValueError, RuntimeError) as error:
        print(error)
implement = trtp._lib.QDP_REGISTRY["mvam::MultiViewPool"].aot_impl_func
def tensor(dtype, *dims):
    desc = trtp.TensorDesc(trtp.ShapeExprs(len(dims), _is_dummy=True), dtype)
    desc.shape = trtp.Shape(dims)
    desc.format = trt.TensorFormat.LINEAR
    return desc
half, int8 = trt.DataType.HALF, trt.DataType.INT8
for tokens, codes in (
    (tensor(half, -1, -1, 64), tensor(half, 4, 64)), (tensor(int8, -1, 5, 64), tensor(int8, 4, 64)),
    (tensor(half, -1, 5, 64), tensor(half, 65, 64)), (tensor(half, -1, 5, 4096), tensor(half, 4, 4096)),
):
    try:
        implement(tokens, codes, None, 0.1, None, 1)
    except ValueError as error:
        print(error)
trt.__version__ = "10.14.1"
try:
    plugin.register(90)
except RuntimeError as error:
    print(error)
"""


def test_what_no_engine_can_have_is_refused_by_name():
    out = run_with(VERSIONS[1], REFUSED, TRITON_INTERPRET="0")
    for message in (
        "capability is 75; the plugin has PTX for 80, 86,", "the batch alone may be free",
        "takes tokens in float32, float16 and bfloat16, not in DataType.INT8", "up to 64 views, not 65",
        "widths up to 2048, not 4096", "plugins are broken in 10.14",
    ):  # fmt: skip
        assert message in out


def test_versions_of_tensorrt():
    assert "older than 10.12" in plugin.blocked("10.9.0.34") and "older than 10.12" in plugin.blocked("8.6.1")
    assert "broken in 10.14" in plugin.blocked("10.14.1.48")
    for version in ("10.12.0.36", "10.13.3.9", "10.16.1.11", "11.4.0.106"):
        assert plugin.blocked(version) == ""
    assert plugin.caution("10.16.1.11") == plugin.caution("11.0.0.114") == ""
    for version in ("11.1.0.1", "11.2.1.2", "11.4.0.106"):
        assert "NVIDIA/TensorRT#4849" in plugin.caution(version)
