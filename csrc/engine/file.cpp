#include "engine/file.h"

#include <cstdio>
#include <cstring>

#include "engine/error.h"

namespace vit::engine {
namespace {

std::string quoted(const std::string& text) {
  std::string out = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') out += '\\';
    if (static_cast<unsigned char>(c) < 0x20) {
      char escape[8];
      std::snprintf(escape, sizeof escape, "\\u%04x", c);
      out += escape;
    } else {
      out += c;
    }
  }
  return out + '"';
}

// Reads the part of JSON that safetensors headers are made of; throws std::string, the reason.
class Json {
 public:
  Json(const char* begin, const char* end) : at(begin), end(end) {}

  bool take(char c) {
    while (at < end && (*at == ' ' || *at == '\n' || *at == '\t' || *at == '\r')) ++at;
    if (at == end || *at != c) return false;
    ++at;
    return true;
  }
  void expect(char c) {
    if (!take(c)) throw std::string("its header is not JSON where '") + c + "' should stand";
  }

  std::string string() {
    expect('"');
    std::string out;
    while (true) {
      const char c = next();
      if (c == '"') return out;
      if (c == '\\')
        escape(out);
      else
        out += c;
    }
  }

  int64_t integer() {
    take(' ');  // skips white space
    int64_t value = 0;
    const char* first = at;
    for (; at < end && *at >= '0' && *at <= '9' && value <= INT64_MAX / 10 - 1; ++at) value = value * 10 + (*at - '0');
    if (at == first) throw std::string("its header lacks a number");
    return value;
  }

  // Calls f(key) for every member of an object; f reads the value.
  template <class F>
  void object(const F& f) {
    expect('{');
    if (take('}')) return;
    do {
      const std::string key = string();
      expect(':');
      f(key);
    } while (take(','));
    expect('}');
  }

  std::vector<int64_t> integers() {
    std::vector<int64_t> values;
    expect('[');
    if (take(']')) return values;
    do values.push_back(integer());
    while (take(','));
    expect(']');
    return values;
  }

 private:
  const char *at, *end;

  char next() {
    if (at == end) throw std::string("its header ends inside a text");
    return *at++;
  }

  void escape(std::string& out) {
    const char c = next();
    const char* known = std::strchr("n\nt\tr\rb\bf\f", c);
    if (c == 'u')
      unicode(out);
    else
      out += c && known ? known[1] : c;
  }

  void unicode(std::string& out) {
    unsigned code = 0;
    for (int i = 0; i < 4; ++i) {
      const char c = next();
      const char* digits = "0123456789abcdefABCDEF";
      const char* digit = c ? std::strchr(digits, c) : nullptr;
      if (!digit) throw std::string("its header has a broken escape");
      const auto value = static_cast<unsigned>(digit - digits);
      code = code * 16 + (value < 16 ? value : value - 6);
    }
    if (code >= 0x800) out += static_cast<char>(0xe0 | code >> 12);
    if (code >= 0x80) out += static_cast<char>(code >= 0x800 ? 0x80 | (code >> 6 & 0x3f) : 0xc0 | code >> 6);
    out += static_cast<char>(code >= 0x80 ? 0x80 | (code & 0x3f) : code);
  }
};

Record read_record(Json& json, const std::string& name) {
  Record record{name, "", -1, -1};
  int64_t count = 1;
  json.object([&](const std::string& key) {
    if (key == "dtype") {
      record.dtype = json.string();
    } else if (key == "shape") {
      for (const int64_t size : json.integers())
        if (__builtin_mul_overflow(count, size, &count)) throw "tensor " + name + " has an impossible shape";
    } else if (key == "data_offsets") {
      const std::vector<int64_t> offsets = json.integers();
      if (offsets.size() != 2) throw "tensor " + name + " lacks its two offsets";
      record.begin = offsets[0], record.end = offsets[1];
    } else {
      throw "tensor " + name + " has an unknown field " + key;
    }
  });
  const int64_t element = element_size(record.dtype);
  if (record.begin < 0 || record.end < record.begin || (element && record.end - record.begin != count * element))
    throw "tensor " + name + " has offsets that do not fit its shape";
  return record;
}

}  // namespace

int64_t element_size(const std::string& dtype) {
  if (dtype == "F32" || dtype == "I32") return 4;
  if (dtype == "BF16" || dtype == "U16") return 2;
  return dtype == "I8" || dtype == "U8" ? 1 : 0;
}

std::string write_header(const Texts& texts, const std::vector<Record>& records) {
  std::string json = "{\"__metadata__\":{";
  for (const auto& [key, value] : texts) json += (json.back() == '{' ? "" : ",") + quoted(key) + ":" + quoted(value);
  json += "}";
  for (const Record& r : records)
    json += "," + quoted(r.name) + ":{\"dtype\":\"" + r.dtype + "\",\"shape\":[" +
            std::to_string((r.end - r.begin) / element_size(r.dtype)) + "],\"data_offsets\":[" +
            std::to_string(r.begin) + "," + std::to_string(r.end) + "]}";
  json += "}";
  while ((json.size() + 8) % 64) json += ' ';
  std::string out(8, '\0');
  for (int i = 0; i < 8; ++i) out[i] = static_cast<char>(json.size() >> (8 * i));
  return out + json;
}

Header read_header(const char* data, std::size_t size, const std::string& path) {
  Header header;
  try {
    uint64_t length = 0;
    if (size < 8) throw std::string("it is shorter than the length of its header");
    for (int i = 0; i < 8; ++i) length |= static_cast<uint64_t>(static_cast<unsigned char>(data[i])) << (8 * i);
    if (size < 9 || data[8] != '{') throw std::string("it does not begin with a header");
    if (length > size - 8) throw std::string("it is truncated: its header is longer than the file");
    header.bytes = 8 + static_cast<std::size_t>(length);
    Json json(data + 8, data + header.bytes);
    json.object([&](const std::string& key) {
      if (key != "__metadata__") {
        header.records[key] = read_record(json, key);
        return;
      }
      json.object([&](const std::string& name) { header.texts[name] = json.string(); });
    });
    for (const auto& [name, record] : header.records)
      if (static_cast<uint64_t>(record.end) > size - header.bytes)
        throw "it is truncated: tensor " + name + " ends at byte " + std::to_string(header.bytes + record.end) +
            ", the file has " + std::to_string(size);
  } catch (const std::string& reason) {
    throw EngineError(kFile, "vit engine: " + path + " is not an engine file: " + reason);
  }
  return header;
}

}  // namespace vit::engine
