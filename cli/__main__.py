"""``python -m cli`` in a checkout."""

from __future__ import annotations

from .main import main

main(prog_name="python -m cli")
