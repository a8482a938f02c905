"""One transformer on several ranks in five ways, each with the losses of one rank: `python -m examples.parallel`.

Data, its weights in shards, the columns and rows of matrices, blocks one behind another, or the sequence itself are
divided among ranks; the bytes that each of them sends in a step are counted, and printed beside the formula.
"""
