#include "cpu/engine/cores.h"

#include <sched.h>
#include <sys/resource.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <fstream>
#include <limits>
#include <locale>
#include <mutex>
#include <sstream>
#include <vector>

#include "engine/executor.h"

namespace vit::engine {
namespace {

constexpr double kNoLimit = std::numeric_limits<double>::infinity();

std::vector<std::string> split(const std::string& text, char at) {
  std::vector<std::string> parts;
  std::istringstream in(text);
  for (std::string part; std::getline(in, part, at);) parts.push_back(part);
  return parts;
}

bool contains(const std::vector<std::string>& parts, const std::string& part) {
  return std::find(parts.begin(), parts.end(), part) != parts.end();
}

bool begins_with(const std::string& text, const std::string& start) {
  return text.compare(0, start.size(), start) == 0;
}

// The number a file begins with; false for "max" and where there is no such file.
bool read_number(std::istream& in, double& value) {
  in.imbue(std::locale::classic());
  return static_cast<bool>(in >> value);
}

// The limit that one folder of control groups sets.
double limit_of_folder(const std::string& folder, bool second_version) {
  double quota = 0, period = 0;
  if (second_version) {
    std::ifstream file(folder + "/cpu.max");
    if (!read_number(file, quota) || !read_number(file, period)) return kNoLimit;
  } else {
    std::ifstream of_quota(folder + "/cpu.cfs_quota_us"), of_period(folder + "/cpu.cfs_period_us");
    if (!read_number(of_quota, quota) || !read_number(of_period, period)) return kNoLimit;
  }
  return quota > 0 && period > 0 ? quota / period : kNoLimit;
}

// Where a hierarchy of control groups is mounted, and which of its folders stands there.
struct Mount {
  std::string folder, top;
  bool second_version;
};

// Lines of mountinfo: ... top folder options ... - type source options
std::vector<Mount> mounts(const std::string& root) {
  std::vector<Mount> found;
  std::ifstream file(root + "/proc/self/mountinfo");
  for (std::string line; std::getline(file, line);) {
    const std::size_t dash = line.find(" - ");
    const std::vector<std::string> fields = split(line, ' ');
    if (dash == std::string::npos || fields.size() < 6) continue;
    const std::vector<std::string> system = split(line.substr(dash + 3), ' ');
    if (system.empty()) continue;
    const bool second = system[0] == "cgroup2";
    const bool first = system[0] == "cgroup" && contains(split(system.back(), ','), "cpu");
    if (first || second) found.push_back({root + fields[4], fields[3], second});
  }
  return found;
}

// The smallest limit of the group `path` and the groups around it.
double limit_of_group(const Mount& mount, const std::string& path) {
  const std::string top = mount.top == "/" ? "" : mount.top;
  // A group outside of what is mounted here, as a container may see it: the mounted one is ours.
  std::string below = begins_with(path, top + "/") ? path.substr(top.size()) : "";
  double limit = kNoLimit;
  while (true) {
    while (!below.empty() && below.back() == '/') below.pop_back();
    limit = std::min(limit, limit_of_folder(mount.folder + below, mount.second_version));
    if (below.empty()) return limit;
    below.erase(below.rfind('/'));
  }
}

double now() {
  timespec t{};
  clock_gettime(CLOCK_MONOTONIC, &t);
  return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
}

// Seconds of processor time this process has used.
double used() {
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  const auto seconds = [](const timeval& t) {
    return static_cast<double>(t.tv_sec) + 1e-6 * static_cast<double>(t.tv_usec);
  };
  return seconds(usage.ru_utime) + seconds(usage.ru_stime);
}

// Seconds of processor time that programs have used since the start of the machine, and that none has; false where the
// system does not say.
bool machine_times(double& busy, double& idle) {
  std::ifstream file("/proc/stat");
  file.imbue(std::locale::classic());
  std::string cpu;
  double t[7] = {};  // user, nice, system, idle, waiting for devices, interrupts of two kinds
  file >> cpu;
  for (double& value : t)
    if (!(file >> value)) return false;
  const double second = static_cast<double>(sysconf(_SC_CLK_TCK));
  busy = (t[0] + t[1] + t[2] + t[5] + t[6]) / second;
  idle = (t[3] + t[4]) / second;
  return cpu == "cpu";
}

// Other threads that run or wait for a core at this moment.
double others_now() {
  std::ifstream file("/proc/loadavg");
  file.imbue(std::locale::classic());
  double means[3] = {}, running = 0;
  return file >> means[0] >> means[1] >> means[2] >> running ? std::max(running - 1, 0.0) : kNoLimit;
}

// Threads of other processes that want a core. Looked up once a second.
class Others {
 public:
  double operator()(int cores, int limit) {
    const std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
    if (!lock.owns_lock()) return found_;  // another thread looks, or did when this process was forked
    const double time = now();
    if (time - looked_ < 1) return found_;
    const double total = used();
    double load = 0, busy = 0, idle = 0;
    const bool known = machine_times(busy, idle), first = looked_ < 0;
    const double seconds = time - looked_, mine = (total - used_) / seconds;
    // Of the time before the first look all that this process can have added is taken for its own.
    if (first)
      own_ = std::min(total / 60, static_cast<double>(cores));
    else
      own_ += (1 - std::exp(-seconds / 60)) * (mine - own_);
    load = getloadavg(&load, 1) == 1 ? std::max(load - own_, 0.0) : 0;
    if (first)
      found_ = std::min(load, others_now());
    else if (known)
      found_ = others_of({load, (busy - busy_) / seconds, mine, (idle - idle_) / seconds}, cores, limit);
    else
      found_ = load;
    looked_ = time, used_ = total, busy_ = busy, idle_ = idle;
    return found_;
  }

 private:
  std::mutex mutex_;
  double looked_ = -1, used_ = 0, own_ = 0, busy_ = 0, idle_ = 0;
  std::atomic<double> found_{0};
};

}  // namespace

double quota(const std::string& root) {
  const std::vector<Mount> all = mounts(root);
  double limit = kNoLimit;
  std::ifstream file(root + "/proc/self/cgroup");
  for (std::string line; std::getline(file, line);) {  // id:controllers:path
    const std::size_t first = line.find(':'), second = line.find(':', first + 1);
    if (first == std::string::npos || second == std::string::npos) continue;
    const std::string controllers = line.substr(first + 1, second - first - 1), path = line.substr(second + 1);
    if (!controllers.empty() && !contains(split(controllers, ','), "cpu")) continue;
    for (const Mount& mount : all)
      if (mount.second_version == controllers.empty()) limit = std::min(limit, limit_of_group(mount, path));
  }
  return limit;
}

double others_of(const Look& look, int cores, int limit) {
  const double rest = std::max(look.busy - look.mine, 0.0);
  if (look.idle > 0.05 * cores) return rest;
  // All cores were busy: n others beside our threads had n / (n + limit) of the time, or their load is less.
  const double fair = look.mine > 0 ? rest * limit / look.mine : look.load;
  return std::max(rest, std::min(fair, look.load));
}

int threads_beside(double others, int cores, int limit) {
  const double of_their_own = std::round(cores - others), share = std::floor(limit * cores / (others + limit));
  return static_cast<int>(std::clamp(std::max(of_their_own, share), 1.0, static_cast<double>(limit)));
}

int available_threads() {
  cpu_set_t set;
  const int cores =
      sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set) : static_cast<int>(sysconf(_SC_NPROCESSORS_ONLN));
  // OpenMP does not know the quota of a container; more threads than it allows are stopped for parts of a second.
  static const double allowed = std::min(std::ceil(quota()), static_cast<double>(kMaxThreads));
  return std::clamp(std::min(cores, static_cast<int>(allowed)), 1, kMaxThreads);
}

int default_threads() {
  static Others& others = *new Others;
  const int limit = available_threads(), cores = static_cast<int>(sysconf(_SC_NPROCESSORS_ONLN));
  return limit == 1 ? 1 : threads_beside(others(cores, limit), cores, limit);
}

}  // namespace vit::engine
