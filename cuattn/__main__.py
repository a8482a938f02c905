"""``python -m cuattn``: the ``cuattn-bench`` program, installed or from a checkout."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec

if __name__ == "__main__":
    # Installed, the program is cuattn_cli; in a checkout on PYTHONPATH it is the folder beside this package.
    name = "cuattn_cli" if find_spec("cuattn_cli") else "cli"
    import_module(f"{name}.main").main(prog_name="python -m cuattn")
