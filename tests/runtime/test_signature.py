"""Arguments of launches, by the names of the kernel's parameters."""

from __future__ import annotations

import numpy as np
import pytest

from cuattn.errors import DeclarationError, LaunchError
from cuattn.runtime.declarations import Declarations
from cuattn.runtime.executor import HostExecutor, host_executor
from cuattn.runtime.signature import Signature

ENTRY = "cuattn_attention_backward_bias_sum"
CONSTANTS = {"Real": "float", "BiasElement": "float", "NUM_THREADS": 256}


def signature() -> Signature:
    return Signature("attention_backward_bias_sum", CONSTANTS, ENTRY)


def arguments(**changes):
    partial, dbias = np.arange(8, dtype=np.float32), np.zeros(4, np.float32)
    given = {"g_partial": partial, "g_dbias": dbias, "num_elements": np.int64(4), "num_parts": np.int32(2)}
    return {name: value for name, value in (given | changes).items() if value is not ...}


def test_arguments_go_where_their_names_say():
    given = arguments()
    for order in (given, dict(reversed(given.items()))):
        bound = signature().bind(order)
        assert all(value is given[name] for value, name in zip(bound, given, strict=True))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    (
        ({"num_parts": ...}, DeclarationError, "no argument is given for num_parts"),
        ({"parts": np.int32(2)}, DeclarationError, "no parameter is called parts"),
        ({"num_parts": ..., "parts": 1}, DeclarationError, "called parts; no argument is given for num_parts"),
        ({"num_parts": np.int64(2)}, LaunchError, "num_parts is a int64; a numpy.int32 is needed"),
        ({"num_parts": 2}, LaunchError, "num_parts is a int; a numpy.int32 is needed"),
        ({"num_elements": 4.0}, LaunchError, "num_elements is a float"),
        ({"num_elements": True}, LaunchError, "num_elements is a bool"),
        ({"g_dbias": np.int64(0)}, LaunchError, "g_dbias is a int64; an array is needed"),
        # two arguments that have changed places
        ({"g_dbias": np.int64(4), "num_elements": np.zeros(4, np.float32)}, LaunchError, "g_dbias is a int64"),
    ),
)
def test_what_is_refused_before_anything_is_launched(monkeypatch, changes, error, message):
    executor = host_executor("sm_80")
    kernel = executor.kernel("attention_backward_bias_sum", CONSTANTS, ENTRY)
    monkeypatch.setattr(HostExecutor, "_start", lambda *args: pytest.fail("launched"))
    with pytest.raises(error, match=message):
        executor.launch(kernel, (1,), (256,), arguments(**changes))


def test_what_is_refused_once_is_refused_again():
    of_sum = signature()
    of_sum.bind(arguments())
    for _ in range(2):
        with pytest.raises(LaunchError, match="num_parts"):
            of_sum.bind(arguments(num_parts=2))


def test_a_null_pointer_is_an_argument():
    assert signature().bind(arguments(g_partial=None))[0] is None


def test_the_compiled_entry_is_compared_with_the_source():
    signature().check_sizes([8, 8, 8, 4])
    for sizes in ([8, 8, 4, 4], [8, 8, 8], [8, 8, 8, 4, 4]):
        with pytest.raises(DeclarationError, match="were read from the source, and the compiled entry has"):
            signature().check_sizes(sizes)


def test_a_struct_of_another_size_is_noticed():
    of_rope = Signature("rope", {"Element": "__half"}, "cuattn_rope")
    with pytest.raises(DeclarationError):
        of_rope.check_sizes([8, 8, 8, 8, 8, 8, 128])


def test_parameters_are_read_with_their_types():
    source = """
        using Params = Wide<float>;
        extern "C" __global__ void __launch_bounds__(NUM * sizeof(int), 1) kernel(
            const Element* __restrict__ g_x,  // [rows, (a, b)], last axis contiguous
            const __grid_constant__ Map map, typename Of<Element>::type* g_y,
            unsigned long long count, const Params params) {}
    """
    found = Declarations(source).parameters("kernel")
    assert [(one.name, one.type, one.argument, one.pointer) for one in found] == [
        ("g_x", "Element", None, True),
        ("map", "Map", None, False),
        ("g_y", "Of<Element>::type", None, True),
        ("count", "unsigned long long", None, False),
        ("params", "Wide", "float", False),
    ]
    with pytest.raises(DeclarationError, match="no entry other; it has kernel"):
        Declarations(source).parameters("other")
    with pytest.raises(DeclarationError, match=r"cannot read the parameter 'const float. __restrict__'"):
        Declarations('extern "C" __global__ void k(const float* __restrict__, int n) {}').parameters("k")
