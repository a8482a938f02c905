"""The ``cuattn-bench`` program. Installed as ``cuattn_cli``; in a checkout, ``python -m cli``."""
