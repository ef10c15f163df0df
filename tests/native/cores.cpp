// What csrc/cpu/engine/cores.cpp makes of the files below a folder, and of the load of a machine.
#include "cpu/engine/cores.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>

int main(int argc, char** argv) {
  if (argc == 3 && !std::strcmp(argv[1], "quota"))
    std::printf("%g\n", vit::engine::quota(argv[2]));
  else if (argc == 5 && !std::strcmp(argv[1], "beside"))
    std::printf("%d\n", vit::engine::threads_beside(std::atof(argv[2]), std::atoi(argv[3]), std::atoi(argv[4])));
  else if (argc == 8 && !std::strcmp(argv[1], "others"))
    std::printf("%g\n",
                vit::engine::others_of({std::atof(argv[2]), std::atof(argv[3]), std::atof(argv[4]), std::atof(argv[5])},
                                       std::atoi(argv[6]), std::atoi(argv[7])));
  else
    return 2;
}
