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

/* Resamples `lines` lines of `in` values (3 channels, `step` apart) to `out` values each: a triangle filter whose width
 * follows the reduction, so that every source value counts. */
static void resample(const float* from, int in, float* to, int out, int lines, size_t line_in, size_t step_in,
                     size_t line_out, size_t step_out) {
  const double scale = (double)in / out, reach = scale > 1 ? scale : 1;
  for (int o = 0; o < out; ++o) {
    const double centre = (o + 0.5) * scale;
    int first = (int)floor(centre - reach), last = (int)ceil(centre + reach);
    if (first < 0) first = 0;
    if (last > in) last = in;
    for (int l = 0; l < lines; ++l)
      for (int c = 0; c < 3; ++c) {
        double sum = 0, weights = 0;
        for (int i = first; i < last; ++i) {
          const double weight = 1 - fabs(i + 0.5 - centre) / reach;
          if (weight <= 0) continue;
          sum += weight * from[(size_t)l * line_in + (size_t)i * step_in + (size_t)c], weights += weight;
        }
        to[(size_t)l * line_out + (size_t)o * step_out + (size_t)c] = (float)(sum / weights);
      }
  }
}

const char* resize_and_crop(const image* in, int resized, int width, int height, uint8_t* out) {
  const int portrait = in->height > in->width;
  const double scale = (double)resized / (portrait ? in->width : in->height);
  const int w = portrait ? resized : (int)(in->width * scale), h = portrait ? (int)(in->height * scale) : resized;
  if (w < width || h < height) return "resized: one side is smaller than the model's image";
  const size_t values = (size_t)in->width * (size_t)in->height * 3;
  float* source = malloc(values * sizeof(float));
  float* wide = malloc((size_t)w * (size_t)in->height * 3 * sizeof(float));
  float* done = malloc((size_t)w * (size_t)h * 3 * sizeof(float));
  if (source && wide && done) {
    for (size_t i = 0; i < values; ++i) source[i] = in->pixels[i];
    resample(source, in->width, wide, w, in->height, (size_t)in->width * 3, 3, (size_t)w * 3, 3);
    resample(wide, in->height, done, h, w, 3, (size_t)w * 3, 3, (size_t)w * 3);
    const int left = (w - width) / 2, top = (h - height) / 2;
    for (int y = 0; y < height; ++y)
      for (int x = 0; x < width * 3; ++x)
        out[y * width * 3 + x] = (uint8_t)(done[((size_t)(top + y) * (size_t)w + (size_t)left) * 3 + (size_t)x] + 0.5F);
  }
  const char* error = source && wide && done ? NULL : "is too large for memory";
  free(source), free(wide), free(done);
  return error;
}
