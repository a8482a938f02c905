"""Structs of the kernels: read from the sources, laid out as the compiler lays them out, packed by name."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest

from cuattn import compile
from cuattn.benchmark.inspected import everything
from cuattn.compile.expand import kernel_names
from cuattn.errors import CompileError, DeclarationError
from cuattn.runtime.declarations import Declarations, of_kernel
from cuattn.runtime.structs import SCALARS, lay_out, struct_layout

SOURCE = """
template <typename Real>
struct Base {
    long long offset;  // a comment; with a semicolon
    Real scale;
    __device__ int twice() const { return 2; }
};
constexpr int NUM = 3;
struct Pair { int first, second; };
struct Plain { Pair pair; int count; };
template <typename Real>
struct alignas(32) Derived : Base<Real> {
    unsigned char code;
    /* Pair old; */
    Pair pair;
    unsigned short list[NUM];
};
struct Outer { char tag; Plain plain; double weight; };
"""


@cache
def passed_structs() -> dict[str, list[str]]:
    """The structs that entries take by value, each with the shortest kernel that takes it: by kernel."""
    found: dict[str, list[str]] = {}
    kernels = sorted(kernel_names(), key=lambda kernel: len(compile.source(kernel, {})))
    for kernel in kernels:
        declarations = of_kernel(kernel)
        for entry in declarations.entries():
            for parameter in declarations.parameters(entry):
                known = parameter.pointer or parameter.type in {*SCALARS, "Accumulator"}
                if not known and not any(parameter.type in names for names in found.values()):
                    found.setdefault(kernel, []).append(parameter.type)
    return found


def offset_asserts(declarations: Declarations, name: str) -> list[str]:
    """Assertions that hold if the compiler lays a struct out as `lay_out` does, and the structs that it holds."""
    lines = []
    declared = declarations.struct(name)
    for real in (None,) if declared.parameter is None else ("float", "double"):
        layout = lay_out(declarations, name, real)
        c_name = name if real is None else f"{name}<{real}>"
        alias = f"As_{name}_{real}"
        lines += [f"using {alias} = {c_name};", f"static_assert(sizeof({alias}) == {layout.dtype.itemsize});"]
        lines.append(f"static_assert(alignof({alias}) == {layout.alignment});")
        for field, (_, offset) in layout.dtype.fields.items():  # __INTADDR__: an address as a constant, in NVRTC
            lines.append(f"static_assert(__INTADDR__(&((({alias}*)0)->{field})) == {offset});")
    return lines


def compile_with(text: str, lines: list[str], arch: str = "sm_80") -> None:
    """Raises `CompileError` unless all assertions hold."""
    compile.build_source("\n".join((text, *lines, "")), name="offsets", arch=arch, kind="ptx")


def test_every_struct_is_looked_at():
    names = {name for names in passed_structs().values() for name in names}
    assert names == {
        *("AppendLayout", "AttentionBackwardParams", "AttentionParams", "BiasSums", "DecodeParams"),
        *("DifferentialCombineParams", "DifferentialParams", "DifferentialRowsParams", "DualChunkParams"),
        *("HopperSchedule", "LinearBackwardParams", "LinearParams", "LogitStrides", "MaskLayout", "MergeLayout"),
        *("PagesLayout", "RopeLayout", "RowLayout", "RowStrides", "RowsLayout", "ScanParams", "SlotsLayout"),
        *("SplitLayout", "TensorMap"),
    }


@pytest.mark.parametrize("kernel", sorted(passed_structs()))
def test_the_compiler_agrees_on_every_offset(kernel):
    one = next(one for one in everything() if one.kernel == kernel)
    lines = [line for name in passed_structs()[kernel] for line in offset_asserts(of_kernel(kernel), name)]
    compile_with(compile.source(kernel, one.constants), lines, one.arch or "sm_80")


def test_the_compiler_agrees_on_bases_arrays_and_alignment():
    lines = [line for name in ("Derived", "Outer") for line in offset_asserts(Declarations(SOURCE), name)]
    source = SOURCE + 'extern "C" __global__ void nothing() {}'
    compile_with(source, lines)
    with pytest.raises(CompileError):
        compile_with(source, [line.replace("== 16)", "== 12)") for line in lines])


@pytest.mark.parametrize(("real", "numpy_real"), (("float", np.float32), ("double", np.float64)))
def test_a_struct_with_a_base_arrays_and_alignment(real, numpy_real):
    layout = lay_out(Declarations(SOURCE), "Derived", real)
    packed = layout.pack(offset=-1, scale=0.5, code=7, pair=(2, 3), list=[4, 5, 6])
    fields = np.frombuffer(packed.tobytes(), layout.dtype)[0]
    assert layout.alignment == 32 and layout.dtype.itemsize == 64
    # A base keeps its padding: what is derived begins behind it.
    assert layout.dtype.fields["code"][1] == 16 and layout.dtype["scale"] == numpy_real
    assert fields["offset"] == -1 and fields["scale"] == 0.5 and fields["code"] == 7
    assert tuple(fields["pair"]) == (2, 3) and fields["list"].tolist() == [4, 5, 6]


def test_structs_within_structs_are_given_by_name():
    layout = lay_out(Declarations(SOURCE), "Outer")
    packed = layout.pack(weight=2.0, tag=1, plain={"count": 3, "pair": (1, 2)})
    assert np.frombuffer(packed.tobytes(), layout.dtype)[0]["plain"].tolist() == ((1, 2), 3)
    for wrong in ({"pair": (1, 2)}, {"pair": (1, 2), "counts": 3}, {"pair": (1,), "count": 3}, [1, 2, 3]):
        with pytest.raises(DeclarationError, match="struct Outer"):
            layout.pack(weight=2.0, tag=1, plain=wrong)


def test_names_decide_and_not_the_order():
    layout = struct_layout("attention_forward", "LogitStrides")
    assert layout.pack(batch=1, head=2, query=3, key=4) == layout.pack(key=4, query=3, head=2, batch=1)


@pytest.mark.parametrize(
    ("change", "message"),
    (
        ({"key": None}, "missing: key"),
        ({"keys": 4}, "unknown: keys"),
        ({"key": None, "keys": 4}, "unknown: keys; missing: key"),
        ({"key": 2**63}, "int too large|out of range|format"),
        ({"key": 0.5}, "integer"),
        ({"key": (1, 2)}, "integer"),
    ),
)
def test_names_and_numbers_that_do_not_fit(change, message):
    fields = {name: value for name, value in {"batch": 1, "head": 2, "query": 3, "key": 4, **change}.items() if value}
    with pytest.raises(DeclarationError, match=f"struct LogitStrides: .*({message})"):
        struct_layout("attention_forward", "LogitStrides").pack(**fields)


@pytest.mark.parametrize(
    ("source", "message"),
    (
        ("struct Other { int a; };", "declares 0 structs called S"),
        ("struct S { int a; }; struct S { int b; };", "declares 2 structs called S"),
        ("struct S { int* a; };", "cannot read the member 'int. a'"),
        ("struct S { int a[N]; };", "no constant N"),
        ("struct S { Unknown a; };", "declares 0 structs called Unknown"),
        ("struct S { int a;", "does not end"),
        ("struct P { int a; }; struct S { P list[2]; };", "struct S: list is an array of structs"),
        ("template <typename T>\nstruct S { T a; };", "template parameter T"),
    ),
)
def test_declarations_that_cannot_be_read(source, message):
    with pytest.raises(DeclarationError, match=message):
        lay_out(Declarations(source), "S")
