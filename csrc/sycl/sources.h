// The files of kernels/ as text; sources.cpp is made from them by CMake.
#pragma once

#include <string>
#include <utility>
#include <vector>

namespace vit::device {

const std::vector<std::pair<std::string, std::string>>& kernel_sources();

}  // namespace vit::device
