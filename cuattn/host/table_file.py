"""Tables as bytes, for the cache: a plain format without code, every length and index of which is checked on reading.

After a signature come *blocks*: a length in 8 bytes, so many bytes, and zeros up to a multiple of 8. Integers are
little-endian; a list of strings is one block of UTF-8 with NUL between them. Arrays of a table that was read are views
of the bytes, so reading copies nothing and allocates no more than the bytes are long.

The operands of rows are not checked: what they mean is known to the handlers only. They are as trustworthy as the
interpreter beside them in the cache, which is code: see `cuattn.compile.cache` for what is trusted and why.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import numpy as np

from .ptx_declarations import TYPE_BYTES
from .ptx_module import Parameter, Variable
from .table import NUM_SPECIALS, ROW_INTS, Table

_SIGNATURE = b"cuattnT1"
_LENGTH = struct.Struct("<Q")
_NUMBERS = (
    "reg_bytes", "param_bytes", "static_smem_bytes", "dynamic_smem_gap", "param_place", "local_bytes",
    "smem_granule_log2", "max_threads", "entry_registers",
)  # fmt: skip
# What a table may ask for, far above what a kernel can use: a damaged one must not exhaust the memory.
_LIMITS = {"reg_bytes": 1 << 28, "param_bytes": 1 << 16, "static_smem_bytes": 1 << 28, "local_bytes": 1 << 28}
_MAX_VARIABLE_BYTES = 1 << 36
_POINTER = (None, False, True)  # what is known of a parameter
_SLOT_BYTES, _WIDE_SLOT_BYTES = 128, 256


def encode(tables: Mapping[str, Table], target: str) -> bytes:
    """Encode all tables of a module and its target as bytes. Raises `ValueError` for a name with a NUL in it."""
    blocks: list[bytes] = [target.encode(), _strings(list(tables))]
    for table in tables.values():
        blocks += _table_blocks(table)
    parts = [_SIGNATURE]
    for block in blocks:
        parts += (_LENGTH.pack(len(block)), block, bytes(-len(block) % 8))
    return b"".join(parts)


def decode(data: bytes, known_ops: Mapping[str, int]) -> tuple[dict[str, Table], str]:
    """Decode what `encode` made. Raises `ValueError` for anything that it cannot have written."""
    reader = _Reader(data)
    target = reader.text()
    names = reader.strings()
    tables = {name: _read_table(name, reader, known_ops) for name in names}
    reader.expect_end()
    _require(len(tables) == len(names) > 0, "kernel names")
    return tables, target


def _table_blocks(table: Table) -> list[bytes]:
    variables = table.module_variables
    described = [(v.align, v.size, v.extern, -1 if v.data is None else len(v.data)) for v in variables]
    return [
        _integers([getattr(table, name) for name in _NUMBERS]),
        _integers(table.cluster or ()),
        *(np.ascontiguousarray(x, "<i4").tobytes() for x in (table.rows, table.side, table.specials)),
        table.slots_init.tobytes(),
        _integers([offset for offset, _ in table.relocations]),
        _strings([name for _, name in table.relocations]),
        *_repeated(table.op_names),
        *_repeated(table.locations),
        _strings(table.texts),
        _integers(np.array([(p.offset, p.size, _POINTER.index(p.pointer), p.align) for p in table.params], np.int64)),
        _strings([p.name for p in table.params]),
        _strings([p.type for p in table.params]),
        _strings([v.name for v in variables]),
        _strings([v.space for v in variables]),
        _integers(np.array(described, np.int64)),
        b"".join(v.data or b"" for v in variables),
    ]


def _integers(values: Any) -> bytes:
    return np.ascontiguousarray(values, "<i8").tobytes()


def _strings(strings: Sequence[str]) -> bytes:
    """Encode strings, each with a NUL at its end, so that no string and one empty string differ."""
    if any("\0" in string for string in strings):
        raise ValueError("a string with a NUL in it cannot be kept")
    return "".join(f"{string}\0" for string in strings).encode()


def _repeated(strings: Sequence[str]) -> tuple[bytes, bytes]:
    """Return the different strings, and the number of each string among them."""
    numbers: dict[str, int] = {}
    indices = [numbers.setdefault(string, len(numbers)) for string in strings]
    return _strings(list(numbers)), np.array(indices, "<i4").tobytes()


class _Reader:
    """Takes blocks off the front of some bytes."""

    def __init__(self, data: bytes) -> None:
        self._data = memoryview(data)
        _require(data[: len(_SIGNATURE)] == _SIGNATURE, "signature")
        self._at = len(_SIGNATURE)

    def block(self) -> memoryview:
        start = self._at + _LENGTH.size
        _require(start <= len(self._data), "length of a block")
        (length,) = _LENGTH.unpack_from(self._data, self._at)
        _require(length <= len(self._data) - start, "length of a block")
        self._at = start + length + -length % 8
        return self._data[start : start + length]

    def array(self, dtype: str) -> np.ndarray:
        block = self.block()
        _require(len(block) % int(dtype[2:]) == 0, "length of an array")
        return np.frombuffer(block, dtype)

    def integers(self) -> list[int]:
        values: list[int] = self.array("<i8").tolist()
        return values

    def text(self) -> str:
        return str(self.block(), "utf-8")

    def strings(self) -> list[str]:
        strings = self.text().split("\0")
        _require(not strings.pop(), "end of a list of strings")
        return strings

    def repeated(self) -> tuple[list[str], list[str]]:
        """Read different strings, and all strings by their numbers."""
        strings = self.strings()
        indices = self.array("<i4")
        _require(not indices.size or 0 <= indices.min() <= indices.max() < len(strings), "index of a string")
        return strings, np.array(strings, object)[indices].tolist()

    def expect_end(self) -> None:
        _require(self._at == len(self._data), "end")


def _require(condition: object, what: str) -> None:
    if not condition:
        raise ValueError(f"the file is no table: {what}")


def _read_table(name: str, reader: _Reader, known_ops: Mapping[str, int]) -> Table:
    values = reader.integers()
    _require(len(values) == len(_NUMBERS), "numbers")
    numbers = dict(zip(_NUMBERS, values, strict=True))
    cluster = reader.integers()
    rows, side, specials = reader.array("<i4"), reader.array("<i4"), reader.array("<i4")
    slots_init = reader.array("|u1")
    offsets, symbols = reader.integers(), reader.strings()
    ops, op_names = reader.repeated()
    _, locations = reader.repeated()
    texts = reader.strings()
    params = _read_parameters(reader, numbers["param_bytes"])
    variables = _read_variables(reader)

    _require(all(0 <= number <= _LIMITS.get(key, 1 << 31) for key, number in numbers.items()), "range of a number")
    _require(numbers["max_threads"] > 0 and numbers["smem_granule_log2"] <= 2, "range of a number")
    _require(len(cluster) in (0, 3) and all(1 <= extent <= 1 << 10 for extent in cluster), "cluster")
    _require(len(rows) == ROW_INTS * len(op_names) > 0, "number of rows")
    _require(len(op_names) == len(locations) == len(texts), "number of rows")
    _require(known_ops.keys() >= set(ops), "name of a handler")
    rows = rows.reshape(-1, ROW_INTS)
    top = numbers["reg_bytes"]
    _require(rows[:, 1].min() >= -1 and rows[:, 1].max() <= top - _SLOT_BYTES, "guard of a row")
    _require(not side.size or (side.min() >= 0 and side.max() <= top - _SLOT_BYTES), "register of a row")
    _require(len(slots_init) <= top, "size of the constants")
    _require(len(specials) == NUM_SPECIALS, "number of special registers")
    _require(specials.min() >= -1 and specials.max() <= max(-1, len(slots_init) - _SLOT_BYTES), "special register")
    names = {variable.name for variable in variables}
    _require(len(offsets) == len(symbols) and names.issuperset(symbols), "module variable")
    _require(all(0 <= offset <= len(slots_init) - _WIDE_SLOT_BYTES for offset in offsets), "place of an address")
    return Table(
        name=name,
        rows=rows,
        side=side,
        slots_init=slots_init,
        specials=specials,
        relocations=list(zip(offsets, symbols, strict=True)),
        op_names=op_names,
        locations=locations,
        texts=texts,
        params=params,
        cluster=(cluster[0], cluster[1], cluster[2]) if cluster else None,
        module_variables=variables,
        **numbers,
    )


def _read_parameters(reader: _Reader, param_bytes: int) -> list[Parameter]:
    described, names, types = reader.array("<i8"), reader.strings(), reader.strings()
    _require(len(described) == 4 * len(names) and len(names) == len(types), "number of parameters")
    _require({*TYPE_BYTES, "struct"}.issuperset(types), "type of a parameter")
    offsets, sizes, pointers, aligns = described.reshape(-1, 4).T.tolist() if names else ([], [], [], [])
    places = zip(offsets, sizes, strict=True)
    _require(all(at >= 0 and 0 < size <= param_bytes - at for at, size in places), "parameter")
    _require(all(0 <= pointer < len(_POINTER) for pointer in pointers), "parameter")
    return list(map(Parameter, names, offsets, sizes, types, (_POINTER[pointer] for pointer in pointers), aligns))


def _read_variables(reader: _Reader) -> list[Variable]:
    names, spaces = reader.strings(), reader.strings()
    described, data = reader.array("<i8"), reader.block()
    _require(len(names) == len(spaces) and len(described) == 4 * len(names), "number of variables")
    _require({"global", "const"}.issuperset(spaces), "space of a variable")
    aligns, sizes, externs, lengths = described.reshape(-1, 4).T.tolist() if names else ([], [], [], [])
    _require(all(0 <= size <= _MAX_VARIABLE_BYTES for size in sizes), "size of a variable")
    _require(all(-1 <= length <= size for length, size in zip(lengths, sizes, strict=True)), "bytes of a variable")
    ends = list(accumulate(max(0, length) for length in lengths))
    _require((ends[-1] if ends else 0) == len(data), "bytes of the variables")
    initial = [None if n < 0 else bytes(data[end - n : end]) for n, end in zip(lengths, ends, strict=True)]
    return list(map(Variable, names, spaces, aligns, sizes, map(bool, externs), initial))
