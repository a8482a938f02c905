"""Slips about where arrays lie: a stride that is taken for 1, or that has no part in the choice of wide accesses."""

from bench.mutants.semantic import Semantic

LAYOUT = (
    Semantic("attention_decode.cu", "pairs at any address", r"reinterpret_cast<unsigned long long>\(g_out\) \| ", ""),
    Semantic("attention_decode.cu", "pairs at any stride of tokens", r"params\.out\.seq \* sizeof\(Output\) \|\s*", ""),
    Semantic("attention_decode.cu", "pairs at any stride of heads", r" \|\s*params\.out\.head \* sizeof\(Output\)", ""),
    Semantic("attention_decode.cu", "pairs of partial rows of odd length", r"params\.head_dim_v % 2 == 0", "true"),
    Semantic(
        "attention_forward.cu", "vectors at any address", r"reinterpret_cast<unsigned long long>\(g_out\) \| ", ""
    ),
    Semantic("attention_forward.cu", "vectors at any stride", r" \| params\.out\.seq \* sizeof\(Output\)", ""),
    Semantic(
        "attention_mask_tiles.cu", "pieces at any address", r"reinterpret_cast<unsigned long long>\(g_mask\) \| ", ""
    ),
    Semantic("attention_mask_tiles.cu", "pieces at any stride of queries", r"\| mask\.query \|", "|"),
    Semantic("attention_mask_tiles.cu", "pieces of keys apart", r"mask\.key == 1 && ", ""),
    Semantic("append_kv.cu", "positions one behind the other", r"token_idx \* layout\.positions_stride", "token_idx"),
    Semantic("append_kv.cu", "slots one behind the other", r"token_idx \* layout\.slots_stride", "token_idx"),
    Semantic("append_kv.cu", "codes of a head one behind the other", r"item_idx \* side\.item_stride", "item_idx"),
    Semantic("append_kv.cu", "numbers of a head one behind the other", r"g_row\[i \* side\.item_stride\]", "g_row[i]"),
    Semantic("append_kv.cu", "block scales one behind the other", r"BLOCK \* side\.block_stride", "BLOCK"),
    Semantic("rope.cu", "positions of the first entry", r"batch_idx \* layout\.positions_batch_stride \+ ", ""),
    Semantic("rope.cu", "positions one behind the other", r"seq_idx \* layout\.positions_seq_stride", "seq_idx"),
    Semantic("split_qkv.cu", "positions one behind the other", r"token_idx \* layout\.positions_stride", "token_idx"),
    Semantic("copy_pages.cu", "sources one behind the other", r"blockIdx\.x \* layout\.src_stride", "blockIdx.x"),
    Semantic("copy_pages.cu", "targets one behind the other", r"blockIdx\.x \* layout\.dst_stride", "blockIdx.x"),
    Semantic("slot_mapping.cu", "entries one behind the other", r"entry \* layout\.entry_stride", "entry"),
    Semantic("slot_mapping.cu", "lengths one behind the other", r"first \* layout\.lengths_stride", "first"),
)
