// Weights whose panels are made just before their product: those of bfloat16 where its operands are float (Operand),
// and those stored in 8 or 4 bits for their size alone, whose products are those of bfloat16.
//
//   weight[n, k] = scale[n, k / 32] q[n, k],   q in [-128, 127] or [-8, 7]
//
// A panel is unpacked into memory of the thread, where it stays in L2: about 14 instructions for each of its vectors (3
// for one of bfloat16), which then meets some hundred rows. Unpacking at load would cost nothing there, but the process
// would hold larger weights. Scales are bfloat16: 8.5 or 4.5 bits per weight in all.
//
// Panels as pack_b lays them out, one after the other: for each group its scales by column, then its steps, of each
// column one code: two signed bytes or two signed halves of a byte, the first k in the lower one.
#pragma once

#include "cpu/gemm.h"
#include "engine/network.h"

namespace vit::VIT_ISA {

inline constexpr int64_t kGroupDepth = 32;  // weights with a common scale
inline constexpr int64_t kGroupSteps = kGroupDepth / Step<bf16>::kDepth;

template <class Code>
inline constexpr int kCodeBits = 4 * sizeof(Code);  // of one weight: a code holds two

// Calls f(Code{}) with the type of a code.
template <class F>
VIT_INLINE void with_code(engine::Precision precision, const F& f) {
  if (precision == engine::Precision::stored8) return f(uint16_t{});
  f(uint8_t{});
}

// Bytes of one column.
template <class Code>
VIT_INLINE int64_t compressed_column(int64_t K) {
  return ceil_div(K, kGroupDepth) * static_cast<int64_t>(sizeof(bf16)) +
         steps_of<bf16>(K) * static_cast<int64_t>(sizeof(Code));
}

template <class Code>
int64_t compressed_bytes(int64_t K, int64_t N) {
  return compressed_column<Code>(K) * round_up(N, kWordLanes<bf16>);
}

// Codes of one vector of columns as two signed integers each.
template <class Code>
struct Codes {
  typedef Code Vector __attribute__((vector_size(kLanes<float> * sizeof(Code))));
  u32v bits;

  explicit Codes(const char* p) : bits(__builtin_convertvector(load_raw<Vector>(p), u32v)) {}
  VIT_INLINE f32v values(int i) const {  // sign-extended by moving the code to the top
    constexpr int kBits = kCodeBits<Code>;
    return __builtin_convertvector(bit_cast<i32v>(bits << (32 - kBits * (i + 1))) >> (32 - kBits), f32v);
  }
};

// Words of step s of bfloat16, vector v of a panel of `vectors` vectors, as `tile` of gemm_tile.h reads them: as they
// are, or the two values of each as steps of float.
VIT_INLINE void store_steps(u32v words, int64_t s, int64_t v, int64_t vectors, char* out) {
  if constexpr (same<Operand<bf16>, bf16>) {
    memcpy(out + (s * vectors + v) * kVectorBytes, &words, sizeof words);
  } else {
    const u32v first = words << 16, second = words & 0xffff0000u;
    memcpy(out + (2 * s * vectors + v) * kVectorBytes, &first, sizeof first);
    memcpy(out + ((2 * s + 1) * vectors + v) * kVectorBytes, &second, sizeof second);
  }
}

// Panel number `panel` of a weight of bfloat16, widened to float.
inline void widen_panel(const engine::Linear& w, int64_t panel, char* out) {
  const int64_t steps = steps_of<bf16>(w.K), first = panel * kTileColumns<bf16>;
  const int64_t vectors = ceil_div(min<int64_t>(w.N - first, kTileColumns<bf16>), kWordLanes<bf16>);
  const char* from = w.weight + first * steps * static_cast<int64_t>(sizeof(Word<bf16>));
  for (int64_t s = 0; s < steps; ++s)
    for (int64_t v = 0; v < vectors; ++v, from += kVectorBytes) store_steps(load_raw<u32v>(from), s, v, vectors, out);
}

// Panel number `panel` of a compressed weight.
template <class Code>
void unpack_panel(const engine::Linear& w, int64_t panel, char* out) {
  constexpr int64_t lanes = kWordLanes<bf16>;
  const int64_t steps = steps_of<bf16>(w.K), first = panel * kTileColumns<bf16>;
  const int64_t vectors = ceil_div(min<int64_t>(w.N - first, kTileColumns<bf16>), lanes);
  const char* from = w.weight + first * compressed_column<Code>(w.K);
  for (int64_t begin = 0; begin < steps; begin += kGroupSteps) {
    const bf16* scales = reinterpret_cast<const bf16*>(from);
    from += vectors * lanes * static_cast<int64_t>(sizeof(bf16));
    const int64_t end = min(begin + kGroupSteps, steps);
    for (int64_t v = 0; v < vectors; ++v) {
      const f32v scale = load<float>(scales + v * lanes);
      for (int64_t s = begin; s < end; ++s) {
        const Codes<Code> codes(from + ((s - begin) * vectors + v) * lanes * static_cast<int64_t>(sizeof(Code)));
        const u32v words = widen(to_bf16(scale * codes.values(0))) | widen(to_bf16(scale * codes.values(1))) << 16;
        store_steps(words, s, v, vectors, out);
      }
    }
    from += (end - begin) * vectors * lanes * static_cast<int64_t>(sizeof(Code));
  }
}

// One group of a row: its scale and its codes, `stride` apart. The value of largest size gets the code -128 or -8, so
// that the scale has its sign and no code is wasted.
template <class Code>
void compress_group(const float* row, int64_t count, bf16* scale, Code* codes, int64_t stride) {
  constexpr int kBits = kCodeBits<Code>;
  constexpr int32_t least = -(1 << (kBits - 1)), mask = (1 << kBits) - 1;
  float extreme = 0;
  for (int64_t k = 0; k < count; ++k)
    if (::fabsf(row[k]) > ::fabsf(extreme)) extreme = row[k];
  *scale = from_acc<bf16>(extreme / static_cast<float>(least));
  const float inverse = ::fabsf(extreme) > 1e-30f ? 1.0f / to_acc(*scale) : 0.0f;
  const auto code = [&](int64_t k) {
    return k < count ? max(min(static_cast<int32_t>(::lrintf(row[k] * inverse)), -least - 1), least) & mask : 0;
  };
  for (int64_t k = 0; k < count; k += 2) codes[k / 2 * stride] = static_cast<Code>(code(k) | code(k + 1) << kBits);
}

// weight [N, K] float32 into compressed_bytes(K, N) bytes.
template <class Code>
void compress(int threads, const float* weight, int64_t N, int64_t K, char* packed) {
  constexpr int64_t lanes = kWordLanes<bf16>;
  const int64_t steps = steps_of<bf16>(K), column = compressed_column<Code>(K);
  parallel_for(threads, panels_of<bf16>(N), [&](int64_t begin, int64_t end, int) {
    for (int64_t panel = begin; panel < end; ++panel) {
      const int64_t first = panel * kTileColumns<bf16>, columns = min<int64_t>(N - first, kTileColumns<bf16>);
      const int64_t width = round_up(columns, lanes);
      char* to = packed + first * column;
      memset(to, 0, static_cast<size_t>(width * column));
      for (int64_t s = 0; s < steps; s += kGroupSteps) {
        bf16* scales = reinterpret_cast<bf16*>(to);
        Code* codes = reinterpret_cast<Code*>(scales + width);
        const int64_t k = s * Step<bf16>::kDepth;
        for (int64_t j = 0; j < columns; ++j)
          compress_group(weight + (first + j) * K + k, min(kGroupDepth, K - k), scales + j, codes + j, width);
        to = reinterpret_cast<char*>(codes + min(kGroupSteps, steps - s) * width);
      }
    }
  });
}

}  // namespace vit::VIT_ISA
