"""How many CTAs of a kernel fit on one multiprocessor.

From the CUDA C++ Programming Guide, "Technical Specifications per Compute Capability", and the granularities of the
occupancy calculator: registers are handed out to warps in units of 256, shared memory in units of 128 bytes, and each
CTA takes 1 KiB of it for the system.

>>> ctas_per_sm("sm_80", num_threads=128, registers=168, smem_bytes=0)
3
"""

from __future__ import annotations

from cuattn.compile import arch as archs

WARP_SIZE = 32
REGISTERS = 65536
REGISTER_UNIT = 256
SMEM_UNIT = 128
SYSTEM_SMEM_BYTES = 1024

#: Compute capability to (KiB of shared memory, warps, CTAs) of a multiprocessor.
LIMITS = {
    (8, 0): (164, 64, 32),
    (8, 6): (100, 48, 16),
    (8, 7): (164, 48, 16),
    (8, 9): (100, 48, 24),
    (9, 0): (228, 64, 32),
    (10, 0): (228, 64, 32),
    (10, 3): (228, 64, 32),
    (11, 0): (228, 48, 24),
    (12, 0): (100, 48, 24),
    (12, 1): (100, 48, 24),
}


def ctas_per_sm(arch: str, *, num_threads: int, registers: int, smem_bytes: int) -> int:
    """CTAs of so many threads, of so many registers each, and so much shared memory, static and dynamic."""
    smem_kib, max_warps, max_ctas = LIMITS[archs.capability(arch)]
    warps = -(-num_threads // WARP_SIZE)
    warp_registers = -(-registers * WARP_SIZE // REGISTER_UNIT) * REGISTER_UNIT
    by_registers = REGISTERS // max(warp_registers, 1) // warps
    cta_smem = -(-(smem_bytes + SYSTEM_SMEM_BYTES) // SMEM_UNIT) * SMEM_UNIT
    return min(max_ctas, max_warps // warps, by_registers, smem_kib * 1024 // cta_smem)


def fraction(arch: str, ctas: int, num_threads: int) -> float:
    """Resident warps over those that a multiprocessor can hold."""
    return ctas * -(-num_threads // WARP_SIZE) / LIMITS[archs.capability(arch)][1]
