// An engine from its file, and the file from an engine.
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

// The whole text as a number; false for anything else, and for numbers that T does not have.
template <class T>
bool parse(const std::string& text, T& value) {
  std::istringstream in(text);
  in.imbue(std::locale::classic());  // the program may have chosen a decimal comma
  return (in >> std::noskipws >> value) && in.peek() == std::istringstream::traits_type::eof();
}

}  // namespace

std::unique_ptr<Engine> Engine::open(const std::string& path, int64_t max_batch, Access access) {
  const auto refuse = [&](const std::string& why) { throw EngineError(kFile, "vit engine: " + path + " " + why); };
  const InputFile file(path);
  // The header is checked before memory is taken for the rest.
  const std::string head = file.head(header_bytes(file.head(9), file.size(), path));
  Header header = read_header(head, file.size(), path);
  const auto text = [&](const std::string& key) {
    const auto found = header.texts.find(key);
    if (found == header.texts.end()) refuse("is not an engine file: it says nothing about " + key);
    return found->second;
  };
  if (header.texts.count("format") == 0 || text("format") != kFormat)
    refuse("is not an engine file but other safetensors; make one with vit.Engine(model).save(path)");
  const bool old = text("version") == std::to_string(kOldestVersion);
  if (!old && text("version") != std::to_string(VIT_ENGINE_VERSION))
    refuse("has format version " + text("version") + ", this library reads " + std::to_string(kOldestVersion) + " to " +
           std::to_string(VIT_ENGINE_VERSION) + "; save it again with this version of vit");
  if (!header.intact) refuse("is damaged: the checksum of its header is not that of its content");
  if (text("isa") != level())
    refuse("was made for the instruction-set level " + text("isa") + ", this process uses " + level() +
           "; save it again on a machine of this kind");

  vit_engine_config config{};
  std::set<std::string> absent;
  if (old) for_options(config, [&](const char* name, auto&) { absent.insert(name); });
  for_fields(config, [&](const char* name, auto& value) {
    if (absent.count(name)) return;
    if (!parse(text(name), value)) refuse("is damaged: " + std::string(name) + " is \"" + text(name) + "\"");
  });
  if (!parse(text("norm_eps"), config.norm_eps)) refuse("is damaged: norm_eps is \"" + text("norm_eps") + "\"");
  std::unique_ptr<Engine> engine;
  try {
    engine.reset(new Engine(config, max_batch));
  } catch (const EngineError& error) {
    if (max_batch < 0) throw;
    refuse("is damaged: " + std::string(error.what()));
  }
  Network& n = engine->network_;

  std::map<std::string, const Record*> records;
  for (const Record& r : header.records) records[r.name] = &r;
  const auto record = [&](const std::string& name) -> const Record& {
    const auto found = records.find(name);
    if (found == records.end()) refuse("is damaged: tensor " + name + " is missing");
    return *found->second;
  };
  for_linears(n, [&](const std::string& name, Linear& linear, int64_t, int64_t) {
    const std::string& dtype = record(name + ".weight").dtype;
    if (!precision_of_dtype(dtype, linear.precision))
      refuse("is damaged: tensor " + name + ".weight is of type " + dtype);
    if (!allowed(name, linear.precision, n.shape.precision))
      refuse("is damaged: " + name + ".weight is " + dtype + ", which this engine's precision does not allow");
  });
  const std::vector<Part> parts = parts_of(n);
  for (const Part& part : parts) {
    const Record& stored = record(part.name);
    const Record wanted = record_of(part, stored.begin);
    if (stored.dtype != wanted.dtype || stored.end != wanted.end || (header.bytes + stored.begin) % 64)
      refuse("is damaged: tensor " + part.name + " has " + std::to_string(stored.end - stored.begin) + " bytes of " +
             stored.dtype + ", not " + std::to_string(wanted.end - wanted.begin) + " of " + wanted.dtype);
  }
  for (const Part& part : parts) records.erase(part.name);
  if (!records.empty()) refuse("is damaged: tensor " + records.begin()->first + " belongs to no part of the network");

  Mapping image = access == Access::map ? file.map() : file.copy();
  if (std::memcmp(image.data(), head.data(), head.size()) != 0) refuse("was changed while it was read");
  if (const Record* bad = damaged(header, image.data()))
    refuse("is damaged: the data of tensor " + bad->name + " are not those of their checksum");
  std::map<std::string, int64_t> begins;
  for (const Record& r : header.records) begins[r.name] = r.begin;
  for (const Part& part : parts) point(part, image.data() + header.bytes + begins[part.name]);
  if (!can_normalize(n)) refuse("is damaged: mean and std of pixels are not finite, or std is not above 0");
  engine->texts_ = std::move(header.texts);
  engine->image_ = std::move(image);
  if (max_batch) engine->reserve(engine->network_, max_batch, available_threads());
  return engine;
}

void Engine::save(const std::string& path) const { replace_file(path, image_.data(), image_.size()); }

}  // namespace vit::engine
