"""Loading a shared library from bytes that have been read and checked, instead of from a file that may change.

The dynamic loader maps a file, and a mapped file that somebody truncates kills the process (SIGBUS), when it is loaded
or at any later moment. So the bytes are copied into a file without a name, which nobody else can reach; it can be
loaded where the file system of the cache forbids execution, too.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import struct
import tempfile

_HEADER = struct.Struct("<16x2HIQQQI6H")  # ELF64, little-endian: type, machine, ..., tables, their sizes and counts
_SECTION = struct.Struct("<4xI16xQQ")
_SEGMENT = struct.Struct("<8xQ16xQ")
_NO_BYTES = 8  # SHT_NOBITS: a section that takes no room in the file
_spellings = itertools.count(1)
_MAGIC = b"\x7fELF\x02\x01"


def load(image: bytes) -> ctypes.CDLL:
    """Load a shared library. Raises `OSError` when it is none, is cut off, or the loader refuses it."""
    _require_whole(image)
    if not hasattr(os, "memfd_create"):
        return _load_from_file(image)
    descriptor = os.memfd_create("cuattn_host", os.MFD_CLOEXEC)
    try:
        with open(descriptor, "wb", closefd=False) as file:
            file.write(image)
        try:
            # The loader takes a name that it has seen for a library that it has: each name is another spelling.
            return ctypes.CDLL(f"/proc/self/fd/{'./' * next(_spellings)}{descriptor}")
        except OSError:  # no /proc, or a policy against code without a file
            return _load_from_file(image)
    finally:
        os.close(descriptor)  # the mapping stays


def _load_from_file(image: bytes) -> ctypes.CDLL:
    with tempfile.NamedTemporaryFile(prefix="cuattn-", suffix=".so") as file:
        file.write(image)
        file.flush()
        return ctypes.CDLL(file.name)


def _require_whole(image: bytes) -> None:
    """Refuse an ELF file unless all is there that its tables speak of, which the loader trusts."""
    try:
        if image[: len(_MAGIC)] != _MAGIC:
            raise OSError("it is no shared library for a 64-bit machine")
        _, _, _, _, segments, sections, _, _, segment_size, num_segments, section_size, num_sections, _ = (
            _HEADER.unpack_from(image)
        )
        ends = [segments + num_segments * segment_size, sections + num_sections * section_size]
        for number in range(num_segments):
            offset, size = _SEGMENT.unpack_from(image, segments + number * segment_size)
            ends.append(offset + size)
        for number in range(num_sections):
            kind, offset, size = _SECTION.unpack_from(image, sections + number * section_size)
            ends.append(0 if kind == _NO_BYTES else offset + size)
    except struct.error as error:
        raise OSError("it is cut off") from error
    if max(ends) > len(image):
        raise OSError("it is cut off")
