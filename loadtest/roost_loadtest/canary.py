"""Canary: what the machine gives at this moment, measured beside every figure of a benchmark.

Two numbers, with as many threads as the engines use: GB/s of reading 256 MiB that lies in huge
pages, and GFLOP/s of the fastest multiply-add of the CPU (AVX512-BF16 where it has it, else
fp32). A figure whose canary sank was taken while somebody else used the machine; and the
bandwidth is the roofline of single-stream decoding, which reads every weight once a token.

The program is C, compiled on the spot with the local compiler. Where there is none, numpy copies
and multiplies instead, which reads lower: compare it with itself only.

Not here: judging (bench_engine.py marks disturbed figures).
"""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec

_READ_BYTES = 256 << 20
_PASSES = 8  # about 0.06 s at 35 GB/s

_SOURCE = r"""
#define _GNU_SOURCE
#include <pthread.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#ifdef __x86_64__
#include <immintrin.h>
#endif

enum { ACCUMULATORS = 24, ROUNDS = 400000 };
static uint64_t *memory;
static size_t num_words;
static int num_threads, passes;
static volatile uint64_t sink;

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec + 1e-9 * t.tv_nsec;
}

// Each thread on a core of its own: two that start on one core would read as half a machine.
static void settle(size_t thread) {
#ifdef __linux__
  cpu_set_t allowed, one;
  sched_getaffinity(0, sizeof allowed, &allowed);
  for (int cpu = 0; cpu < CPU_SETSIZE; cpu++) {
    if (!CPU_ISSET(cpu, &allowed) || thread-- > 0) continue;
    CPU_ZERO(&one);
    CPU_SET(cpu, &one);
    sched_setaffinity(0, sizeof one, &one);
    return;
  }
#endif
}

static void *read_share(void *argument) {
  settle((size_t)argument);
  size_t share = num_words / num_threads, begin = (size_t)argument * share;
  uint64_t sum = 0;
  for (int pass = 0; pass < passes; pass++) {
    const uint64_t *p = memory + begin;
    for (size_t i = 0; i < share; i++) sum += p[i];
    sink += sum;
  }
  return 0;
}

#if defined(__AVX512BF16__)
#define FLOPS 64
static const char *kind = "bf16";
static void *multiply(void *argument) {
  settle((size_t)argument);
  __m512 a[ACCUMULATORS];
  __m512bh x, y;
  memset(&x, 1, sizeof x);
  memset(&y, 2, sizeof y);
  for (int i = 0; i < ACCUMULATORS; i++) a[i] = _mm512_set1_ps(i);
  for (int r = 0; r < ROUNDS; r++) {
#pragma GCC unroll 24
    for (int i = 0; i < ACCUMULATORS; i++) a[i] = _mm512_dpbf16_ps(a[i], x, y);
  }
  for (int i = 1; i < ACCUMULATORS; i++) a[0] = _mm512_add_ps(a[0], a[i]);
  sink += (uint64_t)_mm512_cvtss_f32(a[0]);
  return argument;
}
#else
#if defined(__AVX512F__)
#define WIDTH 16
#else
#define WIDTH 8
#endif
#define FLOPS (2 * WIDTH)
static const char *kind = "fp32";
typedef float vector __attribute__((vector_size(4 * WIDTH)));
static void *multiply(void *argument) {
  settle((size_t)argument);
  vector a[12], x = {0}, y = {0};
  x += 0.999f + (size_t)argument * 1e-6f;
  y += 0.001f;
  for (int i = 0; i < 12; i++) a[i] = y * (float)i;
  for (int r = 0; r < 2 * ROUNDS; r++) {
#pragma GCC unroll 12
    for (int i = 0; i < 12; i++) a[i] = a[i] * x + y;
  }
  for (int i = 1; i < 12; i++) a[0] += a[i];
  sink += (uint64_t)a[0][0];
  return argument;
}
#endif

static double timed(void *(*work)(void *)) {
  pthread_t threads[256];
  double started = now();
  for (size_t i = 0; i < (size_t)num_threads; i++) pthread_create(threads + i, 0, work, (void *)i);
  for (int i = 0; i < num_threads; i++) pthread_join(threads[i], 0);
  return now() - started;
}

int main(int argc, char **argv) {
  (void)argc;
  num_threads = atoi(argv[1]);
  size_t bytes = strtoull(argv[2], 0, 10);
  passes = atoi(argv[3]);
  num_words = bytes / 8;
  memory = aligned_alloc(2 << 20, bytes);
#ifdef MADV_HUGEPAGE
  madvise(memory, bytes, MADV_HUGEPAGE);
#endif
  memset(memory, 1, bytes);
  double read_s = timed(read_share), multiply_s = timed(multiply);
  double flops = (double)num_threads * ACCUMULATORS * ROUNDS * FLOPS;
  printf("{\"gb_s\": %.3f, \"gflop_s\": %.2f, \"kind\": \"%s\"}\n",
         1e-9 * passes * bytes / read_s, 1e-9 * flops / multiply_s, kind);
  return 0;
}
"""


class Reading(msgspec.Struct, frozen=True):
    """What the machine gave just now, all threads together."""

    gb_s: float
    gflop_s: float
    kind: str  # what was multiplied: bf16, fp32, or numpy


class Canary:
    """Compiled once in `folder`, then read before each measurement; a reading takes 0.2-0.3 s."""

    def __init__(self, folder: Path, num_threads: int) -> None:
        """Without a compiler that understands the program, numpy is used."""
        self._num_threads = num_threads
        self._program = _compile(folder)

    def read(self) -> Reading:
        """Measure now."""
        if self._program is None:
            return _read_with_numpy(self._num_threads)
        arguments = [str(n) for n in (self._num_threads, _READ_BYTES, _PASSES)]
        output = subprocess.run([self._program, *arguments], capture_output=True, check=True).stdout
        return msgspec.convert(json.loads(output), Reading)


def _compile(folder: Path) -> str | None:
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        return None
    source, program = folder / "canary.c", folder / "canary"
    source.write_text(_SOURCE)
    command = [compiler, "-O3", "-march=native", "-pthread", "-o", str(program), str(source)]
    done = subprocess.run(command, capture_output=True, check=False)
    return str(program) if done.returncode == 0 else None


def _read_with_numpy(num_threads: int) -> Reading:
    """Bytes read and written by copies; multiply-adds of fp32 matrices, BLAS's own threads."""
    import numpy as np  # noqa: PLC0415 - the engine's dependency; a compiler makes it unnecessary

    source = np.ones(_READ_BYTES // 8, dtype=np.float64)
    target = np.zeros_like(source)
    pairs = list(
        zip(np.array_split(source, num_threads), np.array_split(target, num_threads), strict=True)
    )
    with ThreadPoolExecutor(num_threads) as pool:
        started = time.perf_counter()
        for _ in range(_PASSES):
            list(pool.map(lambda pair: np.copyto(pair[1], pair[0]), pairs))
        copy_s = time.perf_counter() - started
    matrix = np.ones((1024, 1024), dtype=np.float32)
    started = time.perf_counter()
    for _ in range(_PASSES):
        matrix @ matrix
    multiply_s = time.perf_counter() - started
    return Reading(
        gb_s=2e-9 * _PASSES * _READ_BYTES / copy_s,
        gflop_s=2e-9 * _PASSES * 1024**3 / multiply_s,
        kind="numpy",
    )
