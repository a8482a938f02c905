"""Slips in the kernels of the backward pass."""

from bench.mutants.semantic import Semantic

MMA, FMA = "attention_backward.cu", "attention_backward_fma.cu"
BIAS, BIAS_F32 = "attention_backward_bias.cu", "attention_backward_bias_fma.cu"
ROWS, SINKS = "attention_backward_rows.cu", "attention_backward_sinks.cu"


def _of_both(what: str, pattern: str, replacement: str, occurrence: int = 0) -> tuple[Semantic, ...]:
    """The same edits for the two kernels of dq, dk and dv, which have the same walk."""
    return tuple(Semantic(file, what, pattern, replacement, occurrence) for file in (MMA, FMA))


BACKWARD = (
    Semantic(ROWS, "delta is dropped", r"isnan\(lse\) \? Accumulator\(0\) : sum \*", "Accumulator(0) *"),
    Semantic(ROWS, "delta without its factor", r"sum \* Accumulator\(INVERSE_P_FACTOR\)", "sum"),
    Semantic(ROWS, "dlse is added", r"sum -= g_dlse", "sum += g_dlse"),
    Semantic(ROWS, "dlse is forgotten", r"if \(g_dlse != nullptr\) sum -= g_dlse\[at\];", ""),
    Semantic(ROWS, "one step short of a butterfly", r"= WARP_SIZE / 2; lane_mask", "= WARP_SIZE / 4; lane_mask"),
    Semantic("backward/ready_lse.cuh", "rows that see nothing keep -inf", r"return -lse;", "return lse;"),
    Semantic("backward/ready_lse.cuh", "lse stays natural", r"if \(!base_2\) return lse;", "return lse;"),
    Semantic(
        "backward/ready_lse.cuh", "a large lse is as others are", r"\? shift : Real\(2\) \* lse", "? shift : shift"
    ),
    Semantic("backward/ready_lse.cuh", "a large lse is not doubled", r"Real\(2\) \* lse", "lse"),
    Semantic(
        "backward/ready_lse.cuh",
        "no lse is large",
        r"return fabs\(ready_lse\) >= large_lse<Real>\(\);",
        "return false;",
    ),
    Semantic("backward/backward_tile.cuh", "probabilities have no end", r"exponent > LOG2_P_FACTOR \?", "false ?"),
    Semantic("backward/lane_tile.cuh", "probabilities have no end", r"if \(difference > .*?\) difference = 0;", ""),
    Semantic(MMA, "keys that do not exist", r"!OWN_KEYS \|\| block\.first_row \+ BLOCK_OWN <= num_own", "true"),
    Semantic(MMA, "dv keeps the factor", r"params\.keep_scale \* INVERSE_P_FACTOR", "params.keep_scale"),
    Semantic(ROWS, "a NaN lse keeps its delta", r"isnan\(lse\) \? Accumulator\(0\) : ", ""),
    *_of_both("the group's first head alone", r"OWN_KEYS \? params\.heads_per_kv_head : 1;", "1;"),
    *_of_both(
        "key heads in another order",
        r"OWN_KEYS \? block\.head_idx \* params\.heads_per_kv_head : block\.head_idx;",
        "block.head_idx;",
    ),
    *_of_both("every query head reads its own key head", r"block\.head_idx / params\.heads_per_kv_head;", "0;"),
    *_of_both("the band is not applied", r"hide_by_position<.*?\);", ";"),
    *_of_both("scaled twice", r"acc_qk, params\.scale,", "acc_qk, params.scale * params.scale,"),
    *_of_both("not scaled", r"acc_qk, params\.scale,", "acc_qk, 1,"),
    *_of_both(
        "kept probabilities are not scaled in dv",
        r"(acc_v,\s+)params\.keep_scale( \* \w+)?,(?=[^;]*num_own)",
        r"\1 1\2,",
    ),
    *_of_both("no derivative of the softcap", r"multiply_by_slopes<.*?\);", ""),
    *_of_both("dropout repeats in the batch", r"block\.batch_idx \* params\.num_heads \+ head_idx, ", "head_idx, "),
    *_of_both("hidden tiles are walked over", r"!TILE_CLASSES \|\| tile_class\(at\) != TILE_HIDDEN", "true"),
    *_of_both("mixed tiles are passed over", r"tile_class\(at\) != TILE_HIDDEN", "tile_class(at) == TILE_OPEN"),
    *_of_both("classes of the transposed tile", r"OWN_KEYS \? own_tile : at\.tile_idx\);", "at.tile_idx);"),
    *_of_both("no bias, no mask", r"\badd_bias_and_mask<.*?\);", "{}"),
    *_of_both(
        "the first tile of every other head is skipped",
        r"at\.head\+\+, at\.tile_idx = tiles\.begin",
        "at.head++, at.tile_idx = tiles.begin + 1",
    ),
    *_of_both("terms of the first head of the group", r"at\.head \* params\.lse_head \+ first_row", "first_row"),
    *_of_both("the next sequence's gradients are written", r"num_own - (?:warp_row|first_row)(?=[,)])", "BLOCK_OWN"),
    *_of_both("dq of the wrong strides", r"OWN_KEYS \? params\.dk : params\.dq", "OWN_KEYS ? params.k : params.q"),
    *_of_both(
        "ALiBi of the group's first head",
        r"g_alibi_slopes, block\.batch_idx,\s+head_idx",
        "g_alibi_slopes, block.batch_idx, first_head",
    ),
    Semantic(MMA, "the stage in use", r"\(stage \+ NUM_STAGES - 1\) % NUM_STAGES", "stage"),
    Semantic(MMA, "the terms of another stage", r"smem\.delta\[stage\] \+", "smem.delta[(stage + 1) % NUM_STAGES] +"),
    Semantic(
        MMA,
        "dropped probabilities count in dv",
        r"kept_probabilities\(kept, probabilities\);",
        "memcpy(kept, probabilities, sizeof(kept));",
    ),
    Semantic(MMA, "dv with dS", r"acc_v, kept,", "acc_v, probabilities,"),
    Semantic(MMA, "dS with its own operand", r"acc_qk, ds, s_other_qk", "acc_qk, probabilities, s_other_qk"),
    Semantic(FMA, "dS in the place of P", r"store_weights\(scores,", "store_weights(dp,"),
    Semantic(FMA, "P in the place of dS", r"store_weights\(dp,", "store_weights(scores,"),
    Semantic(FMA, "zero rows are not loaded", r"idx < num_valid \? sizeof\(Element\) : 0", "sizeof(Element)"),
    Semantic("backward/backward_tile.cuh", "delta is dropped", r"-delta\.at\(t, n, i\)\)", "0.0f)"),
    Semantic("backward/backward_tile.cuh", "delta is dropped", r"_FACTOR, -delta\.at\(t, n, i\)\)", "_FACTOR, 0)"),
    Semantic(
        "backward/backward_tile.cuh", "delta is added", r"FACTOR, -delta\.at\(t, n, i\)", "FACTOR, delta.at(t, n, i)"
    ),
    Semantic("backward/backward_tile.cuh", "words of the transposed tile", r"OWN_KEYS \? w % 2 : w / 2", "w / 2"),
    Semantic(
        "backward/backward_tile.cuh", "dropped elements have dP", r"signbit\(p\) \? 0\.0f : keep_scale", "keep_scale"
    ),
    Semantic(
        "backward/backward_tile.cuh", "dropped elements have no dS", r"fabsf\(p\) \* fmaf", "fmaxf(p, 0.0f) * fmaf"
    ),
    Semantic(
        "backward/backward_tile.cuh",
        "kept elements are not scaled",
        r"signbit\(p\) \? 0\.0f : keep_scale",
        "signbit(p) ? 0.0f : 1.0f",
    ),
    Semantic("backward/backward_tile.cuh", "probabilities of hidden keys", r"hidden \? 0\.0f : p;", "p;"),
    Semantic("backward/lane_tile.cuh", "delta is dropped", r"weighted - s_delta\[query\]", "weighted"),
    Semantic(
        "backward/lane_tile.cuh",
        "dropout of row and key swapped",
        r"lane\.query\(\) \+ query, lane\.key\(\) \+ key",
        "lane.key() + key, lane.query() + query",
    ),
    Semantic(
        "backward/lane_tile.cuh",
        "dropped elements have dP",
        r"kept \? dp\[i\]\[j\] \* params\.keep_scale : Element\(0\)",
        "dp[i][j] * params.keep_scale",
    ),
    Semantic(
        "backward/lane_tile.cuh", "kept elements are not scaled", r"dp\[i\]\[j\] \* params\.keep_scale", "dp[i][j]"
    ),
    Semantic("backward/lane_tile.cuh", "dropped elements are in dv", r"kept \? p : Element\(0\)", "p"),
    Semantic(
        "backward/lane_tile.cuh",
        "2^x of natural logits",
        r"difference \* log2_e<Element>\(\)",
        "difference",
    ),
    Semantic("attention/lane_products.cuh", "weights are not cleared", r"weights\[i\]\[j\] = 0;", "weights[i][j] = 1;"),
    Semantic("attention/lane_products.cuh", "a block too many is summed", r"block < num_terms", "block <= num_terms"),
    Semantic(
        "attention/lane_products.cuh",
        "the last block alone",
        r"weights\[i\]\[j\] \+= partial",
        "weights[i][j] = partial",
    ),
    Semantic(
        "attention/lane_products.cuh", "not multiplied by the factor", r"row\.x\[e\]\[x\] \* factor", "row.x[e][x]"
    ),
    Semantic(SINKS, "the sign", r"sum -= static_cast", "sum += static_cast"),
    Semantic(SINKS, "the first entry of the batch alone", r"batch_idx < num_batch\)", "batch_idx < 1)"),
    Semantic(SINKS, "without its weight", r"static_cast<double>\(exp\(difference\)\) \* ", ""),
    Semantic(SINKS, "the first warp's rows alone", r"sum \+= s_sums\[warp\];", ";"),
    Semantic(SINKS, "a row beyond the end of its entry", r"row >= seqlen\)", "row > seqlen)"),
    Semantic(SINKS, "rows that see nothing count", r"if \(lse != negative_infinity<Real>\(\)\)", "if (true)"),
    Semantic(SINKS, "one step short of a butterfly", r"= WARP_SIZE / 2; lane_mask", "= WARP_SIZE / 4; lane_mask"),
    Semantic("attention_backward_bias_sum.cu", "the first part alone", r"part < num_parts;", "part < 1;"),
    Semantic("attention_backward_bias_sum.cu", "every second part", r"part\+\+\)", "part += 2)"),
    Semantic(
        "attention_backward_bias_sum.cu",
        "the parts of the next element",
        r"num_elements \+ element\]",
        "num_elements + num_elements - 1 - element]",
    ),
    Semantic(
        "backward/bias_sums.cuh",
        "a part begins one term early",
        r"/ sums\.num_parts \* part \+ min",
        "/ sums.num_parts * part - (part > 0) + min",
    ),
    Semantic(
        "backward/bias_sums.cuh", "a term is counted by two parts", r"\+ \(part < num_terms % sums\.num_parts\)", "+ 1"
    ),
    Semantic(
        "backward/bias_sums.cuh",
        "the rest of the terms is left out",
        r" \+ min\(static_cast<long long>\(part\), .*?\);",
        ";",
    ),
    Semantic(
        "backward/bias_sums.cuh",
        "tiles of the last key head are kept",
        r"new_keys = !same_batch \|\| .*?;",
        "new_keys = !same_batch || walk.term.k_tile != before.k_tile;",
    ),
    Semantic(
        "backward/bias_sums.cuh",
        "queries of another head are kept",
        r"walk\.term\.head_idx != before\.head_idx \|\| ",
        "",
    ),
    Semantic(
        "backward/bias_sums.cuh",
        "of another entry of the batch too",
        r"walk\.term\.batch_idx == before\.batch_idx",
        "true",
    ),
    Semantic(
        "backward/bias_sums.cuh",
        "the visible tiles of the other side",
        r"range\(band\.transposed\(sequence\.seqlen_q\), BLOCK_M",
        "range(band, BLOCK_M",
    ),
    Semantic(
        "backward/bias_sums.cuh",
        "every part writes to the first",
        r" \+ blockIdx\.x % sums\.num_parts \* sums\.num_elements",
        "",
    ),
    Semantic(
        "backward/bias_sums.cuh",
        "key heads by the query head",
        r"walk\.term\.head_idx / params\.heads_per_kv_head \* strides\.head",
        "walk.term.head_idx * strides.head",
    ),
    *(
        Semantic(file, what, pattern, replacement)
        for file in (BIAS, BIAS_F32)
        for what, pattern, replacement in (
            ("dS of the last term alone", r"\+= ds\[", "= ds["),
            ("rows are not summed", r"if \(keys_summed\) sum_rows\(acc\);", ""),
            ("the first warp's sums alone", r"warp < NUM_WARPS;", "warp < 1;"),
            ("the band is not applied", r"hide_by_position<.*?\);", ";"),
            (
                "dropout repeats in the batch",
                r"term\.batch_idx \* params\.num_heads \+ term\.head_idx",
                "term.head_idx",
            ),
            (
                "rows beyond the sequence count",
                r"exists \? g_lse\[first_row \+ query\] : -negative_infinity<\w+>\(\)",
                "exists ? g_lse[first_row + query] : 0",
            ),
        )
    ),
    Semantic(MMA, "dS of warps with nothing to do is left over", r"if \(ADD_DQ && !active\) smem\.clear\(.*?\);", ""),
    Semantic(MMA, "every head adds to the first", r"head_idx \* params\.dq\.head \+ row_tile", "row_tile"),
    Semantic(MMA, "packed sums begin at the first row", r"packed_row_tile\(block\.q_start, block\.batch_idx\)", "0"),
    Semantic("backward/dq_sums.cuh", "ends before the last keys", r"key < BLOCK_OWN;", "key < BLOCK_OWN - 16;"),
    Semantic("backward/dq_sums.cuh", "queries beyond the end are added", r"row_tile \* MMA_M >= num_queries \|\| ", ""),
    Semantic("backward/dq_sums.cuh", "columns beyond the head dim are added", r"if \(first_col \+ .*?\) break;", ""),
    Semantic("backward/dq_sums.cuh", "dS of another warp", r"\(warp_idx \* ROW_TILES \+ t\)", "t"),
    Semantic("backward/dq_sums.cuh", "not added up", r"atomicAdd\((.*?), acc", r"atomicExch(\1, acc"),
    Semantic("backward/dq_sums.cuh", "dS not transposed", r"ldmatrix_x4_trans\(frag_ds", "ldmatrix_x4(frag_ds"),
    Semantic("attention_backward_dq.cu", "not scaled", r"sum \* params\.scale", "sum"),
    Semantic("attention_backward_dq.cu", "the sums are not cleared", r"g_sums\[i\] = make_float4\(.*?\);", ";"),
    Semantic("attention_backward_dq.cu", "packed sums begin at the first row", r"packed_row_tile\(.*?\)\);", "0);"),
    Semantic("attention_backward_dq.cu", "the next sequence is written", r"row < num_rows && ", ""),
)
