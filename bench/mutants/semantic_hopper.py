"""Slips in the Hopper kernel: waits, releases, fences, byte counts, and the order of asynchronous products."""

from bench.mutants.semantic import Semantic

_KERNEL = "attention_forward_hopper.cu"
_PRODUCER = "hopper/forward_producer.cuh"
_CONSUMER = "hopper/forward_consumer.cuh"
_PRODUCTS = "hopper/tile_products.cuh"
_PIPELINE = "hopper/pipeline.cuh"

_TRANSPOSERS = (
    Semantic(_PRODUCER, "rows are transposed before they land", r"\s*rings\.v\.wait_full\(smem\.rows_ring\);", ""),
    Semantic(_PRODUCER, "columns are overwritten in use", r"\s*rings\.v\.wait_empty\(smem\.v_ring\);", ""),
    Semantic(_PRODUCER, "columns are not fenced", r"fence_proxy_async\(\);(?!.*fence_proxy_async)", ""),
    Semantic(_PRODUCER, "columns of one lane", r"__syncwarp\(\);(?!.*__syncwarp)", ""),
    Semantic(_PRODUCER, "rows are never given back", r"\s*rings\.v\.release\(smem\.rows_ring\);", ""),
)

HOPPER = (
    Semantic(_KERNEL, "barriers in use before they exist", r"__syncthreads\(\);", ""),
    Semantic(_KERNEL, "the producer keeps its registers", r"release_registers<PRODUCER_REGISTERS>\(\);", ""),
    Semantic(_KERNEL, "nobody takes the last turn", r"turns\.finish\(\);", ";"),
    Semantic(_KERNEL, "nobody has the first turn", r"turns\.start\(\);", ";"),
    Semantic(
        _KERNEL,
        "stages are free when one consumer is done",
        r"k_ring\.init\(NUM_CONSUMER_WARPS\)",
        "k_ring.init(WARPGROUP_SIZE / WARP_SIZE)",
    ),
    Semantic(_PRODUCER, "queries overwritten in use", r"\s*rings\.q\.wait_empty\(smem\.q_ring\);", ""),
    Semantic(_PRODUCER, "keys overwritten in use", r"\s*rings\.k\.wait_empty\(smem\.k_ring\);", ""),
    Semantic(_PRODUCER, "values overwritten in use", r"\s*rings\.v\.wait_empty\(v_ring\);", ""),
    Semantic(_PRODUCER, "half of the bytes expected", r"(SPANS \* BLOCK_N \* SPAN_BYTES)\);", r"\1 / 2);"),
    Semantic(_PRODUCER, "twice the bytes expected", r"(SPANS \* BLOCK_N \* SPAN_BYTES)\);", r"2 * \1);"),
    Semantic(_PRODUCER, "queries of one span expected", r"sizeof\(smem\.q\)\);", "sizeof(smem.q[0]));"),
    Semantic(
        _PRODUCER,
        "values of the next sequence cleared before they land",
        r"\s*mbarrier_wait\(smem_address\(&smem\.v_tail\), tail_parity\);",
        "",
    ),
    Semantic(_PRODUCER, "cleared values are not fenced", r"fence_proxy_async\(\);", ""),
    Semantic(_PRODUCER, "values cleared by one lane", r"__syncwarp\(\);", ""),
    Semantic(_PRODUCER, "the tail has one phase", r"\s*tail_parity \^= 1;", ""),
    *_TRANSPOSERS,
    Semantic(_CONSUMER, "keys read before they land", r"\s*rings\.k\.wait_full\(smem\.k_ring\);", ""),
    Semantic(_CONSUMER, "values read before they land", r"\s*rings\.v\.wait_full\(smem\.v_ring\);", ""),
    Semantic(_CONSUMER, "queries read before they land", r"\s*rings\.q\.wait_full\(smem\.q_ring\);", ""),
    Semantic(_CONSUMER, "keys are never given back", r"if \(releases\) rings\.k\.release\(smem\.k_ring\);", ""),
    Semantic(_CONSUMER, "keys given back by every thread", r"if \(releases\) (rings\.k\.release)", r"\1"),
    Semantic(_CONSUMER, "queries are never given back", r"if \(releases\) rings\.q\.release\(smem\.q_ring\);", ""),
    Semantic(
        _CONSUMER,
        "values given back before they are used",
        r"wgmma_wait<0>\(\);(\s*)release_values\(\);(\s*round)",
        r"release_values();\1wgmma_wait<0>();\2",
    ),
    Semantic(
        _CONSUMER,
        "queries given back before the last product",
        r"(\n    key_tile--;)",
        r"\n    if (releases) rings.q.release(smem.q_ring);\1",
    ),
    Semantic(_CONSUMER, "scores taken from a product under way", r"wgmma_wait<1>\(\);", "wgmma_wait<2>();"),
    Semantic(
        _CONSUMER,
        "probabilities overwritten under way",
        r"wgmma_wait<0>\(\);(\s*release_values\(\);\s*round)",
        r"wgmma_wait<1>();\1",
    ),
    Semantic(
        _CONSUMER, "output taken from a product under way", r"wgmma_wait<0>\(\);(\s*release_values\(\);\n\})", r"\1"
    ),
    Semantic(_PRODUCTS, "scores without a fence", r"\s*wgmma_fence\(\);", ""),
    Semantic(_PRODUCTS, "output without a fence", r"\s*wgmma_fence\(\);", "", 1),
    Semantic(_PRODUCTS, "scores on top of the last ones", r"step > 0\);", "1);"),
    Semantic(
        _CONSUMER, "the output is not rescaled", r"rescale_row\(state\.acc_out\[0\], half, corrections\[half\]\);", ";"
    ),
    Semantic(_PIPELINE, "producers begin by waiting", r"parity \^ 1\);", "parity);"),
    Semantic(_PIPELINE, "phases do not alternate", r"\s*parity \^= 1;", ""),
)
