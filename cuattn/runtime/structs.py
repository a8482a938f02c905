"""Structs that kernels are passed by value, packed by the names of their fields.

The ``.cu`` or ``.cuh`` file is the one declaration of a struct: its members are read from the source of the kernel that
is launched, laid out as the C compiler lays them out, and given by name. A name that the struct does not have, and one
that is missing, are refused.

>>> layout = struct_layout("attention_forward", "LogitStrides")
>>> layout.dtype.names, layout.dtype.itemsize
(('batch', 'head', 'query', 'key'), 32)
>>> layout.pack(query=64, key=1, batch=0, head=0).tobytes() == np.array([0, 0, 64, 1], np.int64).tobytes()
True
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import numpy as np

from cuattn.errors import DeclarationError
from cuattn.runtime.declarations import Declarations, Member, of_kernel

__all__ = ["StructLayout", "struct_layout"]

#: Scalar types of C: what NumPy calls them, and the letter of the module `struct`.
SCALARS = {
    "char": (np.int8, "b"),
    "unsigned char": (np.uint8, "B"),
    "short": (np.int16, "h"),
    "unsigned short": (np.uint16, "H"),
    "int": (np.int32, "i"),
    "unsigned": (np.uint32, "I"),
    "unsigned int": (np.uint32, "I"),
    "long long": (np.int64, "q"),
    "unsigned long long": (np.uint64, "Q"),
    "float": (np.float32, "f"),
    "double": (np.float64, "d"),
}


class StructLayout:
    """A struct as the C compiler lays it out.

    Attributes
    ----------
    name : str
    dtype : numpy.dtype
        Names, types and offsets of the members, those of a base first; a multiple of the alignment long.
    alignment : int, bytes
    """

    def __init__(self, name: str, dtype: np.dtype[Any], alignment: int) -> None:
        self.name, self.dtype, self.alignment = name, dtype, alignment
        self._num_fields = len(dtype.names or ())
        self._pack = _packer(dtype)

    def pack(self, **fields: Any) -> np.void:
        """Pack the struct, every field given by its name, as a scalar that both executors pass by value.

        A scalar field takes a number; an array, and a struct of scalars, the numbers in their order; a struct that
        holds structs a mapping from names. Raises `DeclarationError` if a name is missing or is none of the struct's,
        or a number does not fit its field.
        """
        try:
            if len(fields) == self._num_fields:
                return self._pack(fields)
            reason: Exception | None = None
        except (KeyError, TypeError, struct.error) as error:
            reason = error
        given, needed = set(fields), set(self.dtype.names or ())
        problems = [f"unknown: {', '.join(sorted(given - needed))}"] if given - needed else []
        problems += [f"missing: {', '.join(sorted(needed - given))}"] if needed - given else []
        raise DeclarationError(f"struct {self.name}: {'; '.join(problems) or reason}") from reason


@cache
def struct_layout(source_name: str, name: str, argument: str | None = None) -> StructLayout:
    """Lay out the struct ``name`` of ``kernels/<source_name>.cu`` and the headers that it includes.

    ``argument`` is the template argument of a struct that has a template parameter. Raises `DeclarationError` if the
    source has no such struct, or one that this package cannot lay out.
    """
    return lay_out(of_kernel(source_name), name, argument)


def lay_out(declarations: Declarations, name: str, argument: str | None = None) -> StructLayout:
    """Lay out the struct ``name`` of a source."""
    declared = declarations.struct(name)
    if (argument is None) != (declared.parameter is None):
        raise DeclarationError(f"struct {name} has template parameter {declared.parameter}; its argument is {argument}")

    def actual(text: str | None) -> str | None:
        return argument if text is not None and text == declared.parameter else text

    names: list[str] = []
    formats: list[Any] = []
    offsets: list[int] = []
    end, alignment = 0, declared.align
    if declared.base is not None:
        # A base without a base of its own and without constructors keeps its padding to itself.
        base = lay_out(declarations, declared.base.type, actual(declared.base.argument))
        assert base.dtype.names is not None and base.dtype.fields is not None
        names += base.dtype.names
        formats += [base.dtype.fields[field][0] for field in base.dtype.names]
        offsets += [base.dtype.fields[field][1] for field in base.dtype.names]
        end, alignment = base.dtype.itemsize, max(alignment, base.alignment)
    for member in declared.members:
        dtype, aligned_to = _member_type(declarations, member, actual)
        if dtype.names and member.length is not None:
            raise DeclarationError(f"struct {name}: {member.name} is an array of structs, which nothing here packs")
        end = -(-end // aligned_to) * aligned_to
        names.append(member.name)
        formats.append(dtype if member.length is None else np.dtype((dtype, (member.length,))))
        offsets.append(end)
        end += dtype.itemsize * (1 if member.length is None else member.length)
        alignment = max(alignment, aligned_to)
    size = -(-end // alignment) * alignment
    spec = {"names": names, "formats": formats, "offsets": offsets, "itemsize": size}
    return StructLayout(name, np.dtype(spec), alignment)  # type: ignore[call-overload]


def _member_type(
    declarations: Declarations, member: Member, actual: Callable[[str | None], str | None]
) -> tuple[np.dtype[Any], int]:
    """Return the type of a member, or of the elements of an array, and its alignment."""
    type_name = actual(member.type)
    if type_name in SCALARS:
        dtype: np.dtype[Any] = np.dtype(SCALARS[type_name][0])
        return dtype, dtype.itemsize
    assert type_name is not None
    layout = lay_out(declarations, type_name, actual(member.argument))
    return layout.dtype, layout.alignment


_LETTERS = {np.dtype(scalar): letter for scalar, letter in SCALARS.values()}


def _packer(dtype: np.dtype[Any]) -> Callable[[dict[str, Any]], np.void]:
    """Make a function from the fields by name to the packed struct.

    It is made from text, as `collections.namedtuple` makes its methods: a loop over the names takes several times as
    long, and every launch of a kernel packs one.
    """
    names = dtype.names or ()
    pack = struct.Struct("=" + _format(dtype)).pack
    values = ", ".join(_value(name, dtype[name]) for name in names)
    scope = {"void": np.void, "pack": pack, "by_name": _by_name, "types": {name: dtype[name] for name in names}}
    function: Callable[[dict[str, Any]], np.void] = eval(f"lambda fields: void(pack({values}))", scope)
    return function


def _value(name: str, dtype: np.dtype[Any]) -> str:
    """Write the expression for the numbers of a field."""
    if dtype.names and any(dtype[field].names for field in dtype.names):
        return f"*by_name(types[{name!r}], fields[{name!r}])"
    return f"{'*' * bool(dtype.names or dtype.shape)}fields[{name!r}]"


def _by_name(dtype: np.dtype[Any], value: Any) -> list[Any]:
    """Return the numbers of a struct that holds structs, whose fields are given by name."""
    if not isinstance(value, Mapping) or value.keys() != set(dtype.names or ()):
        raise TypeError(f"a mapping with the names {', '.join(dtype.names or ())} is needed, not {value!r}")
    numbers: list[Any] = []
    for name in dtype.names or ():
        field = dtype[name]
        if field.names and any(field[inner].names for inner in field.names):
            numbers += _by_name(field, value[name])
        elif field.names or field.shape:
            numbers += value[name]
        else:
            numbers.append(value[name])
    return numbers


def _format(dtype: np.dtype[Any]) -> str:
    """Return the format of `struct` for a type, padding written out."""
    if dtype.subdtype is not None:
        element, shape = dtype.subdtype
        return _format(element) * int(np.prod(shape))
    if dtype.names is None:
        return _LETTERS[dtype]
    assert dtype.fields is not None
    parts, end = [], 0
    for name in dtype.names:
        field, offset = dtype.fields[name][:2]
        parts.append("x" * (offset - end) + _format(field))
        end = offset + field.itemsize
    return "".join(parts) + "x" * (dtype.itemsize - end)
