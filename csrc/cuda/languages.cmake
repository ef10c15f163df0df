# Default targets: machine code for compute capability 8.0 and for Hopper's own instructions (9.0a), and PTX of 8.0 that a
# driver compiles for every later GPU. Override with -DCMAKE_CUDA_ARCHITECTURES=...
if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
  set(CMAKE_CUDA_ARCHITECTURES 80 90a-real)
endif()
set(CMAKE_CUDA_STANDARD 17)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)
set(CMAKE_CUDA_EXTENSIONS OFF)
set(CMAKE_CUDA_RUNTIME_LIBRARY Static)
set(CMAKE_CUDA_VISIBILITY_PRESET hidden)
enable_language(CUDA)
if(CMAKE_CUDA_COMPILER_VERSION VERSION_LESS 12.5)
  message(FATAL_ERROR "the CUDA backend needs nvcc 12.5 or newer (tensor maps through the runtime), found "
                      "${CMAKE_CUDA_COMPILER_VERSION}")
endif()
