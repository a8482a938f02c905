"""Slips in the Hopper kernel of differential attention: waits and releases, streams, what one leaves for the other."""

from bench.mutants.semantic import Semantic

_KERNEL = "differential_attention_hopper.cu"
_CONSUMER = "differential/stream_consumer.cuh"
_ROW = "differential/finish_row.cuh"

HOPPER_STREAMS = (
    Semantic(_KERNEL, "barriers in use before they exist", r"__syncthreads\(\);", ""),
    Semantic(_KERNEL, "nobody has the first turn", r"turns\.start\(\);", ";"),
    Semantic(_KERNEL, "keys are free when one stream is done", r"k_ring\.init\(2 \* STREAM_WARPS\)", "k_ring.init(4)"),
    Semantic(_KERNEL, "queries overwritten in use", r"\s*rings\.q\.wait_empty\(smem\.q_ring\);", ""),
    Semantic(_KERNEL, "keys overwritten in use", r"\s*rings\.k\.wait_empty\(smem\.k_ring\);", ""),
    Semantic(_KERNEL, "values overwritten in use", r"\s*rings\.v\.wait_empty\(smem\.v_ring\);", ""),
    Semantic(_KERNEL, "half of the keys expected", r"sizeof\(smem\.k\[0\]\)\);", "sizeof(smem.k[0]) / 2);"),
    Semantic(_KERNEL, "both streams have the first queries", r"2 \* block\.head_idx \+ stream", "2 * block.head_idx"),
    Semantic(_KERNEL, "both streams have the first keys", r"block\.kv_head_idx \+ s,", "block.kv_head_idx,"),
    Semantic(_KERNEL, "the state of the streams exchanged", r"own\.stream == 0 \? g_out1", "own.stream == 1 ? g_out1"),
    Semantic(_KERNEL, "the second stream subtracts", r"if \(own\.stream == 0\) \{", "if (own.stream == 1) {"),
    Semantic(_CONSUMER, "both streams multiply the first queries", r"smem\.q\[own\.stream\]", "smem.q[0]"),
    Semantic(_CONSUMER, "keys read before they land", r"\s*rings\.k\.wait_full\(smem\.k_ring\);", ""),
    Semantic(_CONSUMER, "values read before they land", r"\s*rings\.v\.wait_full\(smem\.v_ring\);", ""),
    Semantic(_CONSUMER, "queries read before they land", r"\s*rings\.q\.wait_full\(smem\.q_ring\);", ""),
    Semantic(_CONSUMER, "keys are never given back", r"if \(releases\) rings\.k\.release\(smem\.k_ring\);", ""),
    Semantic(_CONSUMER, "queries are never given back", r"if \(releases\) rings\.q\.release\(smem\.q_ring\);", ""),
    Semantic(_CONSUMER, "scores taken from a product under way", r"wgmma_wait<1>\(\);", "wgmma_wait<2>();"),
    Semantic(
        _CONSUMER,
        "output taken from a product under way",
        r"wgmma_wait<0>\(\);(\s*release_values\(\);\n\})",
        r"\1",
    ),
    Semantic(
        _CONSUMER, "the output is not rescaled", r"rescale_row\(state\.acc_out\[0\], half, corrections\[half\]\);", ";"
    ),
    Semantic(
        _CONSUMER,
        "the second output overwritten in use",
        r"\s*named_barrier_sync\(PLACE_IS_FREE, BOTH_STREAMS\);",
        "",
    ),
    Semantic(
        _CONSUMER,
        "the second output read before it is there",
        r"\s*named_barrier_sync\(PLACE_IS_FULL, BOTH_STREAMS\);",
        "",
    ),
    Semantic(_CONSUMER, "rows exchanged on the way", r"-lambdas\[0\], second\.x", "-lambdas[0], second.z"),
    Semantic(_CONSUMER, "one lambda for both rows", r"-lambdas\[1\], second\.w", "-lambdas[0], second.w"),
    Semantic(_CONSUMER, "one lse for both streams", r"own\.head\(block\.head_idx\)", "2 * block.head_idx"),
    Semantic(_ROW, "the norm without its weight", r"acc\[e\]\[2 \* half\] \*= g_norm_weight\[column\];", ";"),
    Semantic(_ROW, "the factor is lost", r"factor \*= norm\.inverse", "factor = norm.inverse"),
)
