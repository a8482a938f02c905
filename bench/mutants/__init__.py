"""Mutants of the kernels: small wrong edits of the sources, each of which some test has to notice.

`python -m bench.mutants` makes them, runs the tests of the kernels they belong to, and says which survived.
"""
