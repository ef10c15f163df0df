#include "engine/config.h"

#include <cmath>
#include <cstdio>
#include <string>
#include <utility>

#include "engine/error.h"

namespace vit::engine {
namespace {

constexpr int64_t kMaxSize = int64_t{1} << 24;  // of any one size: no product of three overflows

// Products of 255 and 127 summed in int32: beyond 66,311 they wrap. 2^16 is the last round number below.
constexpr int64_t kMaxInt8Depth = int64_t{1} << 16;

}  // namespace

void check_config(const vit_engine_config& c) {
  const auto within = [](const char* name, int64_t value, int64_t low, int64_t high) {
    if (value < low || value > high)
      invalid(std::string(name) + " is " + std::to_string(value) + "; allowed are " + std::to_string(low) + " to " +
              std::to_string(high));
  };
  within("precision", c.precision, VIT_FLOAT32, VIT_INT8);
  within("pool", c.pool, VIT_POOL_TOKEN, VIT_POOL_DISTILLED);
  within("activation", c.activation, VIT_GELU, VIT_SILU);
  within("norm_first", c.norm_first, VIT_NORM_AFTER_POOL, VIT_NORM_ABSENT);
  within("norm", c.norm, VIT_LAYER_NORM, VIT_RMS_NORM);
  within("rotary", c.rotary, VIT_ROTARY_NONE, VIT_ROTARY_HALF);
  for (const auto& [name, value] :
       {std::pair("dynamic_pad", c.dynamic_pad), std::pair("drop_edge", c.drop_edge),
        std::pair("embed_norm", c.embed_norm), std::pair("pre_norm", c.pre_norm), std::pair("qk_norm", c.qk_norm),
        std::pair("attn_norm", c.attn_norm), std::pair("mlp_norm", c.mlp_norm), std::pair("gated", c.gated),
        std::pair("rotary_of_heads", c.rotary_of_heads), std::pair("pool_prefix", c.pool_prefix)})
    within(name, value, 0, 1);
  within("channels", c.channels, 1, 4096);
  within("image_height", c.image_height, 1, 65536);
  within("image_width", c.image_width, 1, 65536);
  within("patch_height", c.patch_height, 1, 4096);
  within("patch_width", c.patch_width, 1, 4096);
  within("prefix_tokens", c.prefix_tokens, c.pool == VIT_POOL_TOKEN ? 1 : c.pool == VIT_POOL_DISTILLED ? 2 : 0, 4096);
  within("embed_dim", c.embed_dim, 1, 65536);
  within("depth", c.depth, 1, 4096);
  within("num_heads", c.num_heads, 1, c.embed_dim);
  within("mlp_width", c.mlp_width, 1, c.precision == VIT_INT8 ? kMaxInt8Depth : kMaxSize);
  const bool attends = c.pool == VIT_POOL_ATTENTION;
  within("pool_heads", c.pool_heads, attends, attends ? c.embed_dim : 0);
  within("pool_mlp_width", c.pool_mlp_width, attends, attends ? kMaxSize : 0);
  within("pool_activation", c.pool_activation, attends ? VIT_GELU : 0, attends ? VIT_SILU : 0);
  within("num_classes", c.num_classes, 0, kMaxSize);
  if (c.embed_dim % c.num_heads)
    invalid("embed_dim " + std::to_string(c.embed_dim) + " is not a multiple of num_heads " +
            std::to_string(c.num_heads));
  within("rotary_of_heads", c.rotary_of_heads, 0, c.rotary != VIT_ROTARY_NONE);
  if (c.rotary && c.embed_dim / c.num_heads % 2)
    invalid("rotary turns pairs of elements, and a head has " + std::to_string(c.embed_dim / c.num_heads));
  if (attends && c.embed_dim % c.pool_heads)
    invalid("embed_dim " + std::to_string(c.embed_dim) + " is not a multiple of pool_heads " +
            std::to_string(c.pool_heads));
  const Shape shape = shape_of(c);
  if (!c.dynamic_pad && !c.drop_edge && (c.image_height % c.patch_height || c.image_width % c.patch_width))
    invalid("images of " + std::to_string(c.image_height) + " x " + std::to_string(c.image_width) +
            " are not made of whole patches of " + std::to_string(c.patch_height) + " x " +
            std::to_string(c.patch_width) + "; set dynamic_pad to pad them, or drop_edge");
  if (c.dynamic_pad && c.drop_edge) invalid("dynamic_pad and drop_edge are both set; an edge is padded or dropped");
  within("the number of patches", shape.patches(), 1, kMaxSize);
  if (!(c.norm_eps >= 0 && c.norm_eps <= 1)) {
    char eps[32];
    std::snprintf(eps, sizeof eps, "%g", c.norm_eps);
    invalid("norm_eps is " + std::string(eps) + "; allowed are 0 to 1");
  }
  for (const auto& [name, size] : {std::pair("embed_dim", c.embed_dim), std::pair("mlp_width", c.mlp_width),
                                   std::pair("pool_mlp_width", c.pool_mlp_width)})
    if (c.precision != VIT_FLOAT32 && size % 2)
      throw EngineError(kUnsupported, "vit engine: " + std::string(name) + " is " + std::to_string(size) +
                                          "; this precision needs a multiple of 2. Use float32");
}

Shape shape_of(const vit_engine_config& c) {
  Shape s{};
  s.precision = static_cast<Precision>(c.precision);
  s.pool = static_cast<Pool>(c.pool);
  s.activation = static_cast<Activation>(c.activation);
  s.pool_activation = static_cast<Activation>(c.pool_activation);
  s.norm = static_cast<NormKind>(c.norm);
  s.last_norm = static_cast<LastNorm>(c.norm_first);
  s.rotary = static_cast<Rotary>(c.rotary);
  s.dynamic_pad = c.dynamic_pad != 0, s.drop_edge = c.drop_edge != 0, s.embed_norm = c.embed_norm != 0,
  s.pre_norm = c.pre_norm != 0, s.qk_norm = c.qk_norm != 0;
  s.attn_norm = c.attn_norm != 0, s.mlp_norm = c.mlp_norm != 0, s.gated = c.gated != 0;
  s.pool_prefix = c.pool_prefix != 0, s.rotary_of_heads = c.rotary_of_heads != 0;
  s.channels = c.channels, s.height = c.image_height, s.width = c.image_width;
  s.patch_height = c.patch_height, s.patch_width = c.patch_width;
  s.prefix = c.prefix_tokens, s.C = c.embed_dim, s.depth = c.depth, s.H = c.num_heads;
  s.hidden = c.mlp_width, s.classes = c.num_classes, s.eps = c.norm_eps;
  s.pool_heads = c.pool_heads, s.pool_hidden = c.pool_mlp_width;
  return s;
}

bool can_normalize(const Network& network) {
  for (int64_t c = 0; c < network.shape.channels; ++c)
    if (!std::isfinite(network.mean[c]) || !std::isfinite(network.std[c]) || !(network.std[c] > 0)) return false;
  return true;
}

}  // namespace vit::engine
