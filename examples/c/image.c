#include "image.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

/* The next number of a PPM header; -1 where there is none. */
static int ppm_number(FILE* file) {
  int c = getc(file), value = -1;
  while (c == ' ' || c == '\t' || c == '\r' || c == '\n' || c == '#') {
    if (c == '#')
      while (c != '\n' && c != EOF) c = getc(file);
    else
      c = getc(file);
  }
  for (; c >= '0' && c <= '9' && value < 1000000; c = getc(file)) value = (value < 0 ? 0 : value) * 10 + (c - '0');
  return value;
}

const char* read_ppm(const char* path, image* out) {
  FILE* file = fopen(path, "rb");
  const char* error = NULL;
  if (!file) return "cannot be opened";
  out->pixels = NULL;
  if (getc(file) != 'P' || getc(file) != '6') {
    error = "is not a binary PPM (P6)";
  } else {
    out->width = ppm_number(file), out->height = ppm_number(file);
    if (ppm_number(file) != 255 || out->width < 1 || out->height < 1 || out->width > 32768 || out->height > 32768) {
      error = "has an unusable header; wanted are 8 bits per channel and sides up to 32768";
    } else {
      const size_t bytes = (size_t)out->width * (size_t)out->height * 3;
      out->pixels = malloc(bytes);
      if (!out->pixels)
        error = "is too large for memory";
      else if (fread(out->pixels, 1, bytes, file) != bytes)
        error = "is truncated";
    }
  }
  fclose(file);
  if (error) free(out->pixels), out->pixels = NULL;
  return error;
}

/* One side of a resize from `in` to `out` pixels, of which `count` from `begin` on are kept. */
typedef struct {
  int in, out, begin, count;
} side;

/* The source pixels first .. last that pixel `o` is made of: under a triangle whose width follows the reduction. */
static void reach_of(side s, int o, int* first, int* last, double* centre, double* reach) {
  const double scale = (double)s.in / s.out;
  *reach = scale > 1 ? scale : 1;
  *centre = (o + 0.5) * scale;
  *first = (int)floor(*centre - *reach), *last = (int)ceil(*centre + *reach);
  if (*first < 0) *first = 0;
  if (*last > s.in) *last = s.in;
}

const char* resize_and_crop(const image* in, int resized, int width, int height, uint8_t* out) {
  const int portrait = in->height > in->width;
  const double scale = (double)resized / (portrait ? in->width : in->height);
  const int w = portrait ? resized : (int)(in->width * scale), h = portrait ? (int)(in->height * scale) : resized;
  if (w < width || h < height) return "resized: one side is smaller than the model's image";
  /* Only the columns and rows that are kept, and the source rows these need: of a long thin picture the rest would be
   * millions of pixels. */
  const side across = {in->width, w, (w - width) / 2, width}, down = {in->height, h, (h - height) / 2, height};
  int top, bottom, first, last;
  double centre, reach;
  reach_of(down, down.begin, &top, &last, &centre, &reach);
  reach_of(down, down.begin + height - 1, &first, &bottom, &centre, &reach);
  const size_t line = (size_t)width * 3;
  float* wide = malloc((size_t)(bottom - top) * line * sizeof(float));
  if (!wide) return "is too large for memory";
  for (int x = 0; x < width; ++x) {
    reach_of(across, across.begin + x, &first, &last, &centre, &reach);
    for (int y = top; y < bottom; ++y)
      for (size_t c = 0; c < 3; ++c) {
        double sum = 0, weights = 0;
        for (int i = first; i < last; ++i) {
          const double weight = 1 - fabs(i + 0.5 - centre) / reach;
          if (weight <= 0) continue;
          sum += weight * in->pixels[((size_t)y * (size_t)in->width + (size_t)i) * 3 + c], weights += weight;
        }
        wide[(size_t)(y - top) * line + (size_t)x * 3 + c] = (float)(sum / weights);
      }
  }
  for (int y = 0; y < height; ++y) {
    reach_of(down, down.begin + y, &first, &last, &centre, &reach);
    for (size_t v = 0; v < line; ++v) {
      double sum = 0, weights = 0;
      for (int i = first; i < last; ++i) {
        const double weight = 1 - fabs(i + 0.5 - centre) / reach;
        if (weight <= 0) continue;
        sum += weight * wide[(size_t)(i - top) * line + v], weights += weight;
      }
      out[(size_t)y * line + v] = (uint8_t)((float)(sum / weights) + 0.5F);
    }
  }
  free(wide);
  return NULL;
}
