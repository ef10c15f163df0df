#include "engine/memory.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <utility>

#include "engine/error.h"

namespace vit::engine {
namespace {

constexpr std::size_t kHugePage = std::size_t{2} << 20;
constexpr std::size_t kPiece = std::size_t{1} << 30;  // Linux reads and writes at most 2^31 - 4096 bytes at once

[[noreturn]] void fail_with(const std::string& what, const std::string& path, int error) {
  throw EngineError(kFile, "vit engine: cannot " + what + " " + path + ": " + std::strerror(error));
}

}  // namespace

Mapping::~Mapping() {
  if (mapped_) munmap(mapped_, mapped_size_);
}

void Mapping::swap(Mapping& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(size_, other.size_);
  std::swap(mapped_, other.mapped_);
  std::swap(mapped_size_, other.mapped_size_);
}

Mapping Mapping::anonymous(std::size_t bytes, const char* what) {
  Mapping m;
  m.size_ = bytes;
  m.mapped_size_ = bytes + kHugePage;  // room to start on a huge page
  void* p = bytes > SIZE_MAX - kHugePage
                ? MAP_FAILED
                : mmap(nullptr, m.mapped_size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (p == MAP_FAILED)
    throw EngineError(kMemory, "vit engine: out of memory: " + std::string(what) + " take " + std::to_string(bytes) +
                                   " bytes, which this process cannot get");
  m.mapped_ = p;
  const auto address = reinterpret_cast<std::uintptr_t>(p);
  m.data_ = static_cast<char*>(p) + ((address + kHugePage - 1) / kHugePage * kHugePage - address);
  // Without huge pages ViT-Ti is 6 to 12 % slower: where its pages fall in the caches becomes luck.
  madvise(m.data_, bytes, MADV_HUGEPAGE);
  return m;
}

InputFile::InputFile(const std::string& path) : path_(path) {
  if (path.empty()) throw EngineError(kFile, "vit engine: the path of the file is empty");
  // A pipe would otherwise be waited for until somebody writes to it, a terminal would become this process's own.
  file_ = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY);
  if (file_ < 0) fail("open");
  struct stat status{};
  const char* refused = fstat(file_, &status) != 0 ? "cannot be looked at"
                        : !S_ISREG(status.st_mode) ? "is not a file"
                        : status.st_size <= 0      ? "is empty"
                                                   : nullptr;
  if (refused) {
    close(file_);
    throw EngineError(kFile, "vit engine: " + path + " " + refused);
  }
  size_ = static_cast<std::size_t>(status.st_size);
}

InputFile::~InputFile() { close(file_); }

void InputFile::fail(const char* what) const { fail_with(what, path_, errno); }

void InputFile::read(char* to, std::size_t bytes) const {
  for (std::size_t at = 0; at < bytes;) {
    const ssize_t got = pread(file_, to + at, std::min(bytes - at, kPiece), static_cast<off_t>(at));
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) fail("read");
    if (got == 0)
      throw EngineError(kFile, "vit engine: " + path_ + " was truncated while it was read: it had " +
                                   std::to_string(size_) + " bytes, now " + std::to_string(at));
    at += static_cast<std::size_t>(got);
  }
}

std::string InputFile::head(std::size_t bytes) const {
  std::string out(std::min(bytes, size_), '\0');
  read(&out[0], out.size());
  return out;
}

Mapping InputFile::copy() const {
  // A sparse file costs nothing on the disk and all of its size here.
  const auto pages = static_cast<std::size_t>(std::max(sysconf(_SC_PHYS_PAGES), 0L));
  const auto page = static_cast<std::size_t>(std::max(sysconf(_SC_PAGESIZE), 1L));
  if (pages && size_ / page > pages)
    throw EngineError(kMemory, "vit engine: out of memory: " + path_ + " has " + std::to_string(size_) +
                                   " bytes, this machine " + std::to_string(pages * page));
  Mapping m = Mapping::anonymous(size_, "packed weights");
  read(m.data_, size_);
  return m;
}

Mapping InputFile::map() const {
  void* p = mmap(nullptr, size_, PROT_READ, MAP_PRIVATE, file_, 0);
  if (p == MAP_FAILED) fail("map");
  Mapping m;
  m.data_ = static_cast<char*>(m.mapped_ = p);
  m.size_ = m.mapped_size_ = size_;
  return m;
}

namespace {

// A new file in `folder` under a name that no other writer has; its name in `name`. -1 with errno.
int create_beside(const std::string& folder, std::string& name) {
  static std::atomic<unsigned> count{0};
  for (int attempt = 0; attempt < 100; ++attempt) {
    timespec now{};
    clock_gettime(CLOCK_REALTIME, &now);
    char text[64];
    std::snprintf(text, sizeof text, ".vit-%lx-%lx-%x.tmp", static_cast<unsigned long>(getpid()),
                  static_cast<unsigned long>(now.tv_nsec), count++);
    name = folder + text;
    const int file = open(name.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0666);
    if (file >= 0 || errno != EEXIST) return file;
  }
  return -1;
}

bool write_all(int file, const char* data, std::size_t size) {
  for (std::size_t at = 0; at < size;) {
    const ssize_t put = write(file, data + at, std::min(size - at, kPiece));
    if (put < 0 && errno != EINTR) return false;
    if (put > 0) at += static_cast<std::size_t>(put);
  }
  return fsync(file) == 0;
}

}  // namespace

void replace_file(const std::string& path, const char* data, std::size_t size) {
  if (path.empty()) throw EngineError(kFile, "vit engine: the path of the file is empty");
  struct stat status{};
  if (lstat(path.c_str(), &status) == 0 && S_ISLNK(status.st_mode))
    throw EngineError(kFile,
                      "vit engine: cannot write " + path +
                          ": it is a symbolic link, and what it points to may belong to somebody else; remove it "
                          "or name the file itself");
  if (stat(path.c_str(), &status) == 0 && !S_ISREG(status.st_mode))
    throw EngineError(kFile, "vit engine: cannot write " + path + ": it is there and is not a file");
  const std::size_t slash = path.rfind('/');
  const std::string folder = slash == std::string::npos ? "./" : path.substr(0, slash + 1);
  std::string temporary;
  const int file = create_beside(folder, temporary);
  if (file < 0) fail_with("write", path, errno);
  const bool written = write_all(file, data, size);
  int error = written ? 0 : errno;
  if (close(file) != 0 && !error) error = errno;
  if (!error && rename(temporary.c_str(), path.c_str()) != 0) error = errno;
  if (error) {
    unlink(temporary.c_str());
    fail_with("write", path, error);
  }
  const int parent = open(folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (parent < 0) return;
  fsync(parent);  // the rename survives a loss of power; some file systems cannot do it for folders
  close(parent);
}

}  // namespace vit::engine
