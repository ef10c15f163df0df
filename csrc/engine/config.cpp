#include "engine/config.h"

#include <cmath>
#include <string>
#include <utility>

#include "engine/error.h"

namespace vit::engine {
namespace {

constexpr int64_t kMaxSize = int64_t{1} << 24;  // of any one size: no product of three overflows

}  // namespace

void check_config(const vit_engine_config& c) {
  const auto within = [](const char* name, int64_t value, int64_t low, int64_t high) {
    if (value < low || value > high)
      invalid(std::string(name) + " is " + std::to_string(value) + "; allowed are " + std::to_string(low) + " to " +
              std::to_string(high));
  };
  within("precision", c.precision, VIT_FLOAT32, VIT_INT8);
  within("pool", c.pool, VIT_POOL_TOKEN, VIT_POOL_NONE);
  within("activation", c.activation, VIT_GELU, VIT_GELU_TANH);
  within("channels", c.channels, 1, 4096);
  within("image_height", c.image_height, 1, 65536);
  within("image_width", c.image_width, 1, 65536);
  within("patch_height", c.patch_height, 1, 4096);
  within("patch_width", c.patch_width, 1, 4096);
  within("prefix_tokens", c.prefix_tokens, c.pool == VIT_POOL_TOKEN ? 1 : 0, 4096);
  within("embed_dim", c.embed_dim, 1, 65536);
  within("depth", c.depth, 1, 4096);
  within("num_heads", c.num_heads, 1, c.embed_dim);
  within("mlp_width", c.mlp_width, 1, kMaxSize);
  within("num_classes", c.num_classes, 0, kMaxSize);
  if (c.embed_dim % c.num_heads)
    invalid("embed_dim " + std::to_string(c.embed_dim) + " is not a multiple of num_heads " +
            std::to_string(c.num_heads));
  if (!(c.norm_eps >= 0 && std::isfinite(c.norm_eps))) invalid("norm_eps is " + std::to_string(c.norm_eps));
  const int64_t multiple = c.precision == VIT_FLOAT32 ? 1 : c.precision == VIT_BFLOAT16 ? 2 : 4;
  for (const auto& [name, size] : {std::pair("embed_dim", c.embed_dim), std::pair("mlp_width", c.mlp_width)})
    if (size % multiple)
      throw EngineError(kUnsupported, "vit engine: " + std::string(name) + " is " + std::to_string(size) +
                                          "; this precision needs a multiple of " + std::to_string(multiple) +
                                          ". Use float32");
}

Shape shape_of(const vit_engine_config& c) {
  Shape s{};
  s.precision = static_cast<Precision>(c.precision);
  s.pool = static_cast<Pool>(c.pool);
  s.activation = static_cast<Activation>(c.activation);
  s.dynamic_pad = c.dynamic_pad != 0, s.norm_first = c.norm_first != 0;
  s.channels = c.channels, s.height = c.image_height, s.width = c.image_width;
  s.patch_height = c.patch_height, s.patch_width = c.patch_width;
  s.prefix = c.prefix_tokens, s.C = c.embed_dim, s.depth = c.depth, s.H = c.num_heads;
  s.hidden = c.mlp_width, s.classes = c.num_classes, s.eps = c.norm_eps;
  return s;
}

}  // namespace vit::engine
