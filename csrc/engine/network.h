// What the engine's parts share: the network with its packed weights, and one forward of it. Plain structs, because
// both the code that owns memory and files and the kernels of a backend use them.
//
// Letters as in vit.h: B batch, N tokens, C embed_dim, H heads, D head dimension.
#pragma once

#include "vit.h"

namespace vit::engine {

enum class Precision : int32_t { float32 = 0, bfloat16 = 1, int8 = 2, stored8 = 3, stored4 = 4 };

// Whether a weight is stored in fewer bits: it is multiplied as bfloat16.
inline constexpr bool stored(Precision p) { return p == Precision::stored8 || p == Precision::stored4; }
enum class Pool : int32_t { token = 0, average = 1, none = 2, max = 3, average_max = 4, attention = 5, distilled = 6 };
enum class NormKind : int32_t { layer = 0, rms = 1 };
enum class LastNorm : int32_t { after_pool = 0, first = 1, absent = 2 };
enum class Rotary : int32_t { none = 0, interleaved = 1, half = 2 };
enum class Pixels : int32_t { uint8 = 0, float32 = 1 };

// Sizes and options; the fields of vit_engine_config and what follows from them.
struct Shape {
  Precision precision;  // of activations: int8 means bfloat16 between the quantized products
  Pool pool;
  Activation activation;
  Activation pool_activation;
  NormKind norm;
  LastNorm last_norm;
  Rotary rotary;
  bool dynamic_pad, drop_edge, embed_norm, pre_norm, qk_norm, attn_norm, mlp_norm, gated, pool_prefix, rotary_of_heads;
  bool unpacks;  // some weight is compressed
  int64_t channels, height, width, patch_height, patch_width;
  int64_t prefix, C, depth, H, hidden, classes;
  int64_t pool_heads, pool_hidden;
  double eps;

  int64_t rows() const { return whole(height, patch_height); }  // of the grid of patches
  int64_t columns() const { return whole(width, patch_width); }
  int64_t whole(int64_t size, int64_t patch) const { return (size + (drop_edge ? 0 : patch - 1)) / patch; }
  int64_t patches() const { return rows() * columns(); }
  int64_t patch_values() const { return channels * patch_height * patch_width; }
  int64_t N() const { return prefix + patches(); }
  int64_t D() const { return C / H; }
  int64_t made_by_fc1() const { return gated ? 2 * hidden : hidden; }
  int64_t rotary_tables() const { return rotary_of_heads ? depth * H : 1; }
  int64_t pooled() const { return pool == Pool::distilled ? 2 * C : C; }  // numbers of an image that the head reads
  int64_t first_pooled() const { return pool_prefix ? 0 : prefix; }       // of the tokens
};

// y = x weight^T + bias, weight [N, K] packed for `precision`.
struct Linear {
  int64_t N, K;
  Precision precision;
  char* weight;
  float* bias;    // [N]
  float* scale;   // [N] int8: of a unit of the packed weight; else null
  int32_t* sums;  // [N] int8: zero times the sum of a packed row
  int32_t zero;   // int8: the byte that stands for 0 in its input
};

struct Norm {
  float *weight, *bias;  // of as many values as a row has; no bias: root mean square; neither: there is no such norm
};

struct Block {
  Norm norm1;
  Linear qkv;
  Norm q_norm, k_norm, attn_norm;
  Linear proj;
  Norm norm2;
  Linear fc1;  // with twice the outputs that fc2 reads: gates, then values
  Norm mlp_norm;
  Linear fc2;
};

// Pooling by attention: head h of the query gives token x the score x keys[h], and what it reads is values[h] of the
// mean of the tokens by the softmax of their scores. `rest` is what follows attention in a block.
struct AttentionPool {
  float* keys;     // [pool_heads, C]
  Linear* values;  // [pool_heads] of [C / pool_heads, C]
  Block rest;
};

struct Network {
  Shape shape;
  float *mean, *std;  // [channels], of uint8 pixels
  Linear patch;       // [C, patch_values]
  float* prefix;      // [prefix, C]
  float* positions;   // [patches, C], zeros where there are none
  float* rotary;      // [rotary_tables(), patches, 2 D], sines and cosines
  Norm embed_norm, pre_norm;
  Block* blocks;  // [depth]
  Norm norm;      // the last one, before or after pooling
  AttentionPool pool;
  Linear head;  // [classes, pooled()] float32; N = 0: none
};

// The phases whose times are told apart, and their names.
#define VIT_ENGINE_PHASES(F) \
  F(embed) F(norm) F(quantize) F(qkv) F(place) F(attention) F(proj) F(fc1) F(gate) F(fc2) F(head) F(wait)
#define VIT_PHASE_VALUE(name) name,
#define VIT_PHASE_NAME(name) #name,
enum class Phase { VIT_ENGINE_PHASES(VIT_PHASE_VALUE) };
inline constexpr const char* kPhaseNames[] = {VIT_ENGINE_PHASES(VIT_PHASE_NAME)};
inline constexpr int kPhases = sizeof kPhaseNames / sizeof *kPhaseNames;

// One forward. Outputs that are not wanted are null.
struct Forward {
  const Network* network;
  const void* images;  // [B, channels, height, width] or with channels_last [B, height, width, channels]
  Pixels pixels;
  bool channels_last;
  int64_t B, height, width;
  float* logits;              // [B, classes], [B, N, classes] without pooling; features without a head
  float* features;            // [B, C], [B, N, C] without pooling
  float* const* tokens;       // [depth] of [B, N, C]
  float* const* attention;    // [depth] of [B, H, N]
  char* arena;                // arena_bytes(network, B, threads)
  int64_t* first_not_finite;  // the first image that holds NaN or infinity; B when none does
  double* seconds;            // [kPhases] of the first thread, may be null
  int threads;                // that the arena has room for
};

// Packing of one matrix weight [N, K] float32 into `out`, whose N, K, precision, zero, memory and bias are set.
struct Packing {
  const float* weight;
  const float* scale;  // [N] of rows that are rounded already, may be null (int8 alone uses it)
  const Linear* out;
  int threads;
};

}  // namespace vit::engine
