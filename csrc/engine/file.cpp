#include "engine/file.h"

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <set>

#include "engine/crc32c.h"
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
    for (; at < end && *at >= '0' && *at <= '9'; ++at)
      if (__builtin_mul_overflow(value, 10, &value) || __builtin_add_overflow(value, *at - '0', &value))
        throw std::string("its header has a number above 2^63");
    if (at == first) throw std::string("its header lacks a number");
    return value;
  }

  // Calls f(key) for every member of an object; f reads the value.
  template <class F>
  void object(const F& f) {
    std::set<std::string> keys;
    expect('{');
    if (take('}')) return;
    do {
      const std::string key = string();
      if (!keys.insert(key).second) throw quoted(key) + " stands twice in its header";
      expect(':');
      f(key);
    } while (take(','));
    expect('}');
  }

  // Nothing but white space is left.
  void finish() {
    take(' ');
    if (at != end) throw std::string("its header goes on behind its end");
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
    switch (const char c = next()) {
      case 'u':
        return unicode(out);
      case 'n':
        out += '\n';
        return;
      case 't':
        out += '\t';
        return;
      case 'r':
        out += '\r';
        return;
      case 'b':
        out += '\b';
        return;
      case 'f':
        out += '\f';
        return;
      default:
        out += c;
    }
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
  if (__builtin_mul_overflow(count, std::max<int64_t>(element, 1), &count))
    throw "tensor " + name + " has an impossible shape";
  if (record.begin < 0 || record.end < record.begin || (element && record.end - record.begin != count))
    throw "tensor " + name + " has offsets that do not fit its shape";
  return record;
}

// Sorts the tensors by their place; throws std::string where they leave a gap, overlap, or do not end with the file.
void check_offsets(Header& header, std::size_t size) {
  auto& records = header.records;
  std::sort(records.begin(), records.end(),
            [](const Record& a, const Record& b) { return a.begin != b.begin ? a.begin < b.begin : a.end < b.end; });
  int64_t end = 0;
  for (const Record& r : records) {
    if (static_cast<uint64_t>(r.end) > size - header.bytes)
      throw "it is truncated: tensor " + r.name + " ends at byte " + std::to_string(r.end) + " of " +
          std::to_string(size - header.bytes) + " behind its header";
    if (r.begin != end)
      throw "tensor " + r.name + " has offsets that " + (r.begin < end ? "overlap" : "leave a gap behind") +
          " the tensor before it";
    end = r.end;
  }
  if (static_cast<uint64_t>(end) != size - header.bytes)
    throw "it has " + std::to_string(size - header.bytes - static_cast<uint64_t>(end)) +
        " bytes behind its last tensor";
}

constexpr std::size_t kMostHeader = std::size_t{64} << 20;
const std::string kNoChecksum = "00000000";

std::string eight_digits(uint32_t value) {
  char text[9];
  std::snprintf(text, sizeof text, "%08x", value);
  return text;
}

// Where the digits of the header's checksum begin; npos where it has none. Quotes inside texts are escaped: this can
// stand nowhere else.
std::size_t place_of_checksum(const std::string& header) {
  const std::string before = quoted(kHeaderChecksum) + ":\"";
  const std::size_t found = header.find(before);
  if (found == std::string::npos || found + before.size() + kNoChecksum.size() > header.size())
    return std::string::npos;
  return found + before.size();
}

[[noreturn]] void refuse(const std::string& path, const std::string& reason) {
  throw EngineError(kFile, "vit engine: " + path + " is not an engine file: " + reason);
}

}  // namespace

int64_t element_size(const std::string& dtype) {
  if (dtype == "F32" || dtype == "I32") return 4;
  if (dtype == "BF16" || dtype == "U16") return 2;
  return dtype == "I8" || dtype == "U8" ? 1 : 0;
}

std::string write_header(Texts texts, const std::vector<Record>& records, const std::vector<uint32_t>& checksums) {
  std::string& of_data = texts[kDataChecksums] = "";
  for (const uint32_t checksum : checksums) of_data += (of_data.empty() ? "" : " ") + eight_digits(checksum);
  texts[kHeaderChecksum] = kNoChecksum;
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
  out += json;
  const std::string checksum = eight_digits(crc32c(out.data(), out.size()));
  return out.replace(place_of_checksum(out), checksum.size(), checksum);
}

std::size_t header_bytes(const std::string& start, std::size_t size, const std::string& path) {
  uint64_t length = 0;
  if (start.size() < 8) refuse(path, "it is shorter than the length of its header");
  for (int i = 0; i < 8; ++i) length |= static_cast<uint64_t>(static_cast<unsigned char>(start[i])) << (8 * i);
  if (start.size() < 9 || start[8] != '{') refuse(path, "it does not begin with a header");
  if (length > size - 8) refuse(path, "it is truncated: its header is longer than the file");
  if (length > kMostHeader)
    refuse(path, "its header has " + std::to_string(length) + " bytes; at most " + std::to_string(kMostHeader) +
                     " are allowed");
  return 8 + static_cast<std::size_t>(length);
}

Header read_header(const std::string& bytes, std::size_t size, const std::string& path) {
  Header header;
  header.bytes = bytes.size();
  try {
    Json json(bytes.data() + 8, bytes.data() + bytes.size());
    json.object([&](const std::string& key) {
      if (key != "__metadata__") {
        header.records.push_back(read_record(json, key));
        return;
      }
      json.object([&](const std::string& name) { header.texts[name] = json.string(); });
    });
    json.finish();
    check_offsets(header, size);
  } catch (const std::string& reason) {
    refuse(path, reason);
  }
  const auto found = header.texts.find(kHeaderChecksum);
  const std::size_t place = place_of_checksum(bytes);
  if (found == header.texts.end() || place == std::string::npos) return header;
  std::string blank = bytes;
  blank.replace(place, kNoChecksum.size(), kNoChecksum);
  header.intact = found->second == eight_digits(crc32c(blank.data(), blank.size()));
  return header;
}

const Record* damaged(const Header& header, const char* file) {
  const auto found = header.texts.find(kDataChecksums);
  const std::string given = found == header.texts.end() ? "" : found->second;
  std::size_t at = 0;
  for (const Record& r : header.records) {
    const char* data = file + header.bytes + r.begin;
    if (given.compare(at, 8, eight_digits(crc32c(data, static_cast<std::size_t>(r.end - r.begin)))) != 0) return &r;
    at = std::min(at + 9, given.size());
  }
  return nullptr;
}

std::vector<uint32_t> checksums_of(const std::vector<Record>& records, const char* data) {
  std::vector<uint32_t> checksums;
  for (const Record& r : records)
    checksums.push_back(crc32c(data + r.begin, static_cast<std::size_t>(r.end - r.begin)));
  return checksums;
}

}  // namespace vit::engine
