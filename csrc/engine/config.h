// The fields of vit_engine_config: their names in an engine file, the values that are allowed, and the sizes they mean.
#pragma once

#include "engine/network.h"
#include "vit_engine.h"

namespace vit::engine {

inline constexpr const char* kFormat = "vit-engine";  // in the header of every engine file

// The fields that files of version 4 do not have; 0 is the network that they describe.
inline constexpr int kOldestVersion = 4;
template <class C, class F>
void for_options(C& config, const F& f) {
  f("drop_edge", config.drop_edge);
  f("norm", config.norm);
  f("embed_norm", config.embed_norm);
  f("pre_norm", config.pre_norm);
  f("qk_norm", config.qk_norm);
  f("attn_norm", config.attn_norm);
  f("mlp_norm", config.mlp_norm);
  f("gated", config.gated);
  f("rotary", config.rotary);
  f("rotary_of_heads", config.rotary_of_heads);
  f("pool_prefix", config.pool_prefix);
  f("pool_activation", config.pool_activation);
  f("pool_heads", config.pool_heads);
  f("pool_mlp_width", config.pool_mlp_width);
}

// The integer fields of a config under the names they have in an engine file.
template <class C, class F>
void for_fields(C& config, const F& f) {
  f("precision", config.precision);
  f("pool", config.pool);
  f("activation", config.activation);
  f("dynamic_pad", config.dynamic_pad);
  f("norm_first", config.norm_first);
  for_options(config, f);
  f("channels", config.channels);
  f("image_height", config.image_height);
  f("image_width", config.image_width);
  f("patch_height", config.patch_height);
  f("patch_width", config.patch_width);
  f("prefix_tokens", config.prefix_tokens);
  f("embed_dim", config.embed_dim);
  f("depth", config.depth);
  f("num_heads", config.num_heads);
  f("mlp_width", config.mlp_width);
  f("num_classes", config.num_classes);
}

// Throws EngineError for a config that no engine has.
void check_config(const vit_engine_config& config);

Shape shape_of(const vit_engine_config& config);

// Whether mean and std of the pixels are numbers to normalise with.
bool can_normalize(const Network& network);

}  // namespace vit::engine
