/* PNG files through libpng's simplified interface. */
#include <png.h>
#include <stdlib.h>
#include <string.h>

#include "image.h"

const char* read_png(const char* path, image* out) {
  png_image png;
  memset(&png, 0, sizeof png);
  png.version = PNG_IMAGE_VERSION;
  if (!png_image_begin_read_from_file(&png, path)) return "is not a readable PNG";
  if (png.width > 32768 || png.height > 32768) return png_image_free(&png), "has sides above 32768";
  png.format = PNG_FORMAT_RGB; /* laid over white, as vit does in Python; an eXIf orientation is not looked at */
  out->width = (int)png.width, out->height = (int)png.height;
  out->pixels = malloc(PNG_IMAGE_SIZE(png));
  const png_color white = {255, 255, 255};
  if (out->pixels && png_image_finish_read(&png, &white, out->pixels, 0, NULL)) return NULL;
  png_image_free(&png);
  free(out->pixels);
  out->pixels = NULL;
  return "is a damaged or too large PNG";
}
