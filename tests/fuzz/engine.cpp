// The C API of the engine with random networks, calls and engine files: engine_fuzz FOLDER SEED FIRST COUNT.
//
// Every case depends on SEED and its number alone. FOLDER/case holds the number of the case that runs and
// FOLDER/input.vit the file it reads, for whoever finds the process dead. The last line of output is JSON.
#include <fcntl.h>
#include <sys/file.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/time.h>

#include <algorithm>
#include <cfloat>
#include <climits>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <limits>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "vit_engine.h"

namespace {

constexpr int kSeconds = 10;  // of the processor, for one case

struct Random {
  uint64_t state;
  uint64_t next() {  // splitmix64
    uint64_t z = (state += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }
  int64_t below(int64_t count) { return count > 1 ? static_cast<int64_t>(next() % static_cast<uint64_t>(count)) : 0; }
  int64_t within(int64_t low, int64_t high) { return low + below(high - low + 1); }
  bool chance(double share) { return static_cast<double>(below(1000)) < 1000 * share; }
  template <class T, std::size_t N>
  T of(const T (&items)[N]) {
    return items[below(N)];
  }
};

const int64_t kNumbers[] = {0,         1,
                            -1,        2,
                            3,         4,
                            7,         64,
                            255,       4096,
                            4097,      65535,
                            65536,     65537,
                            1 << 24,   (1 << 24) + 1,
                            INT32_MAX, 1LL << 31,
                            1LL << 32, 1LL << 53,
                            1LL << 61, 1LL << 62,
                            INT64_MAX, INT64_MIN,
                            -65536,    INT64_MAX - 1};
const float kFloats[] = {NAN, INFINITY, -INFINITY, FLT_MAX, -FLT_MAX, FLT_MIN, 1e-45f, 0.0f, -0.0f};
const char* const kTexts[] = {
    "",       "x",      "0",  "-1",      "1e6",     "nan", "4294967296",  "99999999999999999999",
    "F32",    "BF16",   "I8", "\\u0000", "\\ud800", "\"",  "head.weight", "isa",
    "format", "version"};

int64_t current_case = 0;

struct Figures {
  long networks = 0, built = 0, calls = 0, served = 0, files = 0, accepted = 0, refused = 0, wrong = 0;
} figures;

struct Destroy {
  void operator()(vit_engine* engine) const { vit_engine_destroy(engine); }
};
using Handle = std::unique_ptr<vit_engine, Destroy>;

void wrong(const std::string& what) {
  ++figures.wrong;
  std::printf("wrong in case %lld: %s\n", static_cast<long long>(current_case), what.c_str());
}

// A call that failed must say why.
void check_error(bool failed) {
  if (failed && (!*vit_engine_last_error() || vit_engine_last_status() == VIT_OK)) wrong("an error without a text");
}

struct Network {
  vit_engine_config config{};
  std::vector<std::string> names;
  std::vector<std::vector<float>> values;
  std::vector<vit_tensor> tensors;

  void add(Random& r, const std::string& name, int64_t count, float around) {
    std::vector<float> data(static_cast<std::size_t>(count));
    for (float& x : data) x = around + 0.3f * static_cast<float>(r.below(2001) - 1000) / 1000;
    names.push_back(name);
    values.push_back(std::move(data));
  }
};

vit_engine_config random_config(Random& r) {
  vit_engine_config c{};
  c.precision = static_cast<int32_t>(r.below(3)), c.pool = static_cast<int32_t>(r.below(7));
  c.activation = static_cast<int32_t>(r.within(1, 4));
  c.dynamic_pad = static_cast<int32_t>(r.below(2)), c.norm_first = static_cast<int32_t>(r.below(3));
  for (int32_t* option : {&c.norm, &c.embed_norm, &c.pre_norm, &c.qk_norm, &c.attn_norm, &c.mlp_norm, &c.gated})
    *option = r.chance(0.3);
  c.pool_prefix = static_cast<int32_t>(r.below(2)), c.rotary = static_cast<int32_t>(r.below(3));
  c.channels = r.within(1, 4), c.patch_height = r.within(1, 9), c.patch_width = r.within(1, 9);
  c.drop_edge = !c.dynamic_pad && r.chance(0.3);
  const auto side = [&](int64_t patch) {
    return patch * r.within(1, 4) + (c.drop_edge ? r.below(patch) : c.dynamic_pad ? -r.below(patch) : 0);
  };
  c.image_height = side(c.patch_height), c.image_width = side(c.patch_width);
  c.prefix_tokens = r.within(c.pool == VIT_POOL_TOKEN ? 1 : c.pool == VIT_POOL_DISTILLED ? 2 : 0, 3);
  c.num_heads = r.within(1, 4);
  c.embed_dim = c.num_heads * 4 * r.within(1, 6), c.mlp_width = 2 * r.within(1, 48);
  if (c.precision == VIT_FLOAT32 && r.chance(0.3)) c.embed_dim = c.num_heads * r.within(1, 21), c.mlp_width += 1;
  if (c.embed_dim / c.num_heads % 2) c.rotary = VIT_ROTARY_NONE;
  c.rotary_of_heads = c.rotary && r.chance(0.3);
  if (c.pool == VIT_POOL_ATTENTION) {
    c.pool_heads = r.chance(0.5) ? 1 : c.num_heads, c.pool_mlp_width = 2 * r.within(1, 24);
    c.pool_activation = static_cast<int32_t>(r.within(1, 4));
  }
  c.depth = r.within(1, 3), c.num_classes = r.below(12), c.norm_eps = 1e-6;
  return c;
}

void odd_field(Random& r, vit_engine_config& c) {
  int32_t* const small[] = {&c.precision,   &c.drop_edge,  &c.pool,        &c.activation,
                            &c.dynamic_pad, &c.norm_first, &c.norm,        &c.pre_norm,
                            &c.embed_norm,  &c.qk_norm,    &c.attn_norm,   &c.mlp_norm,
                            &c.gated,       &c.rotary,     &c.pool_prefix, &c.pool_activation};
  int64_t* const large[] = {&c.channels,      &c.image_height, &c.image_width,   &c.patch_height, &c.patch_width,
                            &c.prefix_tokens, &c.embed_dim,    &c.depth,         &c.num_heads,    &c.mlp_width,
                            &c.num_classes,   &c.pool_heads,   &c.pool_mlp_width};
  const auto ints = static_cast<int64_t>(std::size(small)), longs = static_cast<int64_t>(std::size(large));
  const int64_t which = r.below(ints + longs + 1);
  if (which < ints)
    *small[which] = static_cast<int32_t>(r.of(kNumbers));
  else if (which < ints + longs)
    *large[which - ints] = r.of(kNumbers);
  else
    c.norm_eps = r.chance(0.5) ? -1.0 : static_cast<double>(r.of(kFloats));
}

int64_t patches_of(const vit_engine_config& c) {
  const auto count = [&](int64_t size, int64_t patch) { return (size + (c.drop_edge ? 0 : patch - 1)) / patch; };
  return count(c.image_height, c.patch_height) * count(c.image_width, c.patch_width);
}

Network random_network(Random& r) {
  Network n;
  n.config = random_config(r);
  const vit_engine_config c = n.config;
  n.add(r, "mean", c.channels, 0.5f);
  n.add(r, "std", c.channels, 1.0f);
  if (c.prefix_tokens) n.add(r, "prefix", c.prefix_tokens * c.embed_dim, 0);
  if (r.chance(0.8)) n.add(r, "positions", patches_of(c) * c.embed_dim, 0);
  const auto linear = [&](const std::string& name, int64_t out, int64_t in) {
    n.add(r, name + ".weight", out * in, 0);
    if (r.chance(0.9)) n.add(r, name + ".bias", out, 0);
  };
  const auto norm = [&](const std::string& name, int64_t width, bool wanted = true) {
    if (wanted) n.add(r, name + ".weight", width, 1);
    if (wanted && c.norm == VIT_LAYER_NORM) n.add(r, name + ".bias", width, 0);
  };
  const int64_t C = c.embed_dim, D = C / c.num_heads;
  const int64_t patches = patches_of(c);
  if (c.rotary) n.add(r, "rotary", (c.rotary_of_heads ? c.depth * c.num_heads : 1) * patches * 2 * D, 0);
  norm("patch_embed.norm", C, c.embed_norm);
  norm("norm_pre", C, c.pre_norm);
  linear("patch_embed.proj", c.embed_dim, c.channels * c.patch_height * c.patch_width);
  for (int64_t i = 0; i < c.depth; ++i) {
    const std::string block = "blocks." + std::to_string(i);
    norm(block + ".norm1", C);
    norm(block + ".attn.q_norm", D, c.qk_norm);
    norm(block + ".attn.k_norm", D, c.qk_norm);
    norm(block + ".attn.norm", C, c.attn_norm);
    norm(block + ".mlp.norm", c.mlp_width, c.mlp_norm);
    linear(block + ".attn.qkv", 3 * c.embed_dim, c.embed_dim);
    linear(block + ".attn.proj", c.embed_dim, c.embed_dim);
    norm(block + ".norm2", C);
    linear(block + ".mlp.fc1", c.gated ? 2 * c.mlp_width : c.mlp_width, c.embed_dim);
    linear(block + ".mlp.fc2", c.embed_dim, c.mlp_width);
  }
  norm("norm", C, c.norm_first != VIT_NORM_ABSENT);
  if (c.pool == VIT_POOL_ATTENTION) {
    n.add(r, "attn_pool.keys", c.pool_heads * C, 0);
    for (int64_t h = 0; h < c.pool_heads; ++h) linear("attn_pool.values." + std::to_string(h), C / c.pool_heads, C);
    linear("attn_pool.proj", C, C);
    norm("attn_pool.norm", C);
    linear("attn_pool.mlp.fc1", c.pool_mlp_width, C);
    linear("attn_pool.mlp.fc2", C, c.pool_mlp_width);
  }
  if (c.num_classes) linear("head", c.num_classes, c.pool == VIT_POOL_DISTILLED ? 2 * C : C);
  for (std::size_t i = 0; i < n.names.size(); ++i)
    n.tensors.push_back(
        {n.names[i].c_str(), n.values[i].data(), static_cast<int64_t>(n.values[i].size()), n.config.precision});
  return n;
}

// One thing that is not as it should be; the counts of tensors stay true, or are such that no network takes them.
void spoil(Random& r, Network& n) {
  const auto i = static_cast<std::size_t>(r.below(static_cast<int64_t>(n.tensors.size())));
  switch (r.below(9)) {
    case 0:
      n.tensors.erase(n.tensors.begin() + static_cast<std::ptrdiff_t>(i));
      break;
    case 1:
      n.tensors.push_back(n.tensors[i]);
      break;
    case 2:
      n.tensors[i].name = r.of(kTexts);
      break;
    case 3:
      n.tensors[i].name = nullptr;
      break;
    case 4:
      n.tensors[i].data = nullptr;
      break;
    case 5:
      n.tensors[i].count += r.chance(0.5) ? 1 : INT32_MAX;
      break;
    case 6: {  // not by tensors[i]: after another change its place and count may not be those of values[i]
      auto& data = n.values[static_cast<std::size_t>(r.below(static_cast<int64_t>(n.values.size())))];
      data[static_cast<std::size_t>(r.below(static_cast<int64_t>(data.size())))] = r.of(kFloats);
      break;
    }
    case 7:
      n.tensors[i].precision = static_cast<int32_t>(r.chance(0.5) ? r.below(6) : r.of(kNumbers));
      break;
    default:
      odd_field(r, n.config);
  }
}

int64_t tokens_of(const vit_engine_config& c) { return c.prefix_tokens + patches_of(c); }

int64_t floats_of(const vit_engine_config& c, int32_t kind, int64_t batch) {
  const int64_t rows = c.pool == VIT_POOL_NONE ? tokens_of(c) : 1;
  switch (kind) {
    case VIT_OUTPUT_LOGITS:
      return batch * rows * (c.num_classes ? c.num_classes : c.embed_dim);
    case VIT_OUTPUT_FEATURES:
      return batch * rows * c.embed_dim;
    case VIT_OUTPUT_TOKENS:
      return batch * tokens_of(c) * c.embed_dim;
    default:
      return batch * c.num_heads * tokens_of(c);
  }
}

// Whether a network of this config is small enough to be run here.
bool is_small(const vit_engine_config& c) {
  double work = 1.0 * static_cast<double>(tokens_of(c)) * static_cast<double>(c.embed_dim);
  work *= static_cast<double>(c.embed_dim + c.mlp_width + tokens_of(c)) * static_cast<double>(c.depth);
  const double pixels = static_cast<double>(c.channels) * static_cast<double>(c.image_height * c.image_width);
  return work < 3e7 && pixels < 1e6;
}

// A call of the right kind with the same images each time: what engines of the same weights must agree on.
std::vector<float> fixed_call(vit_engine* engine, int64_t batch = 2) {
  vit_engine_config c{};
  vit_engine_get_config(engine, &c);
  std::vector<float> pixels(static_cast<std::size_t>(batch * c.channels * c.image_height * c.image_width));
  for (std::size_t i = 0; i < pixels.size(); ++i) pixels[i] = static_cast<float>(i * 37 % 101) / 50 - 1;
  const vit_images images{pixels.data(), VIT_PIXELS_FLOAT32, VIT_LAYOUT_NCHW, batch,
                          c.channels,    c.image_height,     c.image_width};
  std::vector<float> logits(static_cast<std::size_t>(floats_of(c, VIT_OUTPUT_LOGITS, batch)));
  std::vector<float> tokens(static_cast<std::size_t>(floats_of(c, VIT_OUTPUT_TOKENS, batch)));
  const vit_output outputs[] = {{VIT_OUTPUT_LOGITS, 0, logits.data(), static_cast<int64_t>(logits.size())},
                                {VIT_OUTPUT_TOKENS, 0, tokens.data(), static_cast<int64_t>(tokens.size())}};
  if (vit_engine_forward(engine, &images, outputs, 2, 1) != VIT_OK) return {};
  logits.insert(logits.end(), tokens.begin(), tokens.end());
  return logits;
}

// Reports `what` and the first place where two results differ in their bits, or that one call had none.
void compare(const std::vector<float>& a, const std::vector<float>& b, const std::string& what) {
  if (a.size() != b.size())
    return wrong(what + ": " + std::to_string(a.size()) + " and " + std::to_string(b.size()) + " values, last error '" +
                 vit_engine_last_error() + "'");
  for (std::size_t i = 0; i < a.size(); ++i) {
    if (std::memcmp(&a[i], &b[i], sizeof(float)) == 0) continue;
    char text[96];
    std::snprintf(text, sizeof text, ": value %zu of %zu is %a, was %a", i, a.size(), static_cast<double>(b[i]),
                  static_cast<double>(a[i]));
    return wrong(what + text);
  }
}

void random_call(Random& r, vit_engine* engine) {
  vit_engine_config c{};
  vit_engine_get_config(engine, &c);
  vit_images images{};
  images.pixels = static_cast<int32_t>(r.below(2)), images.layout = static_cast<int32_t>(r.below(2));
  images.batch = r.below(4), images.channels = c.channels;
  images.height = c.image_height, images.width = c.image_width;
  if (r.chance(0.2)) images.height -= r.below(c.patch_height);
  const bool odd = r.chance(0.25);
  // Exactly as large as the call says; sizes that no caller can mean come with a single byte, and must be refused.
  std::vector<unsigned char> pixels;
  const std::size_t element = images.pixels == VIT_PIXELS_FLOAT32 ? 4 : 1;
  pixels.resize(element * static_cast<std::size_t>(
                              std::max<int64_t>(0, images.batch * images.channels * images.height * images.width)));
  for (auto& byte : pixels) byte = static_cast<unsigned char>(r.next());
  if (element == 4 && r.chance(0.8))
    for (std::size_t i = 0; i + 4 <= pixels.size(); i += 4) {
      const float x = static_cast<float>(r.below(200) - 100) / 50;
      std::memcpy(&pixels[i], &x, 4);
    }
  images.data = pixels.data();
  std::vector<vit_output> outputs;
  std::vector<std::vector<float>> places;
  for (int64_t i = r.within(1, 3); i > 0; --i) {
    const auto kind = static_cast<int32_t>(r.below(4));
    places.emplace_back(static_cast<std::size_t>(floats_of(c, kind, images.batch)));
    outputs.push_back({kind, static_cast<int32_t>(r.below(c.depth)), places.back().data(),
                       static_cast<int64_t>(places.back().size())});
  }
  const int32_t threads[] = {0, 1, 1, 1, 2, 3, -1, INT32_MIN};
  int64_t num_outputs = static_cast<int64_t>(outputs.size());
  const vit_images* at = &images;
  const vit_output* to = outputs.data();
  bool must_fail = false;
  if (odd) {
    must_fail = true;
    vit_output& output = outputs[static_cast<std::size_t>(r.below(num_outputs))];
    const int64_t other = r.of(kNumbers);
    switch (r.below(10)) {
      case 0:
        at = nullptr;
        break;
      case 1:
        to = nullptr;
        break;
      case 2:
        must_fail = images.batch != 0;
        images.data = nullptr;
        break;
      case 3:
        must_fail = images.batch != other;
        if (must_fail) images.batch = other, images.data = nullptr;
        break;
      case 4:
        must_fail = other != images.channels;
        images.channels = other;
        break;
      case 5:
        images.height = other < 0 || other > 100 ? other : INT64_MAX;
        break;
      case 6:
        images.pixels = static_cast<int32_t>(other | 2);
        break;
      case 7:
        must_fail = other != output.count;
        output.count = other;
        break;
      case 8:
        output.kind = static_cast<int32_t>(other | 4);
        break;
      default:
        must_fail = output.count != 0;
        output.data = nullptr;
    }
    // An empty batch of other sizes may be refused or answered with nothing.
    if (images.batch == 0) must_fail = false;
  }
  ++figures.calls;
  const int status = vit_engine_forward(engine, at, to, num_outputs, r.of(threads));
  check_error(status != VIT_OK);
  figures.served += status == VIT_OK;
  if (must_fail && status == VIT_OK) wrong("a call that cannot be meant was served");
}

void null_calls(vit_engine* engine, const std::string& folder) {
  vit_engine_config config{};
  int64_t bytes = 0;
  double seconds[VIT_PHASES];
  vit_output output{};
  vit_images images{};
  vit_name name{};
  const auto refused = [](int status) {
    check_error(status != VIT_OK);
    if (status == VIT_OK) wrong("a null pointer was accepted");
  };
  const auto none = [](vit_engine* made) {
    check_error(!made);
    if (made) wrong("an engine of nothing");
    vit_engine_destroy(made);
  };
  none(vit_engine_create(nullptr, 0));
  none(vit_engine_map(nullptr, 0));
  none(vit_engine_build(nullptr, nullptr, 0, nullptr, 0, 0));
  none(vit_engine_build(&config, nullptr, 3, nullptr, 0, 0));
  none(vit_engine_build(&config, nullptr, INT64_MAX, nullptr, INT64_MAX, INT64_MAX));
  const vit_tensor tensor{nullptr, nullptr, 0, 0};
  const vit_text text{nullptr, nullptr};
  none(vit_engine_build(&config, &tensor, 1, &text, 1, 0));
  none(vit_engine_build(&config, &tensor, -1, &text, -1, -1));
  for (const char* path : {"", "/", "/dev/zero", "/dev/null", "/nowhere/x"}) none(vit_engine_create(path, 0));
  const std::string pipe = folder + "/pipe";
  mkfifo(pipe.c_str(), 0600);
  none(vit_engine_create(pipe.c_str(), 0));
  none(vit_engine_map(pipe.c_str(), 0));
  refused(vit_engine_save(nullptr, "x"));
  refused(vit_engine_forward(nullptr, &images, &output, 1, 0));
  const vit_grid grid{16, 16, nullptr, 0, nullptr, 0};
  refused(vit_engine_forward_grid(nullptr, &images, &grid, &output, 1, 0));
  refused(vit_engine_get_config(nullptr, &config));
  refused(vit_engine_memory(nullptr, &bytes, nullptr));
  refused(vit_engine_profile(nullptr, 1));
  refused(vit_engine_profile_read(nullptr, seconds));
  if (vit_engine_text(nullptr, "isa")) wrong("a text of no engine");
  vit_engine_destroy(nullptr);
  for (const int32_t i : {-1, INT32_MIN, INT32_MAX, static_cast<int32_t>(VIT_PHASES)})
    if (vit_engine_phase_name(i)) wrong("a phase that there is not");
  refused(vit_engine_name(-1, &name));
  refused(vit_engine_name(INT32_MAX, &name));
  refused(vit_engine_name(0, nullptr));
  if (!engine) return;
  refused(vit_engine_save(engine, nullptr));
  refused(vit_engine_save(engine, ""));
  refused(vit_engine_save(engine, (folder + "/none/x").c_str()));
  refused(vit_engine_forward(engine, nullptr, &output, 1, 0));
  refused(vit_engine_forward(engine, &images, nullptr, 1, 0));
  refused(vit_engine_forward_grid(engine, &images, nullptr, &output, 1, 0));
  refused(vit_engine_forward_grid(engine, &images, &grid, &output, 1, 0));  // of which no position is given
  refused(vit_engine_get_config(engine, nullptr));
  refused(vit_engine_profile_read(engine, nullptr));
  vit_engine_memory(engine, nullptr, nullptr);
  if (vit_engine_text(engine, nullptr)) wrong("a text of no key");
}

Handle build(Network& n, const std::vector<vit_text>& texts = {}, int64_t max_batch = 0) {
  return Handle(vit_engine_build(&n.config, n.tensors.data(), static_cast<int64_t>(n.tensors.size()), texts.data(),
                                 static_cast<int64_t>(texts.size()), max_batch));
}

void network_case(Random& r, const std::string& folder) {
  Network n = random_network(r);
  const bool sound = r.chance(0.6);
  if (!sound)
    for (int64_t i = r.within(1, 2); i > 0; --i) spoil(r, n);
  const std::string value = r.chance(0.5) ? r.of(kTexts) : std::string("a\"\\\n\x01\xc3\xa4\xff");
  const std::vector<vit_text> texts{{"note", value.c_str()}};
  ++figures.networks;
  const int64_t limit = r.chance(0.7) ? 0 : r.chance(0.7) ? 3 : r.of(kNumbers);
  const bool plain = limit == 0 || limit == 3;
  // Memory for a batch beyond reason is the caller's wish, and its own kind of test.
  Handle engine = build(n, texts, plain ? limit : std::min<int64_t>(limit, 16));
  check_error(!engine);
  if (sound && plain && !engine) wrong(std::string("a sound network was refused: ") + vit_engine_last_error());
  if (r.chance(0.1)) null_calls(engine.get(), folder);
  if (!engine) return;
  ++figures.built;
  for (int i = 0; i < 4; ++i) random_call(r, engine.get());
  const std::string path = folder + "/input.vit";
  if (vit_engine_save(engine.get(), path.c_str()) != VIT_OK) return wrong("saving failed");
  const Handle again(r.chance(0.5) ? vit_engine_create(path.c_str(), 0) : vit_engine_map(path.c_str(), 0));
  if (!again) return wrong(std::string("a saved engine was refused: ") + vit_engine_last_error());
  const int64_t batch = limit == 1 ? 1 : 2;  // the limit is not saved
  const std::vector<float> results = fixed_call(engine.get(), batch);
  compare(results, fixed_call(engine.get(), batch), "a second call gives other results");
  compare(results, fixed_call(again.get(), batch), "a saved engine gives other results");
  const char* kept = vit_engine_text(again.get(), "note");
  if (!kept || kept != value) wrong("a text is not what was saved");
}

// ---- engine files ----

uint32_t crc32c(const std::string& data, std::size_t begin, std::size_t end) {
  uint32_t crc = ~0u;
  for (std::size_t i = begin; i < end; ++i) {
    crc ^= static_cast<unsigned char>(data[i]);
    for (int bit = 0; bit < 8; ++bit) crc = crc >> 1 ^ (crc & 1 ? 0x82f63b78u : 0);
  }
  return ~crc;
}

std::string digits(uint32_t value) {
  char text[9];
  std::snprintf(text, sizeof text, "%08x", value);
  return text;
}

std::size_t header_end(const std::string& file) {
  uint64_t length = 0;
  if (file.size() < 8) return 0;
  for (int i = 0; i < 8; ++i) length |= static_cast<uint64_t>(static_cast<unsigned char>(file[i])) << (8 * i);
  return length <= file.size() - 8 ? 8 + static_cast<std::size_t>(length) : 0;
}

void set_header(std::string& file, std::size_t old_end, std::string header) {
  while ((header.size() + 8) % 64) header += ' ';
  std::string length(8, '\0');
  for (int i = 0; i < 8; ++i) length[i] = static_cast<char>(header.size() >> (8 * i));
  file = length + header + file.substr(old_end);
}

// Makes the checksums anew, as a forger would: of the tensors as far as their offsets can be read, then of the header.
void forge(std::string& file) {
  const std::size_t end = header_end(file);
  if (!end) return;
  std::string header = file.substr(8, end - 8);
  std::vector<std::pair<std::size_t, std::size_t>> places;
  const std::string mark = "\"data_offsets\":[";
  for (std::size_t at = header.find(mark); at != std::string::npos; at = header.find(mark, at + 1)) {
    unsigned long long begin = 0, finish = 0;
    if (std::sscanf(header.c_str() + at + mark.size(), "%llu,%llu", &begin, &finish) != 2) continue;
    if (begin <= finish && finish <= file.size() - end) places.emplace_back(begin, finish);
  }
  std::sort(places.begin(), places.end());
  std::string sums;
  for (const auto& [begin, finish] : places)
    sums += (sums.empty() ? "" : " ") + digits(crc32c(file, end + begin, end + finish));
  const std::string data_key = "\"crc32c\":\"", header_key = "\"crc32c header\":\"";
  std::size_t at = header.find(data_key);
  if (at == std::string::npos) return;
  at += data_key.size();
  const std::size_t quote = header.find('"', at);
  if (quote == std::string::npos) return;
  header.replace(at, quote - at, sums);
  at = header.find(header_key);
  if (at == std::string::npos || at + header_key.size() + 8 > header.size()) return;
  at += header_key.size();
  header.replace(at, 8, "00000000");
  while (!header.empty() && header.back() == ' ') header.pop_back();
  set_header(file, end, header);
  file.replace(8 + at, 8, digits(crc32c(file, 0, header_end(file))));
}

// Changes a token of the header: a number, a text, or a part of the JSON.
void change_header(Random& r, std::string& file) {
  const std::size_t end = header_end(file);
  if (!end) return;
  std::string header = file.substr(8, end - 8);
  while (!header.empty() && header.back() == ' ') header.pop_back();
  const auto size = static_cast<int64_t>(header.size());
  auto at = static_cast<std::size_t>(r.below(r.chance(0.5) ? std::min<int64_t>(size, 600) : size));
  const auto is_digit = [&](std::size_t i) { return i < header.size() && header[i] >= '0' && header[i] <= '9'; };
  const auto end_of_digits = [&](std::size_t from) {
    while (is_digit(from)) ++from;
    return from;
  };
  switch (r.below(7)) {
    case 0:
    case 1:
    case 2:
      while (at < header.size() && !is_digit(at)) ++at;
      header.replace(at, end_of_digits(at) - at, std::to_string(r.of(kNumbers)));
      break;
    case 3: {
      at = header.find('"', at);
      if (at == std::string::npos) break;
      const std::size_t quote = header.find('"', at + 1);
      if (quote != std::string::npos) header.replace(at + 1, quote - at - 1, r.of(kTexts));
      break;
    }
    case 4:
      header.insert(at, header.substr(at, static_cast<std::size_t>(r.below(200))));
      break;
    case 5:
      header.erase(at, static_cast<std::size_t>(r.within(1, 60)));
      break;
    default: {
      const char* const parts[] = {"{", "}", "[", "]", ",", ":", "\"", "\\", "\\u12", "1e9", "-", "null", "[[[[[["};
      header.insert(at, r.of(parts));
    }
  }
  set_header(file, end, header);
}

void change_bytes(Random& r, std::string& file) {
  const auto size = static_cast<int64_t>(file.size());
  const auto at = static_cast<std::size_t>(r.below(r.chance(0.3) ? std::min<int64_t>(size, 16) : size));
  switch (r.below(7)) {
    case 0:
      file.resize(at);
      break;
    case 1:
      file.insert(at, static_cast<std::size_t>(r.within(1, 130)), static_cast<char>(r.next()));
      break;
    case 2:
      file.erase(at, static_cast<std::size_t>(r.within(1, 130)));
      break;
    case 3:
      file += std::string(static_cast<std::size_t>(r.within(1, 4096)), '\0');
      break;
    case 4:
      for (std::size_t i = at; i < std::min(file.size(), at + 4); ++i)
        file[i] = static_cast<char>(0xff - (i == at + 3) * 0x80);
      break;
    default:
      file[at] = static_cast<char>(file[at] ^ (1 << r.below(8)));
  }
}

struct Sound {
  std::string file;
  std::vector<float> results;
};

std::vector<Sound> sound_files(Random& r, const std::string& folder) {
  std::vector<Sound> found;
  for (int32_t precision = VIT_FLOAT32; precision <= VIT_INT8; ++precision) {
    Network n = random_network(r);
    while (n.config.precision != precision) n = random_network(r);
    for (auto& tensor : n.tensors) tensor.name = n.names[static_cast<std::size_t>(&tensor - n.tensors.data())].c_str();
    const Handle engine = build(n);
    const std::string path = folder + "/input.vit";
    if (!engine || vit_engine_save(engine.get(), path.c_str()) != VIT_OK) {
      std::printf("no sound file: %s\n", vit_engine_last_error());
      std::exit(2);
    }
    std::ifstream in(path, std::ios::binary);
    found.push_back({std::string(std::istreambuf_iterator<char>(in), {}), fixed_call(engine.get())});
  }
  return found;
}

void file_case(Random& r, const std::string& folder, const std::vector<Sound>& sound) {
  const Sound& seed = sound[static_cast<std::size_t>(r.below(static_cast<int64_t>(sound.size())))];
  std::string file = seed.file;
  for (int64_t i = r.within(1, 2); i > 0 && file.size() > 16; --i)
    r.chance(0.6) ? change_header(r, file) : change_bytes(r, file);
  const bool forged = r.chance(0.5);
  if (forged) forge(file);
  const std::string path = folder + "/input.vit";
  std::ofstream(path, std::ios::binary | std::ios::trunc).write(file.data(), static_cast<std::streamsize>(file.size()));
  ++figures.files;
  const Handle engine(r.chance(0.8) ? vit_engine_create(path.c_str(), 0) : vit_engine_map(path.c_str(), 2));
  check_error(!engine);
  if (!engine) {
    ++figures.refused;
    return;
  }
  ++figures.accepted;
  vit_engine_config c{};
  vit_engine_get_config(engine.get(), &c);
  if (!is_small(c)) return;
  const std::vector<float> results = fixed_call(engine.get());
  if (!forged) compare(seed.results, results, "a damaged file gives other results");
  for (int i = 0; i < 2; ++i) random_call(r, engine.get());
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 5) {
    std::puts("engine_fuzz FOLDER SEED FIRST COUNT");
    return 2;
  }
  const std::string folder = argv[1];
  // Of two processes with one folder each would read what the other writes: other results, or a mapped file cut short.
  const int lock = open((folder + "/lock").c_str(), O_CREAT | O_RDWR | O_CLOEXEC, 0600);
  if (lock < 0 || flock(lock, LOCK_EX | LOCK_NB) != 0) {
    std::printf("%s: is there no such folder, or does another process use it?\n", argv[1]);
    return 2;
  }
  const uint64_t seed = std::strtoull(argv[2], nullptr, 10);
  const int64_t first = std::atoll(argv[3]), count = std::atoll(argv[4]);
  Random start{seed};
  const std::vector<Sound> sound = sound_files(start, folder);
  for (int64_t number = first; number < first + count; ++number) {
    current_case = number;
    std::ofstream(folder + "/case", std::ios::trunc) << number << std::flush;
    const itimerval limit{{0, 0}, {kSeconds, 0}};
    setitimer(ITIMER_PROF, &limit, nullptr);
    Random r{seed * 0x9e3779b97f4a7c15u ^ static_cast<uint64_t>(number)};
    r.next();
    if (number % 4 == 0)
      network_case(r, folder);
    else
      file_case(r, folder, sound);
  }
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  std::printf(
      "{\"networks\": %ld, \"built\": %ld, \"calls\": %ld, \"served\": %ld, \"files\": %ld, \"accepted\": %ld, "
      "\"refused\": %ld, \"wrong\": %ld, \"peak_mib\": %ld}\n",
      figures.networks, figures.built, figures.calls, figures.served, figures.files, figures.accepted, figures.refused,
      figures.wrong, usage.ru_maxrss / 1024);
  return figures.wrong ? 3 : 0;
}
