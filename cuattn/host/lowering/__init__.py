"""Lowering rules: PTX instructions → rows of the table. Importing this package registers every rule."""

from __future__ import annotations

import importlib
import pkgutil

for _module in pkgutil.iter_modules(__path__):
    if _module.name not in ("rules", "context"):
        importlib.import_module(f"{__name__}.{_module.name}")
