/* Reading and resizing pictures for classify.c. */
#ifndef IMAGE_H
#define IMAGE_H

#include <stdint.h>

typedef struct image {
  int width, height;
  uint8_t* pixels; /* [height, width, 3], from malloc */
} image;

/* Both return null, or what went wrong. read_png needs libpng when this program is built. */
const char* read_ppm(const char* path, image* out);
const char* read_png(const char* path, image* out);

/* Resizes the shorter side to `resized` with a triangle filter and cuts out the central width x height into out
 * [height, width, 3]. */
const char* resize_and_crop(const image* in, int resized, int width, int height, uint8_t* out);

#endif
