// An engine from weights: every tensor into the bytes of an engine file.
#include <algorithm>
#include <cstdio>
#include <cstring>

#include "engine/config.h"
#include "engine/engine.h"
#include "engine/executor.h"
#include "engine/parts.h"

namespace vit::engine {
namespace {

using Sources = std::map<std::string, const vit_tensor*>;

const vit_tensor* find(const Sources& sources, const Part& part) {
  const auto found = sources.find(part.name);
  if (found == sources.end()) {
    if (!part.optional) invalid("tensor " + part.name + " is missing");
    return nullptr;
  }
  const vit_tensor& tensor = *found->second;
  if (tensor.count != part.count || !tensor.data)
    invalid("tensor " + part.name + " has " + std::to_string(tensor.count) + " values; " + std::to_string(part.count) +
            " are needed");
  return &tensor;
}

Precision precision_of(const Sources& sources, const std::string& name, Precision widest) {
  const auto found = sources.find(name + ".weight");
  if (found == sources.end()) invalid("tensor " + name + ".weight is missing");
  const auto precision = static_cast<Precision>(found->second->precision);
  if (!allowed(name, precision, widest))
    invalid("tensor " + name + ".weight is to be packed as precision " + std::to_string(int(precision)) +
            ", which the engine's does not allow here");
  return precision;
}

std::string seventeen_digits(double value) {
  char text[32];
  std::snprintf(text, sizeof text, "%.17g", value);
  return text;
}

}  // namespace

std::unique_ptr<Engine> Engine::build(const vit_engine_config& config, const vit_tensor* tensors, int64_t num_tensors,
                                      const Texts& texts, int64_t max_batch) {
  std::unique_ptr<Engine> engine(new Engine(config, max_batch));
  Network& n = engine->network_;
  Sources sources;
  for (int64_t i = 0; i < num_tensors; ++i) sources[tensors[i].name] = &tensors[i];

  const Precision precision = n.shape.precision;
  for_linears(n, [&](const std::string& name, Linear& linear, int64_t, int64_t) {
    linear.precision = in_block(name) ? precision_of(sources, name, precision) : precision_of_end(name, precision);
  });
  const std::vector<Part> parts = parts_of(n);
  std::vector<Record> records;
  int64_t bytes = 0;
  for (const Part& part : parts) {
    records.push_back(record_of(part, bytes));
    bytes = records.back().end;
  }
  engine->texts_ = texts;
  Texts& written = engine->texts_;
  written["format"] = kFormat;
  written["version"] = std::to_string(VIT_ENGINE_VERSION);
  written["isa"] = level();
  written["norm_eps"] = seventeen_digits(config.norm_eps);
  for_fields(config, [&](const char* name, auto value) { written[name] = std::to_string(value); });
  const std::string header = write_header(written, records);

  engine->image_ = Mapping::anonymous(header.size() + static_cast<std::size_t>(bytes), "packed weights");
  char* data = engine->image_.data() + header.size();
  std::memcpy(engine->image_.data(), header.data(), header.size());
  for (std::size_t i = 0; i < parts.size(); ++i) point(parts[i], data + records[i].begin);
  for (const Part& part : parts) {
    if (part.derived) continue;
    const vit_tensor* source = find(sources, part);
    if (part.vector) {
      if (source && part.count > 0)
        std::memcpy(*part.vector, source->data, static_cast<std::size_t>(part.count) * sizeof(float));
    } else {
      pack({source->data, part.matrix, default_threads()});
    }
  }
  if (max_batch) engine->reserve(max_batch, default_threads());
  return engine;
}

}  // namespace vit::engine
