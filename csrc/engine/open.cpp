// An engine from its file, and the file from an engine.
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <type_traits>

#include "engine/config.h"
#include "engine/engine.h"
#include "engine/executor.h"
#include "engine/parts.h"

namespace vit::engine {

std::unique_ptr<Engine> Engine::open(const std::string& path, int64_t max_batch) {
  const auto refuse = [&](const std::string& why) { throw EngineError(kFile, "vit engine: " + path + " " + why); };
  Mapping image = Mapping::file(path);
  Header header = read_header(image.data(), image.size(), path);
  const auto text = [&](const std::string& key) {
    const auto found = header.texts.find(key);
    if (found == header.texts.end()) refuse("is not an engine file: it says nothing about " + key);
    return found->second;
  };
  if (header.texts.count("format") == 0 || text("format") != kFormat)
    refuse("is not an engine file but other safetensors; make one with vit.Engine(model).save(path)");
  if (text("version") != std::to_string(VIT_ENGINE_VERSION))
    refuse("has format version " + text("version") + ", this library reads " + std::to_string(VIT_ENGINE_VERSION) +
           "; save it again with this version of vit");
  if (text("isa") != level())
    refuse("was made for the instruction-set level " + text("isa") + ", this process uses " + level() +
           "; save it again on a machine of this kind");

  vit_engine_config config{};
  for_fields(config, [&](const char* name, auto& value) {
    char* end = nullptr;
    const std::string digits = text(name);
    value = static_cast<std::remove_reference_t<decltype(value)>>(std::strtoll(digits.c_str(), &end, 10));
    if (digits.empty() || *end) refuse("is damaged: " + std::string(name) + " is \"" + digits + "\"");
  });
  config.norm_eps = std::strtod(text("norm_eps").c_str(), nullptr);
  std::unique_ptr<Engine> engine;
  try {
    engine.reset(new Engine(config, max_batch));
  } catch (const EngineError& error) {
    if (max_batch < 0) throw;
    refuse("is damaged: " + std::string(error.what()));
  }
  Network& n = engine->network_;

  const auto record = [&](const std::string& name) -> const Record& {
    const auto found = header.records.find(name);
    if (found == header.records.end()) refuse("is damaged: tensor " + name + " is missing");
    return found->second;
  };
  for_linears(n, [&](const std::string& name, Linear& linear, int64_t, int64_t) {
    const std::string& dtype = record(name + ".weight").dtype;
    if (!precision_of_dtype(dtype, linear.precision))
      refuse("is damaged: tensor " + name + ".weight is of type " + dtype);
    if (!allowed(name, linear.precision, n.shape.precision))
      refuse("is damaged: " + name + ".weight is " + dtype + ", which this engine's precision does not allow");
  });
  char* data = image.data() + header.bytes;
  for (const Part& part : parts_of(n)) {
    const Record& stored = record(part.name);
    const Record wanted = record_of(part, stored.begin);
    if (stored.dtype != wanted.dtype || stored.end != wanted.end || (header.bytes + stored.begin) % 64)
      refuse("is damaged: tensor " + part.name + " has " + std::to_string(stored.end - stored.begin) + " bytes of " +
             stored.dtype + ", not " + std::to_string(wanted.end - wanted.begin) + " of " + wanted.dtype);
    point(part, data + stored.begin);
  }
  engine->texts_ = std::move(header.texts);
  engine->image_ = std::move(image);
  if (max_batch) engine->reserve(max_batch, default_threads());
  return engine;
}

void Engine::save(const std::string& path) const {
  const std::string part = path + ".part";  // a program that has the old file mapped keeps it
  std::FILE* file = std::fopen(part.c_str(), "wb");
  bool ok = file && std::fwrite(image_.data(), 1, image_.size(), file) == image_.size();
  if (file) ok = (std::fclose(file) == 0) && ok;
  ok = ok && std::rename(part.c_str(), path.c_str()) == 0;
  if (ok) return;
  const int error = errno;
  if (file) std::remove(part.c_str());
  throw EngineError(kFile, "vit engine: cannot write " + path + ": " + std::strerror(error));
}

}  // namespace vit::engine
