// An engine from weights: every tensor into the bytes of an engine file.
#include <cstring>
#include <locale>
#include <map>
#include <set>
#include <sstream>

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

// The scales of a matrix whose rows are rounded already.
Part scale_of_rows(const Part& matrix) {
  const std::string layer = matrix.name.substr(0, matrix.name.rfind('.'));
  return {layer + ".scale", nullptr, nullptr, nullptr, matrix.matrix->N, true, false};
}

// As every reader understands it, whatever decimal point the program has chosen.
std::string seventeen_digits(double value) {
  std::ostringstream out;
  out.imbue(std::locale::classic());
  out.precision(17);
  out << value;
  return out.str();
}

Sources by_name(const vit_tensor* tensors, int64_t num_tensors) {
  Sources sources;
  for (int64_t i = 0; i < num_tensors; ++i) {
    if (!tensors[i].name) invalid("the name of tensor number " + std::to_string(i) + " is null");
    if (!sources.emplace(tensors[i].name, &tensors[i]).second)
      invalid("tensor " + std::string(tensors[i].name) + " is given twice");
  }
  return sources;
}

// A tensor that the network does not read is a part of the model that the engine would leave out.
void check_all_read(const Sources& sources, const std::vector<Part>& parts) {
  std::set<std::string> read;
  for (const Part& part : parts) {
    if (!part.derived) read.insert(part.name);
    if (part.matrix) read.insert(scale_of_rows(part).name);
  }
  std::string names;
  for (const auto& [name, source] : sources)
    if (!read.count(name)) names += (names.empty() ? "" : ", ") + name;
  if (!names.empty())
    throw EngineError(kUnsupported, "vit engine: the network has no part that reads " + names +
                                        "; the engine cannot compute what it stands for");
}

void check_finite(const vit_tensor& tensor) {
  float differences = 0;  // x - x: 0, or NaN
  for (int64_t i = 0; i < tensor.count; ++i) differences += tensor.data[i] - tensor.data[i];
  if (!(differences == 0)) invalid("tensor " + std::string(tensor.name) + " holds NaN or infinity");
}

}  // namespace

std::unique_ptr<Engine> Engine::build(const vit_engine_config& config, const vit_tensor* tensors, int64_t num_tensors,
                                      const Texts& texts, int64_t max_batch) {
  std::unique_ptr<Engine> engine(new Engine(config, max_batch));
  Network& n = engine->network_;
  const Sources sources = by_name(tensors, num_tensors);
  const Precision precision = n.shape.precision;
  for_linears(n, [&](const std::string& name, Linear& linear, int64_t, int64_t) {
    linear.precision = in_block(name) ? precision_of(sources, name, precision) : precision_of_end(name, precision);
  });
  const std::vector<Part> parts = parts_of(n);
  check_all_read(sources, parts);
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
  std::string header = write_header(written, records, std::vector<uint32_t>(records.size()));

  engine->image_ = Mapping::anonymous(header.size() + static_cast<std::size_t>(bytes), "packed weights");
  char* data = engine->image_.data() + header.size();
  for (std::size_t i = 0; i < parts.size(); ++i) point(parts[i], data + records[i].begin);
  for (const Part& part : parts) {
    if (part.derived) continue;
    const vit_tensor* source = find(sources, part);
    if (source) check_finite(*source);
    if (part.vector) {
      if (source && part.count > 0)
        std::memcpy(*part.vector, source->data, static_cast<std::size_t>(part.count) * sizeof(float));
    } else {
      const vit_tensor* scale = find(sources, scale_of_rows(part));
      if (scale) check_finite(*scale);
      pack({source->data, scale ? scale->data : nullptr, part.matrix, available_threads()});
    }
  }
  if (!can_normalize(n)) invalid("mean and std of pixels must be finite, std above 0");
  header = write_header(written, records, checksums_of(records, data));
  std::memcpy(engine->image_.data(), header.data(), header.size());
  if (max_batch) engine->reserve(engine->network_, max_batch, available_threads());
  return engine;
}

}  // namespace vit::engine
