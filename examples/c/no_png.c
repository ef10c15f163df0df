#include <stddef.h>

#include "image.h"

const char* read_png(const char* path, image* out) {
  (void)path;
  out->pixels = NULL;
  return "is a PNG, and this program was built without libpng; convert it to PPM";
}
