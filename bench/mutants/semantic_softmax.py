"""Slips in the softmax kernels."""

from bench.mutants.semantic import Semantic

SOFTMAX = (
    Semantic(
        "softmax/softmax_state.cuh", "skip the rescale", r"state\.row_sum \* exponential\(.*?\)\)", "state.row_sum"
    ),
    Semantic(
        "softmax/softmax_state.cuh",
        "rescale by e^(+max)",
        r"(state\.row_max) - (exponent_shift\(row_max\))",
        r"\2 - \1",
    ),
    Semantic(
        "softmax/softmax_state.cuh",
        "no guard for -inf",
        r"row_max == -infinity\(\) \? Accumulator\(0\) : row_max",
        "row_max",
    ),
    Semantic("softmax/softmax_state.cuh", "lse without the maximum", r"exponent_shift\(state\.row_max\) \+ log", "log"),
    Semantic("softmax/softmax_state.cuh", "lse in base 2", r"return logf\(x\)", "return log2f(x)"),
    Semantic(
        "softmax/softmax_state.cuh",
        "merge keeps the smaller maximum",
        r"return \{larger\.row_max",
        "return {smaller.row_max",
    ),
    Semantic(
        "softmax/softmax_algorithms.cuh", "block maximum, not the running one", r"= state\.row_max;", "= -infinity();"
    ),
    Semantic(
        "softmax/softmax_algorithms.cuh",
        "forgets the sum so far",
        r"= rescaled_sum\(state, row_max\)",
        "= Accumulator(0)",
    ),
    Semantic("softmax/softmax_rows.cuh", "masked elements are 0, not -inf", r": -infinity\(\)", ": Accumulator(0)"),
    Semantic(
        "softmax/softmax_rows.cuh", "only the first warp counts", r"s_slots\[threadIdx\.x % NUM_WARPS\]", "s_slots[0]"
    ),
    Semantic("softmax/softmax_rows.cuh", "one step short of a butterfly", r"= NUM_LANES / 2", "= NUM_LANES / 4"),
    Semantic(
        "softmax/softmax_rows.cuh",
        "the last pack of a row in one piece",
        r"pack_col\(tile, thread, PACK\) <= end",
        "pack_col(tile, thread, 0) < end",
    ),
    Semantic(
        "softmax/softmax_rows.cuh",
        "... when storing",
        r"pack_col\(tile, thread, PACK\) <= end",
        "pack_col(tile, thread, 0) < end",
        1,
    ),
    Semantic(
        "softmax/softmax_output.cuh",
        "not divided",
        r"return exponential_of_shifted / divisor",
        "return exponential_of_shifted",
    ),
    Semantic(
        "softmax_split.cu",
        "the last chunk is not cut",
        r"min\(begin \+ layout\.chunk_cols, layout\.num_cols\)",
        "begin + layout.chunk_cols",
    ),
    Semantic("online_softmax_state.cu", "replaces the state", r"= merge\(g_states\[row_idx\], piece\)", "= piece"),
)
