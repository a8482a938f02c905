"""Slips in the kernels of decoding and of caches."""

from bench.mutants.semantic import Semantic

DECODE = (
    Semantic(
        "attention_decode.cu",
        "the last tile of a split is not masked",
        r"if \(!tiles\.in_full\(tile_idx\)\) mask",
        "if (!tiles.in_full(tile_idx) && tile_idx + 1 < split.end) mask",
    ),
    Semantic(
        "attention_decode.cu",
        "keys are turned by their row in the tile",
        r"static_cast<long long>\(first_key\) \+ row",
        "static_cast<long long>(row)",
    ),
    Semantic(
        "attention_decode.cu",
        "queries are turned by their token",
        r"static_cast<long long>\(query\.token\) \+\s*block\.seqlen_k - block\.seqlen_q",
        "static_cast<long long>(query.token)",
    ),
    Semantic("attention_decode.cu", "queries are turned with every tile", r"tile_idx == split\.begin\)", "true)"),
    Semantic(
        "attention_decode.cu",
        "a sink in every split",
        r"merge_parts\(smem, row, nullptr\)",
        "merge_parts(smem, row, g_sinks == nullptr ? nullptr : g_sinks + query.head)",
    ),
    Semantic(
        "attention_decode.cu",
        "sums of warps with different maxima",
        r"merged\.weights\[part\] \* smem\.parts\.row_sum",
        "smem.parts.row_sum",
    ),
    Semantic("attention_decode.cu", "keys without their scale", r"scale_log2 \*= k_scale;", ""),
    Semantic("attention_decode.cu", "every warp takes the first keys", r"part \* WARP_KEYS \* QK_STRIDE", "0"),
    Semantic("attention_decode.cu", "every warp takes the first values", r"part \* WARP_KEYS \* V_STRIDE", "0"),
    Semantic(
        "attention_decode.cu",
        "partial results without the scale of values",
        r"merged, row, out_factor,\s*columns\.count, params\.head_dim_v % 2 == 0",
        "merged, row, 1.0f, columns.count, params.head_dim_v % 2 == 0",
    ),
    Semantic(
        "attention_decode.cu",
        "partial results of both halves in the first",
        r"params\.head_dim_v \+ columns\.first",
        "params.head_dim_v",
    ),
    Semantic("attention_decode.cu", "both halves into the first", r"(params\.out\.batch\)) \+ columns\.first", r"\1"),
    Semantic("attention_decode.cu", "pairs by the columns of a half", r"params\.head_dim_v % 2 == 0", "true"),
    Semantic(
        "attention_decode_fma.cu",
        "partial results of both halves in the first",
        r"params\.head_dim_v \+ columns\.first",
        "params.head_dim_v",
    ),
    Semantic(
        "cached_keys.cuh", "halves by numbers, not by items", r"first_col / KvFormat<Storage>::PER_ITEM", "first_col"
    ),
    Semantic("cached_keys.cuh", "block scales of the first half", r"return first_col / BLOCK;", "return 0;"),
    Semantic("cached_keys.cuh", "values of the first half", r" \+ first_col / KvFormat<Storage>::PER_ITEM", ""),
    Semantic("attention_decode_fma.cu", "rows are rescaled as the first", r"\(own_factor, r\)", "(own_factor, 0)"),
    Semantic("attention_decode_fma.cu", "the output is not rescaled", r"\s*scale_output\(state, correction\);", ""),
    Semantic("attention_decode_fma.cu", "... between groups of lanes", r"\s*scale_output\(state, correction\);", "", 1),
    Semantic("attention_decode_fma.cu", "the sum of one lane", r"= row_sum\(state\.row\.sum\)", "= state.row.sum"),
    Semantic("attention_decode_fma.cu", "a sink in every split", r" \|\| !block\.is_whole\(\) \?", " ?"),
    Semantic(
        "attention_decode_fma.cu", "scales of keys on values", r"scale_of\(v_rows, place\)", "scale_of(k_rows, place)"
    ),
    Semantic("attention_decode_fma.cu", "warps share no keys", r"keys_begin \+ part \* WARP_KEYS", "keys_begin"),
    Semantic("attention_decode_fma.cu", "a split ends where all keys do", r"min\(split_end, band_end\)", "band_end"),
    Semantic(
        "attention_decode_fma.cu",
        "another key's value",
        r"load_value\(u, place\);",
        "load_value(u, keys.find(first_key));",
    ),
    Semantic(
        "decode_block.cuh",
        "heads of a group in another order",
        r"block\.kv_head_idx \* group \+ head_in_group",
        "head_in_group * kv_heads + block.kv_head_idx",
    ),
    Semantic(
        "decode_block.cuh", "splits of tiles that nobody sees", r"begin = tiles\.begin \+ static", "begin = static"
    ),
    Semantic(
        "decode_block.cuh",
        "splits overlap",
        r"\(block\.split_idx \+ 1\)",
        "min(block.split_idx + 2, block.splits.count)",
    ),
    Semantic(
        "decode_block.cuh",
        "partial results of sequences in one place",
        r"static_cast<long long>\(q_start\) \* params\.num_splits",
        "static_cast<long long>(q_start)",
    ),
    Semantic(
        "decode_block.cuh", "lengths beyond the capacity", r"min\((g_seqlens_k\[.*?\]), params\.seqlen_k\)", r"\1"
    ),
    Semantic(
        "decode_block.cuh",
        "the diagonal ends at the capacity",
        r"\+= block\.seqlen_k - block\.seqlen_q",
        "+= params.seqlen_k - block.seqlen_q",
    ),
    Semantic("cached_keys.cuh", "pages that do not exist are read", r"page >= 0 && page < num_pages", "true"),
    Semantic("cached_keys.cuh", "the first page too many is read", r"page < num_pages", "page <= num_pages"),
    Semantic("cached_keys.cuh", "slots are counted from the first page", r"key - index \* page_size", "key"),
    Semantic("cached_keys.cuh", "the key behind the last one is read", r"key >= num_keys", "key > num_keys"),
    Semantic(
        "cached_tiles.cuh", "no zeros where a row does not exist", r"exists \? num_valid\[i\] : 0", "num_valid[i]"
    ),
    Semantic("cached_tiles.cuh", "values of keys", r"v_rows\.row\(place\), place", "k_rows.row(place), place"),
    Semantic(
        "decode_lanes.cuh", "halves of a sum stay apart", r"x\[i\] = kept \+ __shfl_xor_sync\(.*?\);", "x[i] = kept;"
    ),
    Semantic("decode_lanes.cuh", "the lower lanes own the upper pairs", r"lane & LANE_MASK;", "!(lane & LANE_MASK);"),
    Semantic("kv_decode.cuh", "nibbles exchanged", r"items\[i\]\.bits & 15u", "items[i].bits >> 4"),
    Semantic("kv_decode.cuh", "2^-127 is 0", r"scale == 0 \? 0x00400000 : ", ""),
    Semantic("kv_pairs.cuh", "NaN is 480", r"if \(nans & 0x80808080u\)", "if (false)"),
    Semantic("score_tile.cuh", "the output is not rescaled", r"acc_out\[t\]\[e\]\[2 \* half\] \*= correction;", ""),
    Semantic("score_tile.cuh", "the sum is not rescaled", r"row\.sum \*= correction;", ""),
    Semantic("score_tile.cuh", "a scale of 0 is no scale", r"scale_log2 == 0\.0f \? LOG2_E : ", ""),
    Semantic("rotate_tile.cuh", "rows without padding", r"\(COLS \+ ROW_PADDING<Element>\)", "COLS"),
    Semantic(
        "merge_groups.cuh",
        "the first group alone has the maximum",
        r"first_thread \+ group \* blockDim\.x",
        "first_thread",
    ),
    Semantic("attention_decode_reduce.cu", "no sink", r"acc\.row_sum \+= sink_weight;", ""),
    Semantic(
        "attention_decode_reduce.cu",
        "a sink is not among the maxima",
        r"maximum\(sink, (largest_max\(.*?\))\);",
        r"\1;",
    ),
    Semantic("attention_decode_reduce.cu", "the sequence after", r"\[middle\] <= token", "[middle] < token"),
    Semantic("attention_decode_reduce.cu", "what is finished is merged again", r"row\.splits\.count <= 1 \|\| ", ""),
    Semantic("append_kv.cu", "the largest number of a lane", r"__reduce_max_sync\(~0u, largest\)", "largest"),
    Semantic("append_kv.cu", "values are turned too", r"append_row<false>", "append_row<ROTATE>"),
    Semantic("append_kv.cu", "the slot of all pages", r"slot - page_idx \* layout\.page_size", "slot"),
    Semantic("append_kv.cu", "slots that do not exist", r"slot < 0 \|\| slot >= layout\.num_slots", "slot < 0"),
    Semantic("kv_encode.cuh", "ties are rounded up", r" - 1u \+ is_odd", ""),
    Semantic("kv_encode.cuh", "e4m3 does not saturate", r"fminf\(fabsf\(x\), MAX\)", "fabsf(x)"),
    Semantic("kv_encode.cuh", "-128 in int8", r"fmaxf\(x, -MAX\)", "fmaxf(x, -MAX - 1.0f)"),
    Semantic("kv_encode.cuh", "an infinite scale", r"bits == INFINITY_BITS \? LARGEST_FLOAT_BITS : bits", "bits"),
    Semantic("copy_pages.cu", "the other way round", r"(\*g_from|\* g_from) = g_pages \+ src", r"\1 = g_pages + dst"),
    Semantic("copy_pages.cu", "pages that do not exist", r" \|\| dst >= layout\.num_pages", ""),
    Semantic(
        "slot_mapping.cu", "the sequence before", r"g_starts\[middle\] <= token_idx", "g_starts[middle] < token_idx"
    ),
    Semantic("slot_mapping.cu", "pages below 0", r"page >= 0 && ", ""),
    Semantic("slot_mapping.cu", "pages whose slots are beyond 64 bits", r" && page <= layout\.last_page", ""),
    Semantic("slot_mapping.cu", "a table entry too many", r"entry < layout\.max_pages", "entry <= layout.max_pages"),
)
