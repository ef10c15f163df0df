"""How many multiply-adds per second the CPU can do: the yardstick for matrix kernels.

Loops of independent multiply-adds between registers, compiled here with the system's C++ compiler. Without one, or
on another architecture than x86-64, there is no figure, and `vit bench` says so.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
from pathlib import Path

# Accumulators: 4 to 6 cycles of latency times two instructions a cycle need 12, vdpbf16ps on Zen 5 needs more.
SOURCE = r"""
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

#define R12(f) f(0) f(1) f(2) f(3) f(4) f(5) f(6) f(7) f(8) f(9) f(10) f(11)
#define R24(f) R12(f) f(12) f(13) f(14) f(15) f(16) f(17) f(18) f(19) f(20) f(21) f(22) f(23)
#define ZERO_YMM(i) "vxorps %%ymm" #i ", %%ymm" #i ", %%ymm" #i "\n"
#define ZERO_ZMM(i) "vpxord %%zmm" #i ", %%zmm" #i ", %%zmm" #i "\n"
#define SSE(i) "mulps %%xmm14, %%xmm" #i "\n"
#define YMM(i) "vfmadd231ps %%ymm14, %%ymm15, %%ymm" #i "\n"
#define ZMM(i) "vfmadd231ps %%zmm24, %%zmm25, %%zmm" #i "\n"
#define DOT(i) "vdpbf16ps %%zmm24, %%zmm25, %%zmm" #i "\n"
#define BYTES(i) "vpdpbusd %%zmm24, %%zmm25, %%zmm" #i "\n"
#define LOW "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11", "xmm12", \
            "xmm13", "xmm14", "xmm15"
#define HIGH LOW, "xmm16", "xmm17", "xmm18", "xmm19", "xmm20", "xmm21", "xmm22", "xmm23", "xmm24", "xmm25"
#define KERNEL(name, isa, zero, body, ...) \
  __attribute__((target(isa))) static void name(long rounds) { \
    asm volatile(zero "1:\n" body "dec %0\njnz 1b\n" : "+r"(rounds) : : "cc", __VA_ARGS__); \
  }
KERNEL(sse, "sse2", "xorps %%xmm14, %%xmm14\n", R12(SSE), LOW)
KERNEL(ymm, "avx2,fma", R12(ZERO_YMM) ZERO_YMM(14) ZERO_YMM(15), R12(YMM), LOW)
KERNEL(zmm, "avx512f", R24(ZERO_ZMM) ZERO_ZMM(24) ZERO_ZMM(25), R24(ZMM), HIGH)
KERNEL(dot, "avx512f", R24(ZERO_ZMM) ZERO_ZMM(24) ZERO_ZMM(25), R24(DOT), HIGH)
KERNEL(bytes, "avx512f", R24(ZERO_ZMM) ZERO_ZMM(24) ZERO_ZMM(25), R24(BYTES), HIGH)

#if defined(__linux__) && __GNUC__ >= 11
#define HAS_AMX 1
#include <sys/syscall.h>
#include <unistd.h>
struct alignas(64) Shape {  // eight registers of 16 rows of 64 bytes
  unsigned char palette = 1, start = 0, reserved[14] = {};
  unsigned short row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  unsigned char rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
#define AMX(name, dot) \
  static void name(long rounds) { \
    Shape shape; \
    asm volatile("ldtilecfg %1\n1:\n" dot " %%tmm7, %%tmm6, %%tmm0\n" dot " %%tmm7, %%tmm6, %%tmm1\n" \
                 dot " %%tmm7, %%tmm6, %%tmm2\n" dot " %%tmm7, %%tmm6, %%tmm3\ndec %0\njnz 1b\ntilerelease\n" \
                 : "+r"(rounds) : "m"(shape) : "cc"); \
  }
AMX(amx_bf16, "tdpbf16ps")
AMX(amx_int8, "tdpbusd")
static bool has_amx() {
  return __builtin_cpu_supports("amx-bf16") && __builtin_cpu_supports("amx-int8") &&
         syscall(SYS_arch_prctl, 0x1023, 18) == 0;
}
#endif

static double gflops(void (*kernel)(long), double flops_per_round, int threads) {
  const long rounds = 2000000;
  double best = 0;
  for (int repeat = 0; repeat < 20; ++repeat) {
    auto begin = std::chrono::steady_clock::now();
    std::vector<std::thread> pool;
    for (int t = 0; t < threads; ++t) pool.emplace_back(kernel, rounds);
    for (auto& t : pool) t.join();
    std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - begin;
    double rate = threads * rounds * flops_per_round / seconds.count() * 1e-9;
    if (rate > best) best = rate;
  }
  return best;
}

int main(int, char** argv) {
  int threads = std::atoi(argv[1]);
  bool wide = __builtin_cpu_supports("avx512f"), fma = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  // Without FMA a multiplication and an addition issue side by side: the product alone runs at half the peak.
  double fp32 = wide ? gflops(zmm, 24 * 32, threads) : fma ? gflops(ymm, 12 * 16, threads)
                                                           : gflops(sse, 12 * 8, threads);
  double bf16 = __builtin_cpu_supports("avx512bf16") ? gflops(dot, 24 * 64, threads) : 0;
  if (bf16 < fp32) bf16 = fp32;  // widened: Intel's cores start a vdpbf16ps every other cycle only
  double int8 = __builtin_cpu_supports("avx512vnni") ? gflops(bytes, 24 * 128, threads) : 0;
#ifdef HAS_AMX
  if (has_amx()) {
    bf16 = gflops(amx_bf16, 4 * 16 * 16 * 64, threads);
    int8 = gflops(amx_int8, 4 * 16 * 16 * 128, threads);
  }
#endif
  std::printf("{\"float32\": %.1f, \"bfloat16\": %.1f", fp32, bf16);
  if (int8 > 0) std::printf(", \"int8\": %.1f", int8);
  std::printf("}\n");
}
"""


def cpu_peak(threads: int) -> dict[str, float] | None:
    """GFLOP/s of register-only multiply-adds with `threads` threads, per dtype; None without a C++ compiler."""
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        source, program = Path(folder, "peak.cpp"), Path(folder, "peak")
        source.write_text(SOURCE, encoding="utf-8")
        build = [compiler, "-std=c++17", "-O2", "-pthread", str(source), "-o", str(program)]
        if subprocess.run(build, capture_output=True).returncode:
            return None
        done = subprocess.run([str(program), str(threads)], capture_output=True, text=True)
        return json.loads(done.stdout) if done.returncode == 0 else None
