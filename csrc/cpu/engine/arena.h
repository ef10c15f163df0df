// The memory of a forward: how many images go through the network at a time, and where their intermediate results lie.
#pragma once

#include "cpu/attention.h"
#include "cpu/engine/compressed.h"
#include "cpu/engine/int8.h"

namespace vit::VIT_ISA {

using namespace engine;

inline constexpr int64_t kRows = kBlockRows;  // ViT's 197 tokens are two pieces of 98 or 99
inline constexpr int64_t kImages = 4;         // of a thread at a time: they share what a layer's weights cost to fetch
inline constexpr int64_t kGroupRows = 2 * kRows;

// Elements from row to row of an operand A whose steps are read in place.
template <class T>
int64_t padded(int64_t K) {
  return round_up(K, Step<T>::kDepth);
}

template <class T>
AttentionFwd attention_of(const Shape& s, int64_t images) {
  AttentionFwd p{};
  p.B = images, p.N = p.L = s.N(), p.H = s.H, p.D = s.D();
  p.q.batch = p.k.batch = p.v.batch = s.N() * 3 * s.C;
  p.q.token = p.k.token = p.v.token = 3 * s.C;
  p.q.head = p.k.head = p.v.head = s.D();
  p.scale = 1.0 / ::sqrt(static_cast<double>(s.D()));
  p.dtype = same<T, float> ? DType::float32 : DType::bfloat16;
  return p;
}

// How many images one thread takes through the network at a time, and of how many the rows go through a block together.
struct Share {
  int64_t images, group;

  Share(const Shape& s, int64_t B, int threads) {
    group = max<int64_t>(kGroupRows / s.N(), 1);
    images = max<int64_t>(min(max(kImages, group), B / threads), 1);
    group = min(group, images);
  }
};

// The arena. Slices belong to a thread while it has images of its own, and all of a part to the threads together.
template <class T>
struct Buffers {
  int64_t slice_tokens, slice_qkv, slice_attended, slice_pooled;
  Barrier* barriers;  // [1 + threads]
  float* tokens;      // [rows, C]
  T* qkv;             // [rows, 3, H, D]
  T* attended;        // [rows, H, D]
  float* pooled;      // [images, pooled()], or a piece of normalised tokens
  char* threads;      // of each thread: the parts below
  int64_t bytes_per_thread, bytes;

  struct Own {
    T* normed;            // [kRows, C]
    T* hidden;            // [kRows, what fc1 makes]
    T* inner;             // [kRows, hidden], where that is not what fc2 reads
    T* patches;           // [kRows, padded patch_values]
    char* panel;          // of a weight, unpacked
    float* row;           // [the wider of C and hidden]
    float* pool;          // of pooling: largest values [C], or scores [pool_heads, N] and means [pool_heads, C]
    T* means;             // [pool_heads, C]
    Quantized quantized;  // [kRows, the wider of C and hidden], where there are int8 layers
    char* scratch;        // of attention
  };

  Buffers(const Shape& s, int64_t B, int threads, char* base) {
    const Share share(s, B, threads);
    const int64_t N = s.N(), together = min<int64_t>(B, threads - 1);  // images that all threads share
    slice_tokens = share.images * N * s.C;
    slice_qkv = share.group * N * 3 * s.C;
    slice_attended = share.group * N * s.C;
    slice_pooled = max(share.images, s.pool == Pool::none ? kRows : 0) * s.pooled();
    Arena arena{base};
    barriers = take<Barrier>(arena, 1 + threads);
    tokens = take<float>(arena, max(threads * slice_tokens, together * N * s.C));
    qkv = take<T>(arena, max(threads * slice_qkv, together * N * 3 * s.C));
    attended = take<T>(arena, max(threads * slice_attended, together * N * s.C));
    pooled = take<float>(arena, max(threads * slice_pooled, together * s.pooled()));
    Arena one{nullptr};
    own(s, one);
    bytes_per_thread = one.used;
    this->threads = arena.take(threads * bytes_per_thread);
    bytes = arena.used;
  }

  static Own own(const Shape& s, Arena& arena) {
    Own own;
    own.normed = take<T>(arena, kRows * s.C);
    own.hidden = take<T>(arena, kRows * max(s.made_by_fc1(), s.pool_hidden));
    own.inner = take<T>(arena, s.gated || s.mlp_norm ? kRows * s.hidden : 0);
    own.patches = take<T>(arena, kRows * padded<T>(s.patch_values()));
    const bool unpacks = s.unpacks || (s.precision != Precision::float32 && !same<T, bf16>);
    const int64_t deepest = round_up(max(max(s.C, s.hidden), max(s.pool_hidden, s.patch_values())), Step<bf16>::kDepth);
    own.panel = arena.take(unpacks ? packed_b_bytes<T>(deepest, kTileColumns<T>) : 0);
    own.row = take<float>(arena, max(s.C, s.hidden));
    const int64_t largest = s.pool == Pool::max || s.pool == Pool::average_max ? s.C : 0;
    own.pool = take<float>(arena, max(largest, s.pool_heads * (s.N() + s.C)));
    own.means = take<T>(arena, s.pool_heads * s.C);
    const int64_t quantized_rows = s.precision == Precision::int8 ? kRows : 0;
    const int64_t widest = quantized_stride(max(s.C, s.hidden));
    own.quantized = {take<uint8_t>(arena, quantized_rows * widest), take<float>(arena, quantized_rows)};
    own.scratch = arena.take(attention_fwd_scratch(attention_of<T>(s, 1)));
    return own;
  }

  template <class E>
  static E* take(Arena& arena, int64_t count) {
    return reinterpret_cast<E*>(arena.take(count * static_cast<int64_t>(sizeof(E))));
  }
};

}  // namespace vit::VIT_ISA
