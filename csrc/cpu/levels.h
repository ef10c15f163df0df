// The instruction-set levels this library is compiled for, from the lowest to the highest: VIT_CPU_LEVELS(F) is
// F(baseline) F(v3) ... A backend without kernels for matrix registers defines VIT_VECTOR_LEVELS_ONLY.
//
// The levels above v4 add instructions for bfloat16 and int8 alone. In the cpu backend they are partial: they compile
// what these change (cpu/CMakeLists.txt), and the functions of v4 do the rest.
#pragma once

#if !defined(__x86_64__) || defined(VIT_CPU_BASELINE_ONLY)
#define VIT_CPU_LEVELS(F) F(baseline)
#elif defined(VIT_VECTOR_LEVELS_ONLY)
#define VIT_CPU_LEVELS(F) F(baseline) F(v3) F(v4) F(avx512vnni) F(avx512bf16)
#else
#define VIT_CPU_LEVELS(F) F(baseline) F(v3) F(v4) F(avx512vnni) F(avx512bf16) F(amx)
#endif
