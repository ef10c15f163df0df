#include "engine/parts.h"

#include <algorithm>
#include <iterator>

#include "engine/executor.h"

namespace vit::engine {
namespace {

// The dtypes of packed weights, in the order of Precision; a code of two compressed weights is one integer.
const char* const kDtypes[] = {"F32", "BF16", "I8", "U16", "U8"};

const char* dtype_of(Precision precision) { return kDtypes[static_cast<int>(precision)]; }

int64_t bytes_of(const Part& part) {
  return part.matrix ? packed_bytes(*part.matrix) : part.count * static_cast<int64_t>(sizeof(float));
}

int64_t aligned(int64_t bytes) { return (bytes + 63) / 64 * 64; }

// What activations have made is at least -0.17 (silu: -0.28), so nearly all of the range belongs to positive values.
// With 32 the row's step is that of its largest value from 1.2 on (1.9), and smaller than that of a range in the middle
// from 0.7 on (1.1). Products with gates, and what a norm has made, have both signs.
int32_t zero_of(const std::string& name, const Shape& s) {
  const std::string after_activation = ".mlp.fc2";
  const bool low = name.size() > after_activation.size() &&
                   name.compare(name.size() - after_activation.size(), std::string::npos, after_activation) == 0;
  return low && !s.gated && !s.mlp_norm ? 32 : 128;
}

}  // namespace

bool in_block(const std::string& name) { return name.compare(0, 7, "blocks.") == 0; }

Precision precision_of_end(const std::string& name, Precision engine) {
  if (name == "head") return Precision::float32;
  return engine == Precision::int8 ? Precision::bfloat16 : engine;
}

bool allowed(const std::string& name, Precision layer, Precision engine) {
  if (!in_block(name)) return layer == precision_of_end(name, engine);
  if (engine == Precision::bfloat16 && stored(layer)) return true;
  return layer == engine || (engine == Precision::int8 && layer == Precision::bfloat16);
}

bool precision_of_dtype(const std::string& dtype, Precision& precision) {
  const auto* const found = std::find(std::begin(kDtypes), std::end(kDtypes), dtype);
  if (found == std::end(kDtypes)) return false;
  precision = static_cast<Precision>(found - std::begin(kDtypes));
  return true;
}

void for_linears(Network& n, const std::function<void(const std::string&, Linear&, int64_t, int64_t)>& f) {
  const Shape& s = n.shape;
  f("patch_embed.proj", n.patch, s.C, s.patch_values());
  for (int64_t i = 0; i < s.depth; ++i) {
    const std::string block = "blocks." + std::to_string(i);
    f(block + ".attn.qkv", n.blocks[i].qkv, 3 * s.C, s.C);
    f(block + ".attn.proj", n.blocks[i].proj, s.C, s.C);
    f(block + ".mlp.fc1", n.blocks[i].fc1, s.made_by_fc1(), s.C);
    f(block + ".mlp.fc2", n.blocks[i].fc2, s.C, s.hidden);
  }
  if (s.pool == Pool::attention) {
    for (int64_t h = 0; h < s.pool_heads; ++h)
      f("attn_pool.values." + std::to_string(h), n.pool.values[h], s.C / s.pool_heads, s.C);
    f("attn_pool.proj", n.pool.rest.proj, s.C, s.C);
    f("attn_pool.mlp.fc1", n.pool.rest.fc1, s.pool_hidden, s.C);
    f("attn_pool.mlp.fc2", n.pool.rest.fc2, s.C, s.pool_hidden);
  }
  if (s.classes) f("head", n.head, s.classes, s.pooled());
}

std::vector<Part> parts_of(Network& n) {
  const Shape& s = n.shape;
  std::vector<Part> parts;
  const auto vector = [&](const std::string& name, float*& at, int64_t count, bool optional = false) {
    parts.push_back({name, &at, nullptr, nullptr, count, optional, false});
  };
  const auto norm = [&](const std::string& name, Norm& norm, int64_t width) {
    vector(name + ".weight", norm.weight, width);
    if (s.norm == NormKind::layer) vector(name + ".bias", norm.bias, width);
  };
  vector("mean", n.mean, s.channels);
  vector("std", n.std, s.channels);
  if (s.prefix) vector("prefix", n.prefix, s.prefix * s.C);
  vector("positions", n.positions, s.patches() * s.C, true);
  if (s.rotary != Rotary::none) vector("rotary", n.rotary, s.rotary_tables() * s.patches() * 2 * s.D());
  if (s.embed_norm) norm("patch_embed.norm", n.embed_norm, s.C);
  if (s.pre_norm) norm("norm_pre", n.pre_norm, s.C);
  for (int64_t i = 0; i < s.depth; ++i) {
    const std::string name = "blocks." + std::to_string(i);
    Block& block = n.blocks[i];
    norm(name + ".norm1", block.norm1, s.C);
    if (s.qk_norm) norm(name + ".attn.q_norm", block.q_norm, s.D());
    if (s.qk_norm) norm(name + ".attn.k_norm", block.k_norm, s.D());
    if (s.attn_norm) norm(name + ".attn.norm", block.attn_norm, s.C);
    norm(name + ".norm2", block.norm2, s.C);
    if (s.mlp_norm) norm(name + ".mlp.norm", block.mlp_norm, s.hidden);
  }
  if (s.last_norm != LastNorm::absent) norm("norm", n.norm, s.C);
  if (s.pool == Pool::attention) {
    vector("attn_pool.keys", n.pool.keys, s.pool_heads * s.C);
    norm("attn_pool.norm", n.pool.rest.norm2, s.C);
  }
  for_linears(n, [&](const std::string& name, Linear& linear, int64_t N, int64_t K) {
    linear.N = N, linear.K = K, linear.zero = zero_of(name, s);
    n.shape.unpacks |= stored(linear.precision);
    if (linear.precision == Precision::int8) {
      parts.push_back({name + ".scale", &linear.scale, nullptr, nullptr, N, false, true});
      parts.push_back({name + ".sums", nullptr, nullptr, &linear.sums, N, false, true});
    }
    vector(name + ".bias", linear.bias, N, true);  // before the weight, whose packing may add to it
    parts.push_back({name + ".weight", nullptr, &linear, nullptr, N * K, false, false});
  });
  return parts;
}

Record record_of(const Part& part, int64_t begin) {
  // Lengths are rounded up to a cache line: safetensors has no gaps between tensors.
  return {part.name,
          part.matrix ? dtype_of(part.matrix->precision)
          : part.sums ? "I32"
                      : "F32",
          begin, begin + aligned(bytes_of(part))};
}

void point(const Part& part, char* at) {
  if (part.matrix)
    part.matrix->weight = at;
  else if (part.sums)
    *part.sums = reinterpret_cast<int32_t*>(at);
  else
    *part.vector = reinterpret_cast<float*>(at);
}

}  // namespace vit::engine
