#include "engine/names.h"

#include <cstddef>
#include <iterator>

#include "engine/error.h"

namespace vit::engine {
namespace {

#define VIT_FIELD(type, field) {#type, #field, offsetof(type, field)}

// Enums have the names that vit.Engine and timm give their values.
const vit_name kNames[] = {
    {"precision", "float32", VIT_FLOAT32},
    {"precision", "bfloat16", VIT_BFLOAT16},
    {"precision", "int8", VIT_INT8},
    {"stored", "int8", VIT_STORED8},
    {"stored", "int4", VIT_STORED4},
    {"pool", "token", VIT_POOL_TOKEN},
    {"pool", "avg", VIT_POOL_AVERAGE},
    {"pool", "", VIT_POOL_NONE},
    {"pool", "max", VIT_POOL_MAX},
    {"pool", "avgmax", VIT_POOL_AVERAGE_MAX},
    {"pool", "map", VIT_POOL_ATTENTION},
    {"pool", "distilled", VIT_POOL_DISTILLED},
    {"activation", "gelu", VIT_GELU},
    {"activation", "gelu_tanh", VIT_GELU_TANH},
    {"activation", "quick_gelu", VIT_QUICK_GELU},
    {"activation", "silu", VIT_SILU},
    {"norm", "layernorm", VIT_LAYER_NORM},
    {"norm", "rmsnorm", VIT_RMS_NORM},
    {"last norm", "after pool", VIT_NORM_AFTER_POOL},
    {"last norm", "first", VIT_NORM_FIRST},
    {"last norm", "absent", VIT_NORM_ABSENT},
    {"rotary", "none", VIT_ROTARY_NONE},
    {"rotary", "interleaved", VIT_ROTARY_INTERLEAVED},
    {"rotary", "half", VIT_ROTARY_HALF},
    {"pixels", "uint8", VIT_PIXELS_UINT8},
    {"pixels", "float32", VIT_PIXELS_FLOAT32},
    {"layout", "NCHW", VIT_LAYOUT_NCHW},
    {"layout", "NHWC", VIT_LAYOUT_NHWC},
    {"output", "logits", VIT_OUTPUT_LOGITS},
    {"output", "features", VIT_OUTPUT_FEATURES},
    {"output", "tokens", VIT_OUTPUT_TOKENS},
    {"output", "attention", VIT_OUTPUT_ATTENTION},
    {"status", "ok", VIT_OK},
    {"status", "invalid", VIT_INVALID},
    {"status", "file", VIT_FILE},
    {"status", "unsupported", VIT_UNSUPPORTED},
    {"status", "memory", VIT_MEMORY},
    {"status", "not finite", VIT_NOT_FINITE},
    {"status", "failed", VIT_FAILED},
    VIT_FIELD(vit_images, data),
    VIT_FIELD(vit_images, pixels),
    VIT_FIELD(vit_images, layout),
    VIT_FIELD(vit_images, batch),
    VIT_FIELD(vit_images, channels),
    VIT_FIELD(vit_images, height),
    VIT_FIELD(vit_images, width),
    VIT_FIELD(vit_grid, height),
    VIT_FIELD(vit_grid, width),
    VIT_FIELD(vit_grid, positions),
    VIT_FIELD(vit_grid, num_positions),
    VIT_FIELD(vit_grid, rotary),
    VIT_FIELD(vit_grid, num_rotary),
    VIT_FIELD(vit_output, kind),
    VIT_FIELD(vit_output, block),
    VIT_FIELD(vit_output, data),
    VIT_FIELD(vit_output, count),
    VIT_FIELD(vit_engine_config, precision),
    VIT_FIELD(vit_engine_config, pool),
    VIT_FIELD(vit_engine_config, activation),
    VIT_FIELD(vit_engine_config, dynamic_pad),
    VIT_FIELD(vit_engine_config, norm_first),
    VIT_FIELD(vit_engine_config, drop_edge),
    VIT_FIELD(vit_engine_config, norm),
    VIT_FIELD(vit_engine_config, embed_norm),
    VIT_FIELD(vit_engine_config, pre_norm),
    VIT_FIELD(vit_engine_config, qk_norm),
    VIT_FIELD(vit_engine_config, attn_norm),
    VIT_FIELD(vit_engine_config, mlp_norm),
    VIT_FIELD(vit_engine_config, gated),
    VIT_FIELD(vit_engine_config, rotary),
    VIT_FIELD(vit_engine_config, rotary_of_heads),
    VIT_FIELD(vit_engine_config, pool_prefix),
    VIT_FIELD(vit_engine_config, pool_activation),
    VIT_FIELD(vit_engine_config, channels),
    VIT_FIELD(vit_engine_config, image_height),
    VIT_FIELD(vit_engine_config, image_width),
    VIT_FIELD(vit_engine_config, patch_height),
    VIT_FIELD(vit_engine_config, patch_width),
    VIT_FIELD(vit_engine_config, prefix_tokens),
    VIT_FIELD(vit_engine_config, embed_dim),
    VIT_FIELD(vit_engine_config, depth),
    VIT_FIELD(vit_engine_config, num_heads),
    VIT_FIELD(vit_engine_config, mlp_width),
    VIT_FIELD(vit_engine_config, num_classes),
    VIT_FIELD(vit_engine_config, pool_heads),
    VIT_FIELD(vit_engine_config, pool_mlp_width),
    VIT_FIELD(vit_engine_config, norm_eps),
    VIT_FIELD(vit_tensor, name),
    VIT_FIELD(vit_tensor, data),
    VIT_FIELD(vit_tensor, count),
    VIT_FIELD(vit_tensor, precision),
    VIT_FIELD(vit_text, key),
    VIT_FIELD(vit_text, value),
};

}  // namespace

vit_name name_at(int64_t index) {
  if (index < 0 || index >= static_cast<int64_t>(std::size(kNames)))
    invalid("there is no name number " + std::to_string(index));
  return kNames[index];
}

}  // namespace vit::engine
