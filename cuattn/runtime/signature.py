"""The arguments of a launch, by the names of the kernel's parameters.

A launch gives each argument by name, and the source of the kernel says in which order they go. So two arguments cannot
change places, and a parameter that is new in the kernel is missed by every call that does not give it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import itemgetter
from typing import Any

import numpy as np

from cuattn.errors import DeclarationError, LaunchError
from cuattn.host.tensor_map import TensorMap
from cuattn.runtime.declarations import Parameter, of_kernel
from cuattn.runtime.structs import SCALARS, struct_layout

__all__ = ["Signature"]

_POINTER_BYTES = 8


class Signature:
    """The parameters of the entry ``entry`` of ``kernels/<source_name>.cu``.

    ``constants`` are those that the kernel is compiled with: some of them are types.
    """

    def __init__(self, source_name: str, constants: Mapping[str, Any], entry: str) -> None:
        self.source_name, self.entry = source_name, entry
        self.parameters = of_kernel(source_name).parameters(entry)
        self._types = {name: value for name, value in constants.items() if isinstance(value, str)}
        self._names = tuple(parameter.name for parameter in self.parameters)
        self._ordered = itemgetter(*self._names) if len(self._names) > 1 else None
        self._known_kinds: set[tuple[type, ...]] = set()  # that passed the check

    def bind(self, args: Mapping[str, Any]) -> tuple[Any, ...]:
        """Bind arguments by name; returns them in the order of the parameters.

        Raises `DeclarationError` if a name is missing or is none of the kernel's, and if an argument is not of the
        kind of its parameter: an array or None for a pointer, a NumPy scalar of its type for a number, packed bytes for
        a struct.
        """
        try:
            values = self._ordered(args) if self._ordered else tuple(args[name] for name in self._names)
        except KeyError:
            values = ()
        if len(values) != len(args) or len(values) != len(self._names):
            self._refuse_names(args)
        kinds = tuple(map(type, values))
        if kinds not in self._known_kinds:
            for parameter, value in zip(self.parameters, values, strict=True):
                self._check_kind(parameter, value)
            self._known_kinds.add(kinds)
        return values

    def check_sizes(self, sizes: Sequence[int]) -> None:
        """Raise `DeclarationError` unless the compiled entry has parameters of the sizes that the source says.

        ``sizes`` are those in the PTX, in bytes. So the layout of every struct is compared with the compiler's.
        """
        expected = tuple(self._sizes(parameter) for parameter in self.parameters)
        if len(expected) != len(sizes) or any(size not in of for size, of in zip(sizes, expected, strict=True)):
            raise DeclarationError(
                f"{self.entry}: parameters of {expected} bytes were read from the source, and the compiled entry has "
                f"{tuple(sizes)}"
            )

    def _sizes(self, parameter: Parameter) -> tuple[int, ...]:
        """Bytes of a parameter: of both, where a struct is of float or of double by a rule that C++ alone knows."""
        if parameter.pointer:
            return (_POINTER_BYTES,)
        scalar = SCALARS.get(self._actual(parameter.type))
        if scalar is not None:
            return (np.dtype(scalar[0]).itemsize,)
        arguments: tuple[str | None, ...] = (None,)
        if parameter.argument is not None:
            argument = self._actual(parameter.argument)
            arguments = (argument,) if argument in SCALARS else ("float", "double")
        return tuple(struct_layout(self.source_name, parameter.type, argument).dtype.itemsize for argument in arguments)

    def _actual(self, type_name: str) -> str:
        return self._types.get(type_name, type_name)

    def _check_kind(self, parameter: Parameter, value: Any) -> None:
        scalar = SCALARS.get(self._actual(parameter.type))
        if parameter.pointer:
            fits, needed = value is None or hasattr(value, "__array_interface__") or hasattr(value, "data"), "an array"
            fits = fits and not isinstance(value, np.generic)
        elif scalar is not None:
            fits, needed = type(value) is scalar[0], f"a numpy.{scalar[0].__name__}"
        else:
            fits, needed = isinstance(value, np.void | TensorMap), f"a packed {parameter.type}"
        if not fits:
            raise LaunchError(f"{self.entry}: {parameter.name} is a {type(value).__name__}; {needed} is needed")

    def _refuse_names(self, args: Mapping[str, Any]) -> None:
        unknown = sorted(set(args) - set(self._names))
        missing = [name for name in self._names if name not in args]
        problems = [f"no parameter is called {', '.join(unknown)}"] if unknown else []
        problems += [f"no argument is given for {', '.join(missing)}"] if missing else []
        raise DeclarationError(f"{self.entry}: {'; '.join(problems)}")
