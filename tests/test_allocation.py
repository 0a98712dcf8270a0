"""What is freed is taken again without a page fault, where malloc is glibc's, or is returned."""

from __future__ import annotations

import ctypes
import platform
import subprocess
import sys

import pytest

from pipeline.allocation import keep_freed_memory, return_freed_memory

# 20 blocks of 16 MiB in turn, each written through as a layer's activations are
SCRIPT = """
import ctypes, resource, sys
from pipeline.allocation import keep_freed_memory, return_freed_memory

malloc, free = ctypes.CDLL(None).malloc, ctypes.CDLL(None).free
malloc.restype, free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        block = malloc(2**24)
        ctypes.memset(block, 1, 2**24)
        free(block)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

before = faults()
assert keep_freed_memory()
faults()
kept = faults()
return_freed_memory()
print(before, kept, faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="malloc is not glibc's")
def test_blocks_are_taken_again() -> None:
    """In a process of its own: it holds for the rest of a process's life."""
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    before, kept, returned = map(int, done.stdout.split())
    assert before > 100
    assert kept < 10
    assert returned > kept + 5  # the system had it: a fault for each page, huge ones too


def test_another_malloc_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    assert keep_freed_memory() is False
    return_freed_memory()
