"""Generate text with SmolLM2 on cuattn's paged cache: ``python examples/smollm2_generate.py --help``.

The program is the package examples/smollm2 beside this file, and ``python -m examples.smollm2`` is the same.
"""

import runpy
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout: examples are not installed
runpy.run_module("examples.smollm2", run_name="__main__")
