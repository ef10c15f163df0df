// Memory that lies on pages of its own, and files: read into such memory, mapped, or replaced as a whole.
#pragma once

#include <cstddef>
#include <string>

namespace vit::engine {

class Mapping {
 public:
  Mapping() = default;
  Mapping(Mapping&& other) noexcept { swap(other); }
  Mapping& operator=(Mapping&& other) noexcept {
    swap(other);
    return *this;
  }
  ~Mapping();

  // Zeroed memory on a 2 MiB boundary; throws EngineError, which says how much `what` needs.
  static Mapping anonymous(std::size_t bytes, const char* what);

  char* data() const { return data_; }
  std::size_t size() const { return size_; }

 private:
  friend class InputFile;
  void swap(Mapping& other) noexcept;

  char* data_ = nullptr;
  std::size_t size_ = 0;
  void* mapped_ = nullptr;  // what munmap takes
  std::size_t mapped_size_ = 0;
};

// A regular file that is read. All functions throw EngineError.
class InputFile {
 public:
  explicit InputFile(const std::string& path);
  InputFile(const InputFile&) = delete;
  InputFile& operator=(const InputFile&) = delete;
  ~InputFile();

  std::size_t size() const { return size_; }  // when it was opened
  // The first `bytes` bytes.
  std::string head(std::size_t bytes) const;
  // All of it in memory of its own: what happens to the file later does not matter.
  Mapping copy() const;
  // All of it where the system has it: shared with other processes, and lost or changed when the file is.
  Mapping map() const;

 private:
  void read(char* to, std::size_t bytes) const;
  [[noreturn]] void fail(const char* what) const;

  std::string path_;
  int file_;
  std::size_t size_ = 0;
};

// Replaces the file at `path` by these bytes: after any error, and after a loss of power, it has the old content or the
// new. A symbolic link is replaced, not followed; what is no regular file is refused. Throws EngineError.
void replace_file(const std::string& path, const char* data, std::size_t size);

}  // namespace vit::engine
