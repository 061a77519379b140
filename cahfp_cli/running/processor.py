"""The CPU that this runs on, as the operating system tells."""

import os
import platform
from pathlib import Path

X86 = ("x86_64", "amd64", "i386", "i686")
VNNI = frozenset({"avx512_vnni", "avx_vnni"})
INSTRUCTIONS = {
    "AVX2": frozenset({"avx2"}),
    "AVX-512": frozenset({"avx512f"}),
    "VNNI": VNNI,
    "bfloat16": frozenset({"avx512_bf16", "bf16"}),
    "NEON": frozenset({"asimd", "neon"}),
    "dot products": frozenset({"asimddp"}),
}
"""What speeds networks up, by flags of which one is enough."""
CPUINFO = Path("/proc/cpuinfo")


def processor() -> str:
    """The CPU's name, or at least its architecture."""
    for line in lines():
        if line.lower().startswith(("model name", "hardware")):
            return line.partition(":")[2].strip() or platform.machine()
    return platform.processor() or platform.machine()


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def is_x86() -> bool:
    return platform.machine().lower() in X86


def has_vnni() -> bool:
    """Whether an x86 CPU has AVX512-VNNI or AVX-VNNI, as Linux tells; elsewhere no is assumed, which costs one bit of
    the weights and never overflows."""
    return bool(VNNI & flags())


def instructions() -> tuple[str, ...]:
    """Those of `INSTRUCTIONS` that Linux tells of; none on other systems."""
    found = flags()
    return tuple(name for name, any_of in INSTRUCTIONS.items() if any_of & found)


def flags() -> frozenset[str]:
    """Flags of the CPU; on a machine with unlike cores, all that one of them has."""
    return frozenset(
        flag for line in lines() if line.startswith(("flags", "Features")) for flag in line.partition(":")[2].split()
    )


def lines() -> list[str]:
    try:
        return CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
