"""What the machine allows: bytes a second from memory, and 8-bit multiplications and additions a second in registers.

Both with all threads at once. The second is a loop of vpdpbusd over registers alone, written here and compiled for this
processor; None where it has no such instruction or there is no compiler.
"""

from __future__ import annotations

import ctypes
import subprocess
import tempfile
import threading
import time
from functools import cache
from pathlib import Path

import torch

SOURCE = """
#include <immintrin.h>
#if defined(__AVX512VNNI__)
using Ints = __m512i;
static Ints dot(Ints sum, Ints a, Ints b) { return _mm512_dpbusd_epi32(sum, a, b); }
static Ints set(int i) { return _mm512_set1_epi32(i); }
#else
using Ints = __m256i;
static Ints dot(Ints sum, Ints a, Ints b) { return _mm256_dpbusd_avx_epi32(sum, a, b); }
static Ints set(int i) { return _mm256_set1_epi32(i); }
#endif
// Twelve sums, more than latency times rate needs; each a variable, as GCC 12 would keep an array of them in memory.
// The empty statement keeps the compiler from folding the loop.
#define EACH(DO) DO(0) DO(1) DO(2) DO(3) DO(4) DO(5) DO(6) DO(7) DO(8) DO(9) DO(10) DO(11)
#define BEGIN(i) Ints sum##i = set(i);
#define ADD(i) sum##i = dot(sum##i, a, b);
#define COUNT(i) __builtin_memcpy(out, &sum##i, sizeof out), total += out[0];
extern "C" double operations(long rounds) {
    Ints a = set(3), b = set(5);
    EACH(BEGIN)
    long round = 0;
    do {
        EACH(ADD)
        asm volatile("" : "+v"(a), "+v"(b));
    } while (++round < rounds);
    int out[sizeof(Ints) / 4];
    long total = 0;
    EACH(COUNT)
    return total == 42 ? 0 : 12.0 * rounds * sizeof(Ints) * 2;
}
"""


def read_bandwidth(size: int = 1 << 28) -> float:
    """Bytes a second: the sum of a large tensor."""
    values = torch.ones(size // 4)
    start = time.perf_counter()
    values.sum()
    return size / (time.perf_counter() - start)


def integer_rate(rounds: int = 100_000_000) -> float | None:
    """Operations a second, a multiplication and an addition counted as two."""
    loop = _loop()
    if loop is None:
        return None
    threads = [threading.Thread(target=loop, args=(rounds,)) for _ in range(torch.get_num_threads())]
    start = time.perf_counter()
    for thread in threads:
        thread.start()  # ctypes lets go of the interpreter's lock
    for thread in threads:
        thread.join()
    return len(threads) * float(loop(1)) * rounds / (time.perf_counter() - start)


@cache
def _loop() -> ctypes._NamedFuncPointer | None:
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "loop.cpp"), Path(folder, "loop.so")
        source.write_text(SOURCE)
        command = ["g++", "-O3", "-march=native", "-shared", "-fPIC", str(source), "-o", str(library)]
        try:
            subprocess.run(command, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            return None
        function = ctypes.CDLL(str(library)).operations
    function.restype, function.argtypes = ctypes.c_double, [ctypes.c_long]
    return function
