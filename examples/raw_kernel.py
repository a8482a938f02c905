"""Test a CUDA kernel of your own without a GPU: the race checker finds a barrier that is not there.

`cuattn.host.RawModule` takes what `cupy.RawModule` takes. The kernel below reverses blocks of 64 numbers through shared
memory. Without `__syncthreads()` a thread may read a slot before the other warp has written it. On a GPU that often
goes well, and one day it does not; the host executor reports it each time, with the line.
"""

import numpy as np

from cuattn import errors, host

SOURCE = """
extern "C" __global__ void reverse_blocks(const float* g_in, float* g_out)
{
    __shared__ float s_tile[64];
    const int thread_idx = threadIdx.x;
    const long long first = 64LL * blockIdx.x;
    s_tile[thread_idx] = g_in[first + thread_idx];
    BARRIER
    g_out[first + thread_idx] = s_tile[63 - thread_idx];
}
"""


def reverse_blocks(source: str, x: np.ndarray) -> np.ndarray:
    kernel = host.RawModule(code=source).get_function("reverse_blocks")
    out = host.empty(x.shape, x.dtype)  # an array that counts as not written yet
    kernel((x.size // 64,), (64,), (x, out))
    host.finish(out)  # complains if a number of it is still not written
    return out


x = np.arange(256, dtype=np.float32)
with host.check("mem", "init", "race"):
    out = reverse_blocks(SOURCE.replace("BARRIER", "__syncthreads();"), x)
    assert np.array_equal(out, x.reshape(4, 64)[:, ::-1].reshape(-1))
    print("with the barrier: right, and nothing to report")

# The race checker alone. With "init" on as well, the read of a slot that is not written yet would be reported first.
with host.check("race"):
    try:
        reverse_blocks(SOURCE.replace("BARRIER", ""), x)
    except errors.RaceError as fault:
        print(f"without it: a race at {fault.location}\n{fault}")
    else:
        raise SystemExit("the missing barrier was not noticed")
