"""Survivors that are no fault of the tests: file, a pattern for "before => after", and the reason.

Nearly all of them compute the same in another way: no test can tell them from the original.
"""

_ANY_LANE = "after the butterfly every lane holds the sum, so any one of them may write it"
_ANY_THREAD = "every thread of the row holds the same state, so any one of them may write it"
_SPEED = "the same result by another path, which only takes longer"
_LN_2_REST = "moves the result by less than its own rounding: the high part of ln 2 does nearly all of the work"
_LAST_TURN = "a named barrier that keeps arrivals when the CTA ends: nobody waits at it any more"
_ODD_ADDRESS = "no float lies at an odd address"
_AFTER_Q = "the sums take the place of q, which nobody reads after the barrier before the last products"

EXPLAINED: tuple[tuple[str, str, str], ...] = (
    ("online_softmax_state.cu", r"=> if \(place\.thread == 1 ", _ANY_THREAD),
    ("softmax_split.cu", r"=> if \(place\.thread == 1 ", _ANY_THREAD),
    ("online_softmax_state.cu", r"=> others = merge\(g_others", "merging is commutative, bit for bit"),
    (
        "softmax/softmax_output.cuh",
        r"sizeof\(Element\) == 3",
        "a division in place of a product with the reciprocal: both are exact to a 16-bit result",
    ),
    (
        "softmax/softmax_rows.cuh",
        r"col_stride = 1; => ;",
        "rows that are loaded 16 bytes at a time have this stride already: the line tells the compiler so",
    ),
    (
        "softmax/softmax_rows.cuh",
        r"PACK\) <= end\).*PACK\) < end\)",
        _SPEED + ": the last whole pack of a row goes element by element",
    ),
    (
        "softmax/softmax_state.cuh",
        r"Accumulator\(1\)\}; \}$",
        "the sum of an empty state is always rescaled, by e^(-inf) = 0",
    ),
    (
        "softmax/softmax_state.cuh",
        r"=> return row_max == -infinity\(\) \? Accumulator\(1\)",
        "e^(-inf - 1) is the 0 that is wanted as well, and log 0 swallows the 1",
    ),
    (
        "softmax/softmax_state.cuh",
        r"a\.row_max > b\.row_max",
        "states with equal maxima merge to the same bits in either order",
    ),
    (
        "attention_forward_fma.cu",
        r"band\.end\(last_warp_query\) : 1;",
        "a warp without queries: what it computes is not stored",
    ),
    (
        "attention_mask_tiles.cu",
        r"key_idx \+= NUM_WARPS",
        _SPEED + ": lanes that take smaller steps see the same keys, some of them again",
    ),
    ("attention_standard.cu", r"lane_mask = 16 \+ 1;", "steps of 17, 8, 4, 2 and 1 reach every lane too"),
    (
        "common/float8.cuh",
        r"=> const __half2 widened = __hmul2\(__float2half2_rn",
        "a product is commutative, bit for bit",
    ),
    ("attention/online_softmax.cuh", r"=> return fmaf\(max_logit, 0\.69\d*f, fmaf\(max_logit, 1\.90", _LN_2_REST),
    ("attention/online_softmax.cuh", r"e-16, log_sum", _LN_2_REST),
    (
        "attention/query_block.cuh",
        r"first_query <= seqlen_q",
        "no list of work has a block that begins where its sequence ends",
    ),
    (
        "attention/score_options.cuh",
        r"TILE_MIXED = 3",
        "the name of a class: any number that the other two do not have",
    ),
    (
        "common/tiles.cuh",
        r"power_of_two_divisor\(x / 2.*=> return x % 2",
        "how many threads share a row of a copy: " + _SPEED,
    ),
    (
        "attention_standard.cu",
        r"\? Accumulator\(1\) : row_max",
        "e^(-inf - 1) is the 0 that is wanted as well, and log 0 swallows the 1",
    ),
    (
        "common/tiles.cuh",
        r"=> if \(vectors && col \+ CHUNK < num_cols",
        _SPEED + ": the last whole chunk of a row goes element by element",
    ),
    (
        "attention_backward_rows.cu",
        r"lane_idx == 1",
        _ANY_LANE,
    ),
    (
        "attention_backward_sinks.cu",
        r"=> if \(true\)",
        "a row whose head has a finite sink has a finite lse: the condition is for an lse that no forward has returned",
    ),
    (
        "attention_backward_sinks.cu",
        r"lane_mask = WARP_SIZE / 2 \+ 1;",
        "steps of 17, 8, 4, 2 and 1 reach every lane too",
    ),
    (
        "backward/bias_sums.cuh",
        r"=> skip\(position <= begin",
        "a position where the visible tiles begin is one of them, and has returned before",
    ),
    (
        "attention_backward_bias.cu",
        r"i < 2 \+ ROW_TILES;",
        "2 + 2 is 4, and with one row tile the third row is one that nothing reads",
    ),
    ("attention_backward_bias_fma.cu", r"in_full\(term\.k_tile\).*=> if \(true\)", _SPEED),
    (
        "attention_backward_bias_fma.cu",
        r"active = .*; => ;",
        _SPEED + ": the compiler takes the undefined variable for true, and hidden tiles add zeros",
    ),
    ("attention_backward_bias.cu", r"__syncthreads\(\); => ;", _AFTER_Q),
    ("attention_backward_bias_fma.cu", r"__syncthreads\(\); => ;", _AFTER_Q),
    ("backward/dq_sums.cuh", r"first_col > head_dim\)", _SPEED + ": what is computed there is not added"),
    (
        "attention/lane_products.cuh",
        r"=> if \(vectors && col .* < num_cols\)",
        _SPEED + ": the last whole vector of a row goes element by element",
    ),
    (
        "attention/lane_products.cuh",
        r"=> acc\[i\]\.x\[e\]\[x\] = fma\(b\.x\[x\], weights",
        "a product is commutative, bit for bit",
    ),
    ("attention_forward_fma.cu", r"sizeof\(Element\)\) & 14\) == 0", _ODD_ADDRESS),
    ("attention/lane_walk.cuh", r"sizeof\(Element\)\) & 14\) == 0", _ODD_ADDRESS),
    (
        "attention_decode_reduce.cu",
        r"num_rows < 0xffffffffLL",
        _SPEED + ": 2^32 - 1 rows are divided in 64 bits",
    ),
    (
        "decode/cached_keys.cuh",
        r"key >= num_keys.*return \{(1, 0|0, 1), false\}",
        "where a key is that does not exist: nothing is read there",
    ),
    (
        "decode/cached_tiles.cuh",
        r"multiply_pair\(Element\(\), scale, elements",
        "a product is commutative, bit for bit",
    ),
    ("copy_pages.cu", r"UNITS_PER_THREAD = [1-9]", _SPEED + ", or less: how much a thread has under way at once"),
    ("attention_forward_hopper.cu", r"turns\.finish\(\); => ;", _LAST_TURN),
    ("differential_attention_hopper.cu", r"turns\.finish\(\); => ;", _LAST_TURN),
    (
        "differential_attention_hopper.cu",
        r"tma_prefetch_map\(map_[qkv]\); => ;",
        _SPEED + ": the copies fetch their maps themselves",
    ),
    (
        "attention_forward_hopper.cu",
        r"tma_prefetch_map\(map_[qkv]\); => ;",
        _SPEED + ": the copies fetch their maps themselves",
    ),
    (
        "attention_decode.cu",
        r"row\.alibi_slope = 0\.0f; => ;",
        "a variable that is undefined without slopes: the compiler is free to make it 0, and does",
    ),
    (
        "append_kv.cu",
        r"i = lane_idx \* PACK; i < side\.head_dim - 1;",
        "rows that go in runs are whole runs of two elements and more: the last one begins before the last element",
    ),
    ("hopper/turns.cuh", r"^if \(ON && consumer_idx == 0\) take\(\); => ", _LAST_TURN),
    (
        "slot_mapping.cu",
        r"last = layout\.num_sequences - 0;",
        "no token starts at or behind the last start, which is the number of tokens: the search never ends there",
    ),
    (
        "kv/kv_decode.cuh",
        r"NUMBERS = 5, DISTANCE = 1",
        "how far apart the words of a run are: eight numbers of a byte and more are widened by kv/kv_pairs.cuh",
    ),
    (
        "differential_backward_sums.cu",
        r"lane_mask = WARP_SIZE / 2 \+ 1;",
        "steps of 17, 8, 4, 2 and 1 reach every lane too",
    ),
    ("differential_backward_sums.cu", r"lane_idx == 1", _ANY_LANE),
    ("differential_backward_rows.cu", r"lane_idx == 1", _ANY_LANE),
    (
        "dual_chunk_attention.cu",
        r"next_end = older\.end; => ;",
        "the keys behind an older stretch, which are hidden there, are those that the tile before had",
    ),
    (
        "dual_chunk_attention_fma.cu",
        r"first_key \+ BLOCK_N >= \(own",
        _SPEED + ": a tile that is wholly seen is compared with what rows see",
    ),
    (
        "dual_chunk/chunk_block.cuh",
        r"return first > last;",
        _SPEED + ": queries that all stand at the last position are turned to it again",
    ),
    (
        "dual_chunk/chunk_block.cuh",
        r"first_query <= seqlen_q",
        "no list of work has a tile that begins where its sequence ends",
    ),
    (
        "attention/tile_list.cuh",
        r"static_cast<unsigned>\(true \? row",
        "what rows that do not exist see: nothing of them is stored, and behind the list there is room to read it",
    ),
    (
        "attention/key_walk.cuh",
        r"num_queries (\+ 1|- 0);",
        _SPEED + ": bounds of queries behind the last leave fewer tiles out, and call fewer of them full",
    ),
    (
        "linear_attention_backward.cu",
        r"threadIdx\.x <= BLOCK\) smem\.whole",
        "one number too many, in the place of the first of of_z, which is written anew before it is read",
    ),
    (
        "linear/backward_keys.cuh",
        r"row > chunk\.num_tokens \?",
        "the row behind the last key: nobody stores it, and the key that it is multiplied with is 0",
    ),
    (
        "linear/backward_queries.cuh",
        r"params\.q\.seq \+ column\]\) : Real\(1\);",
        "a query that does not exist: it is multiplied with 0, or the sum is that of a channel that nobody stores",
    ),
    (
        "linear/backward_queries.cuh",
        r"factor\[r\] = !exists \? Real\(1\)",
        "the factor of a row that does not exist: what it is multiplied with is 0",
    ),
    (
        "linear/channel_decay.cuh",
        r"d < HEAD_DIM - 1; d \+= MMA_M",
        "steps of 16: the last one begins before it as well",
    ),
    (
        "linear/linear_state.cuh",
        r"lane_idx % 4 != 1\) return;",
        "every lane of a row holds the same factor: any may write it",
    ),
    ("linear/output_tile.cuh", r"float below\[1\]\[2\]\[4\]", "room for another tile of columns, which nobody uses"),
    (
        "differential_attention_hopper.cu",
        r"=> if \(threadIdx\.x == 1\) \{",
        "the barriers are initialised before anybody uses one, by whichever thread of the producing warp",
    ),
    (
        "differential/stream_consumer.cuh",
        r"=> float lambdas\[2\] = \{(0\.0f, 1|1\.0f, 0)\.0f\};",
        "lambda of a query that does not exist: its row is not stored",
    ),
    (
        "hopper/listed_tiles.cuh",
        r"TileBand::HAS_END\) \{ => if \(true\) \{",
        _SPEED + ": a band without bounds takes no tile from the list",
    ),
    (
        "hopper/listed_tiles.cuh",
        r"^__syncwarp\(\); => ;",
        "a stage is full once lane 0 has arrived, which announces the bytes: what lands before is owed until then",
    ),
)
