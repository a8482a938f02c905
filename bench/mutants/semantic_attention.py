"""Slips in the attention kernels and what they share."""

from bench.mutants.semantic import Semantic

_LOGITS_CUH = "attention/logits.cuh"
_LOGITS = (
    Semantic(
        _LOGITS_CUH,
        "softcap without its division",
        r"tanh_of<(.*?)>\(score \* inverse_softcap, slope\)",
        r"tanh_of<\1>(score, slope)",
    ),
    Semantic(_LOGITS_CUH, "softcap's derivative is 1", r"slope = 4\.0f \* e \* \(r \* r\);", "slope = 1.0f;"),
    Semantic(_LOGITS_CUH, "softcap's derivative is 1", r"slope = Real\(4\) \* e / \(sum \* sum\);", "slope = 1;"),
    Semantic(_LOGITS_CUH, "no derivative without a softcap", r"keep_slope\(r, c, Real\(1\)\);", ";"),
    Semantic(_LOGITS_CUH, "ALiBi without the diagonal", r"\(query\) \+ diagonal_offset", "(query)"),
    Semantic(_LOGITS_CUH, "ALiBi adds", r"score -= rows\.slope", "score += rows.slope"),
    Semantic(_LOGITS_CUH, "ALiBi of the transposed tile", r"OWN_KEYS \? column - Layout::row\(r\) : ", ""),
    Semantic(_LOGITS_CUH, "ALiBi of the first column", r"first - static_cast<decltype\(first\)>\(column\)", "first"),
    Semantic(_LOGITS_CUH, "query and key swapped", r"OWN_KEYS \? other : own", "OWN_KEYS ? own : other"),
    Semantic(_LOGITS_CUH, "query and key swapped", r"OWN_KEYS \? own : other", "OWN_KEYS ? other : own"),
    Semantic(
        _LOGITS_CUH,
        "bias and mask of the transposed tile",
        r"OWN_KEYS \? strides\.query : strides\.key",
        "strides.key",
    ),
    Semantic(_LOGITS_CUH, "the bias of the next key", r"g_bias\[column \*", "g_bias[(column + 1) *"),
    Semantic(_LOGITS_CUH, "the mask turned around", r"!g_mask\[", "g_mask["),
    Semantic(_LOGITS_CUH, "rows that do not exist are read", r"if \(lane\.own \+ row >= num_own\) return;", ";"),
    Semantic(_LOGITS_CUH, "keys that do not exist", r"OWN_KEYS && row >= num_own", "false"),
)

ATTENTION = (
    Semantic(
        "common/mma.cuh", "fragment map: a, rows and columns", r"return lane_idx % 16; \}", "return lane_idx / 2; }"
    ),
    Semantic("common/mma.cuh", "fragment map: halves of a pair swapped", r"left\[0\], left\[1\]", "left[1], left[0]"),
    Semantic("common/mma.cuh", "fragment map: quarters swapped", r"frag_a\[1\]", "frag_a[2]"),
    Semantic(
        "common/mma.cuh",
        "one lane of a quad is not asked",
        r"return fmaxf\(x, __shfl_xor_sync\(0xffffffff, x, 2\)\)",
        "return x",
    ),
    Semantic("common/mma.cuh", "half of a quad's sum", r"return x \+ __shfl_xor_sync\(0xffffffff, x, 2\)", "return x"),
    Semantic(
        "common/tiles.cuh", "no zeros beyond the last row", r"row < num_rows \? col_valid\[i\] : 0", "col_valid[i]"
    ),
    Semantic(
        "common/tiles.cuh", "no zeros beyond the head dim", r"min\(Share::CHUNK, max\(0, (.*?)\)\);", "Share::CHUNK;"
    ),
    Semantic("common/ptx.cuh", "float16 pair swapped", r'"f"\(high\), "f"\(low\)', '"f"(low), "f"(high)'),
    Semantic("common/ptx.cuh", "bfloat16 pair swapped", r'"f"\(high\), "f"\(low\)', '"f"(low), "f"(high)', 1),
    Semantic("common/ptx.cuh", "the whole chunk is read", r'"r"\(src_bytes\)', '"n"(16)'),
    Semantic("common/ptx.cuh", "the whole 8 bytes are read", r'"r"\(src_bytes\)', '"n"(8)', 1),
    Semantic("common/ptx.cuh", "the whole 4 bytes are read", r'"r"\(src_bytes\)', '"n"(4)', 2),
    Semantic("common/ptx.cuh", "one group too many may be pending", r'"n"\(NUM_PENDING\)', '"n"(NUM_PENDING + 1)'),
    Semantic("common/ptx.cuh", "not transposed", r"\.x4\.trans\.", ".x4."),
    Semantic("common/ptx.cuh", "transposed", r"m8n8\.x4\.shared", "m8n8.x4.trans.shared"),
    Semantic(
        "common/ptx.cuh", "fragments of a in another order", r'"r"\(a\[1\]\), "r"\(a\[2\]\)', '"r"(a[2]), "r"(a[1])'
    ),
    Semantic("common/ptx.cuh", "fragments of b in another order", r'"r"\(b0\), "r"\(b1\)', '"r"(b1), "r"(b0)'),
    Semantic(
        "common/ptx.cuh",
        "the accumulator is not added to",
        r"\{%8, %9\}, \{%0, %1, %2, %3\}",
        "{%8, %9}, {%3, %2, %1, %0}",
    ),
    Semantic(
        "attention/online_softmax.cuh", "the maximum of the tile alone", r"max\(max_logit, tile_max\)", "tile_max"
    ),
    Semantic("attention/online_softmax.cuh", "no guard for empty rows", r"max_logit == \S+\(\) \? Real\(0\) : ", ""),
    Semantic("attention/online_softmax.cuh", "division by an empty sum", r"sum == Real\(0\) \? Real\(0\) : ", ""),
    Semantic("attention/online_softmax.cuh", "lse in base 2", r"max_logit \+ log\(sum\)", "max_logit + log2(sum)"),
    Semantic("attention/score_tile.cuh", "large maxima take the ordinary path", r">= LARGE_SHIFT;", ">= 1e38f;"),
    Semantic("attention/score_tile.cuh", "large maxima: the shift is kept", r"\n\s+shift = -LOG2_FACTOR;", ""),
    Semantic(
        "attention/score_tile.cuh",
        "large maxima: differences are not taken",
        r"\[2 \* half\] -= reference;",
        "[0] -= 0;",
    ),
    Semantic(
        "attention/score_tile.cuh",
        "large maxima: what is summed does not follow",
        r"correction = \(old_max - reference\) \* scale_log2;",
        "correction = 0.0f;",
    ),
    Semantic("attention/score_tile.cuh", "lse knows of the factor", r"\(row\.sum\) \* INVERSE_P_FACTOR", "(row.sum)"),
    Semantic(
        "attention/score_tile.cuh", "lse in base 2", r"\(shift \+ LOG2_P_FACTOR\) \* LN_2", "(shift + LOG2_P_FACTOR)"
    ),
    Semantic(
        "attention/score_tile.cuh", "large maxima stay products", r"row\.max_logit \* positive_scale;", "row.max_logit;"
    ),
    Semantic("attention/probability_factor.cuh", "float16 has no factor", r"<__half> = 15", "<__half> = 0"),
    Semantic(
        "attention/online_softmax.cuh", "2^x of natural logits", r"difference \* log2_e<Real>\(\);", "difference;"
    ),
    Semantic("attention/mask.cuh", "one key too many", r"diagonal \+ right \+ 1", "diagonal + right + 2"),
    Semantic("attention/mask.cuh", "one key too few", r"diagonal - left", "diagonal - left + 1"),
    Semantic(
        "attention/mask.cuh",
        "full tiles by the wrong query",
        r"full_begin = (.*?)last_query",
        r"full_begin = \1first_query",
    ),
    Semantic(
        "attention/mask.cuh",
        "full tiles by the wrong query",
        r"full_end = (.*?)first_query",
        r"full_end = \1last_query",
    ),
    Semantic("attention/mask.cuh", "a warp skips a tile too many", r"first \+ count <= begin", "first <= begin"),
    Semantic(
        "attention/mask.cuh", "a warp skips the last tile", r"return first < end &&", "return first + count < end &&"
    ),
    Semantic("attention/mask.cuh", "the last key is hidden", r"column >= end", "column + 1 >= end"),
    Semantic("attention/mask.cuh", "the first key is hidden", r"column < begin\)", "column <= begin)"),
    Semantic(
        "attention/mask.cuh",
        "the band of the other side",
        r"return band\.transposed\(sequence\.seqlen_q\);",
        "return band.transposed(sequence.seqlen_k);",
    ),
    Semantic("attention/mask.cuh", "positions beyond the range", r"max\(0ll, (min\(.*?key_idx\))\)", r"\1"),
    Semantic(
        "attention/query_block.cuh",
        "heads of a group in another order",
        r"head_idx / params\.heads_per_kv_head",
        "head_idx % (params.num_heads / params.heads_per_kv_head)",
    ),
    Semantic(
        "attention/query_block.cuh",
        "the next sequence is seen",
        r"min\(max_length, end - start\)",
        "total - start",
    ),
    Semantic(
        "attention/query_block.cuh",
        "the diagonal of the whole batch",
        r"\+= seqlen_k - seqlen_q",
        "+= params.seqlen_k - params.seqlen_q",
    ),
    Semantic("attention/column_block.cuh", "every CTA has the first columns", r"first = \(grid_idx.*?;", "first = 0;"),
    Semantic(
        "attention/column_block.cuh", "columns beyond the row", r"min\(HEAD_DIM_V, head_dim_v - first\)", "HEAD_DIM_V"
    ),
    Semantic(
        "attention/column_block.cuh",
        "one CTA for two rows",
        r"cta_idx = grid_idx / COLUMN_BLOCKS;",
        "cta_idx = grid_idx;",
    ),
    Semantic("attention/column_block.cuh", "lse from every CTA", r"COLUMN_BLOCKS == 1 \|\| first == 0", "true"),
    Semantic("attention_forward.cu", "values of the first half", r"params\.v\.seq \+\s*columns\.first", "params.v.seq"),
    Semantic("attention_forward.cu", "both halves into the first", r" \+ out_columns\.first", ""),
    Semantic("attention_forward.cu", "the only stage is not waited for", r"NUM_STAGES == 1\)", "false)"),
    Semantic(
        "attention_forward_fma.cu", "values of the first half", r"params\.v\.seq \+\s*columns\.first", "params.v.seq"
    ),
    Semantic("attention/lane_walk.cuh", "both halves into the first", r"columns\.first \+ out_col", "out_col"),
    Semantic("attention/lane_walk.cuh", "the next tile's values", r"load_v\(this_tile\)", "load_v(tile)"),
    Semantic(
        "attention/lane_walk.cuh",
        "values before keys are done with",
        r"if \(!ONE_PLACE\) load_v\(tile\)",
        "load_v(tile)",
    ),
    Semantic(
        "attention/lane_walk.cuh",
        "keys before values are done with",
        r"(whose place the next k takes\.)\s*__syncthreads\(\);",
        r"\1\n",
    ),
    Semantic(
        "attention/lane_walk.cuh",
        "values that have not landed",
        r"(load_v\(this_tile\);)\s*cp_async_wait<0>\(\);",
        r"\1",
    ),
    Semantic("attention/philox.cuh", "nine rounds", r"round < 10", "round < 9"),
    Semantic("attention/philox.cuh", "words of rows and keys swapped", r"words\.word\[2\] :", "words.word[1] :"),
    Semantic(
        "attention/philox.cuh", "row and key swapped", r"(j / 16 \* 8 \+ j % 8), (i / 16 \* 8 \+ i % 8)", r"\2, \1"
    ),
    Semantic("attention/philox.cuh", "a key that never changes", r"key_low \+= WEYL_LOW;", ";"),
    *_LOGITS,
    Semantic(
        "attention/score_options.cuh",
        "mixed tiles are passed over",
        r"== TILE_HIDDEN\) tile_idx--",
        "!= TILE_OPEN) tile_idx--",
    ),
    Semantic(
        "attention/score_options.cuh", "the mask of the first entry", r"mask\.offset\(batch_idx, ", "mask.offset(0, "
    ),
    Semantic(
        "attention/score_options.cuh",
        "the bias of the first head",
        r"bias\.offset\(batch_idx, head_idx",
        "bias.offset(batch_idx, 0",
    ),
    Semantic("attention_mask_tiles.cu", "stops too early", r"found == \(HIDDEN \| UNCHANGED\)", "found != 0"),
    Semantic(
        "attention_mask_tiles.cu", "a lane answers for all", r"found = __reduce_or_sync\(0xffffffff, found\);", ""
    ),
    Semantic("attention_forward.cu", "drop the mask on the last tiles", r"if \(!in_full\) hide_by_position<.*?\);", ""),
    Semantic("attention/score_tile.cuh", "one lane's part of the sum", r"quad_sum\(row\.sum\)", "row.sum"),
    Semantic(
        "attention/warp_state.cuh", "the sink's term is forgotten", r"correction \+ exp2_approx\(term\)", "correction"
    ),
    Semantic(
        "attention_forward.cu",
        "kept probabilities are not scaled",
        r"out_factor = params\.keep_scale",
        "out_factor = 1.0f",
    ),
    Semantic(
        "attention_forward.cu",
        "dropout repeats in the batch",
        r"block\.batch_idx \* params\.num_heads \+ block\.head_idx,\s*lane",
        "block.head_idx, lane",
    ),
    Semantic("attention_forward.cu", "the stage in use", r"\(stage \+ NUM_STAGES - 1\) % NUM_STAGES", "stage"),
    Semantic(
        "attention/score_tile.cuh",
        "a negative scale counts as 0",
        r"scale_log2 < 0\.0f \? -1\.0f : 0\.0f",
        "0.0f",
    ),
    Semantic("attention_forward.cu", "v is not descaled", r"if \(g_v_descale != nullptr\).*?;", ""),
    Semantic(
        "attention/lane_state.cuh",
        "skip the rescale of the output",
        r"state\.acc_out\[i\]\.scale\(correction\);",
        "",
    ),
    Semantic("attention/lane_state.cuh", "skip the rescale of the sum", r"row\.sum \*= correction;", ";"),
    Semantic(
        "attention/lane_state.cuh",
        "one step short of a butterfly",
        r"lane_mask < LANES_PER_ROW;",
        "lane_mask < LANES_PER_ROW / 2;",
    ),
    Semantic("attention/lane_state.cuh", "the sink's term is forgotten", r"correction \+ exp2\(term\)", "correction"),
    Semantic(
        "attention/warp_products.cuh", "fragments of b swapped", r"frag_b\[0\], frag_b\[1\]", "frag_b[1], frag_b[0]"
    ),
    Semantic(
        "attention/warp_products.cuh",
        "fragments of the neighbor",
        r"frag_b\[0\], frag_b\[1\]",
        "frag_b[2], frag_b[3]",
        1,
    ),
    Semantic(
        "attention/warp_products.cuh", "columns of p and rows of b in other orders", r"\[i % 2 \* 2 \+ i / 2\]", "[i]"
    ),
    Semantic("attention/warp_products.cuh", "scores are not cleared", r"\[i\] = 0\.0f;", "[i] = 1.0f;"),
)
