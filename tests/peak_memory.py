"""Peak memory of a program that a test starts.

``ru_maxrss`` of a new process begins at what its parent had used before, which hides any growth below that; the
high-water mark of the kernel begins anew with the program.
"""

from __future__ import annotations

PEAK_MIB = """
def peak_mib():
    with open("/proc/self/status", encoding="utf-8") as stream:
        return next(int(line.split()[1]) for line in stream if line.startswith("VmHWM")) // 1024
"""
"""Defines ``peak_mib()`` in such a program."""
