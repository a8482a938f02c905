"""Calls whose arguments are replaced by something else: a right result, or a typed error that names the argument.

python -m bench.stress.bad_inputs --count 7500 --seed 1
"""
