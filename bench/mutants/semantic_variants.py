"""Slips in differential, dual-chunk and block-sparse attention."""

from bench.mutants.semantic import Semantic

_PAIR, _NORM = "differential/differential_params.cuh", "differential/row_norm.cuh"
_BOTH = ("differential_attention.cu", "differential_attention_fma.cu")
_FINISH = "differential/finish_row.cuh"
_ROWS = "differential_backward_rows.cu"
DIFFERENTIAL = (
    *(Semantic(file, "lambda adds", r"\(-lambda, second", "(lambda, second") for file in _BOTH[:1]),
    *(Semantic(file, "lambda adds", r"\(-lambda, s_second", "(lambda, s_second") for file in _BOTH[1:]),
    *(Semantic(file, "the keys of the first stream", r"g_k \+ s \* params\.k_stream", "g_k") for file in _BOTH),
    *(Semantic(file, "the queries of the first stream", r"g_q \+ s \* params\.q_stream", "g_q") for file in _BOTH),
    *(
        Semantic(
            file,
            "the mean over the bucket",
            r"norm\(sum_of_squares, params\.head_dim_v",
            "norm(sum_of_squares, HEAD_DIM_V",
        )
        for file in (_FINISH, _BOTH[1])
    ),
    *(
        Semantic(file, "the result is not scaled", r"factor = params\.output_scale", "factor = 1")
        for file in (_FINISH, _BOTH[1])
    ),
    *(
        Semantic(file, "both streams drop alike", r"own\.head\(block\.head_idx\)\);", "2 * block.head_idx);")
        for file in _BOTH
    ),
    *(
        Semantic(file, "both outputs into the first", r"own\.stream == 0 \? g_out1 : g_out2", "g_out1")
        for file in _BOTH
    ),
    Semantic(_BOTH[0], "kept probabilities are not scaled", r"params\.keep_scale \* INVERSE", "INVERSE"),
    Semantic(_BOTH[1], "kept probabilities are not scaled", r" \* params\.keep_scale\)", ")"),
    Semantic(_BOTH[0], "a key tile for both", r"SHARED_KEYS \? 0 : own\.stream", "0"),
    Semantic(_BOTH[1], "a key tile for both", r"SHARED_KEYS \? 0 : stream \* K_SIZE", "0"),
    Semantic(_BOTH[0], "the rows of lse side by side", r"own\.head\(out_block\.head_idx\)", "out_block.head_idx"),
    Semantic(
        _BOTH[1], "the rows of lse side by side", r"own\.head\(block\.head_idx\) \* params", "block.head_idx * params"
    ),
    Semantic(_PAIR, "heads of a pair lie apart", r"2 \* pair \+ stream", "pair + stream"),
    Semantic(_PAIR, "one bias for both", r"g_bias \+= stream \* params\.bias_stream;", ";"),
    Semantic(_PAIR, "one mask for both", r"g_mask \+= stream \* params\.mask_stream;", ";"),
    Semantic(_PAIR, "one slope for both", r" \+\s*stream \* params\.alibi_stream", ""),
    Semantic(_PAIR, "hidden from one is hidden from both", r"TILE_HIDDEN \|\| g_class", "TILE_HIDDEN && g_class"),
    Semantic(
        _PAIR,
        "the other stream on the wrong side",
        r"stream == 0 \? params\.class_stream",
        "stream != 0 ? params.class_stream",
    ),
    Semantic(_PAIR, "one lambda for all heads", r" \+ pair \* params\.lambda\.head", ""),
    Semantic(_PAIR, "one lambda for all sequences", r"batch_idx \* params\.lambda\.batch \+ ", ""),
    Semantic(_NORM, "eps beside a square that was scaled", r"eps \* factor \* factor", "eps"),
    Semantic(_NORM, "no eps", r"num_cols \+ eps;", "num_cols;"),
    Semantic(_NORM, "a row of zeros", r"square == 0 \? Real\(0\) : ", ""),
    Semantic(_NORM, "squares beyond every number", r" && square <= HIGH", ""),
    Semantic(_NORM, "squares that vanish", r"square >= LOW && ", ""),
    Semantic(_ROWS, "the norm passes gradients on", r"fma\(-mean, unit\(i\), gradient\[i\]\)", "gradient[i]"),
    Semantic(_ROWS, "the mean over the bucket", r"\}\) / num_cols;", "}) / HEAD_DIM_V;"),
    Semantic(_ROWS, "the gradient of lambda turned around", r"dlambda = -row_sum", "dlambda = row_sum"),
    Semantic(_ROWS, "the second gradient without lambda", r"-lambda \* gradient", "-gradient"),
    Semantic(_ROWS, "dweight of the scaled gradient", r"gradient\[i\] \*= weight\[i\];", ";"),
    Semantic(_ROWS, "gradients are not scaled", r"\) \* params\.output_scale", ")"),
    Semantic(_ROWS, "rows without keys", r"isnan\(lse\) \? Accumulator\(0\) : delta", "delta"),
    Semantic(_ROWS, "the last run of tokens", r" \+ \(part < params\.num_tokens % params\.num_parts\)", ""),
)

_CHUNK = "dual_chunk/chunk_block.cuh"
_CHUNKED = ("dual_chunk_attention.cu", "dual_chunk_attention_fma.cu")
DUAL_CHUNK = (
    Semantic(_CHUNK, "the chunk before is turned like the own", r"first \+= params\.chunk_length;", ";"),
    Semantic(_CHUNK, "no last position", r"min\(first \+ row, last\)", "first + row"),
    Semantic(
        _CHUNK, "older chunks are turned like the one before", r"else if \(stretch\.end < own_key\)", "else if (false)"
    ),
    Semantic(_CHUNK, "all older keys as those of the chunk before", r"max\(0, begin - chunk_length\) : 0", "0 : 0"),
    Semantic(_CHUNK, "positions below 0", r"if \(first_position >= 0\)", "if (true)"),
    Semantic(_CHUNK, "the key on the diagonal", r"\(block\.end_query - 1\) \+ 1\)", "(block.end_query - 1))"),
    Semantic(_CHUNK, "a tile of two chunks", r"min\(end, first \+ BLOCK_M\)", "first + BLOCK_M"),
    Semantic(_CHUNK, "rows of the last chunk", r" \+ tiles_of\(rows - chunks \* chunk_length\)", ""),
    Semantic(
        _CHUNK, "heads of a group in another order", r"head_idx / params\.heads_per", "head_idx % params.heads_per"
    ),
    Semantic(
        _CHUNKED[0], "queries are never turned again", r"all_at_last = positions\.all_at_last\(\)", "all_at_last = true"
    ),
    Semantic(
        _CHUNKED[0],
        "the factor of logits, not of lse",
        r"finish_rows\(state, params\.scale \* logit_factor",
        "finish_rows(state, params.scale",
    ),
    Semantic(_CHUNKED[0], "the first chunk by steps", r"block\.chunk != 0 && params", "params"),
    Semantic(_CHUNKED[0], "the first tile of older keys", r"next_end = older\.end;", ";"),
    Semantic(_CHUNKED[0], "both halves into the first", r" \+ out_columns\.first", ""),
    *(
        Semantic(file, "values of the first half", r"params\.v\.seq \+\s*columns\.first", "params.v.seq")
        for file in _CHUNKED
    ),
    *(
        Semantic(
            file,
            "older keys under the diagonal's mask",
            r"Bounds<false>\{0, own \? (.*?) : first_end\}",
            r"Bounds<false>{0, \1}",
        )
        for file in _CHUNKED
    ),
    *(
        Semantic(file, "one factor for all sequences", r"g_logit_factors\[block\.batch_idx\]", "g_logit_factors[0]")
        for file in _CHUNKED
    ),
    *(
        Semantic(file, "rows of a chunk that ends early", r"block\.end_query - first_query", "BLOCK_M")
        for file in _CHUNKED
    ),
    Semantic(_CHUNKED[1], "softmax before the scale", r"params, scale, no_slopes", "params, params.scale, no_slopes"),
)

_LIST, _KEYS, _OWNED = "attention/tile_list.cuh", "attention/key_walk.cuh", "backward/listed_walk.cuh"
SPARSE = (
    Semantic(_LIST, "the list of the first head", r"\+ head_idx \* head_stride\]", "]"),
    Semantic(_LIST, "the list of the first entry", r"min\(batch_idx, g_list\[0\] - 1\)", "0"),
    Semantic(
        _LIST,
        "a gathered tile in one piece",
        r"tile\.is_gathered\(\) \? g_list\[tile\.details \+ slot\] \* GRANULE : ",
        "",
    ),
    Semantic(_LIST, "granules are taken for words", r"\(tile\.is_gathered\(\) \? GRANULES : 0\)", "0"),
    Semantic(_LIST, "the tile that reaches into the band", r"first_column \+ 1\) - 2\)", "first_column + 1))"),
    Semantic(_LIST, "gathered tiles reach no farther than others", r"UNBOUNDED - tile\.first\(\)", "BLOCK_OTHER"),
    Semantic(_LIST, "a full tile by its first granule", r"column\(tile, GRANULES - 1\)", "column(tile, 0)"),
    Semantic(_LIST, "words from the first row of all", r"row / rows_per_word - first_word", "row / rows_per_word"),
    Semantic(_LIST, "rows that do not exist have a word", r"row < num_rows \? ", "true ? "),
    Semantic(
        _LIST,
        "columns as if they followed each other",
        r"column / GRANULE \+ lane_column / GRANULE",
        "lane_column / GRANULE",
    ),
    Semantic(_LIST, "mixed tiles are wholly seen", r"if \(!tile\.is_mixed\(\)\) return;", "return;"),
    Semantic(
        _KEYS,
        "full tiles by the wrong query",
        r"full_begin = band\.begin\(last_query\)",
        "full_begin = band.begin(block.first_query)",
    ),
    Semantic(
        _KEYS,
        "full tiles by the wrong query",
        r"full_end = band\.end\(block\.first_query\)",
        "full_end = band.end(last_query)",
    ),
    Semantic(_KEYS, "bounds are not asked", r"BOUNDED && !list\.inside", "false && !list.inside"),
    Semantic(
        _KEYS, "the list of another block of queries", r"block\.first_query / BLOCK_M\)", "block.first_query / BLOCK_N)"
    ),
    Semantic(_KEYS, "positions from the first tile", r"lane\.other - at\.entry\.first\(\)", "lane.other"),
    Semantic(_OWNED, "the list of the first head", r"list\.begin\(first_head \+ at\.head\)", "list.begin(first_head)"),
    Semantic(_OWNED, "the end of the first head", r"list\.end\(first_head \+ at\.head\)", "list.end(first_head)"),
    Semantic(
        _OWNED,
        "full tiles by the wrong row",
        r"band\.begin\(last_row\), band\.end\(block\.first_row\)",
        "band.begin(block.first_row), band.end(last_row)",
    ),
    Semantic(
        _OWNED,
        "slopes from the diagonal of the batch",
        r"\(place, block\.diagonal_offset",
        "(place, params.diagonal_offset",
    ),
    Semantic(_OWNED, "one tile of a head", r"at\.at \+= 2;", "at.at = at.end;"),
)
