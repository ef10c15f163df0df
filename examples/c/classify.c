/* Classifies a picture with an engine file, without Python.
 *
 *   classify MODEL.vit PICTURE.png|PICTURE.ppm|TENSOR.f32
 *
 * Pictures are resized and cropped to the model's size; a .f32 file holds one normalised image, float32 [C, H, W].
 * Prints the five most likely classes and their probabilities. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "image.h"
#include "vit_engine.h"

static int ends_with(const char* text, const char* end) {
  const size_t n = strlen(text), m = strlen(end);
  return n >= m && strcmp(text + n - m, end) == 0;
}

/* crop_pct out of the preprocessing that vit.Engine keeps as JSON: the part of the resized side that is kept. */
static double crop_of(const vit_engine* engine) {
  const char* text = vit_engine_text(engine, "preprocess");
  const char* crop = text ? strstr(text, "\"crop_pct\":") : NULL;
  const double value = crop ? strtod(crop + strlen("\"crop_pct\":"), NULL) : 1;
  return value > 0 && value <= 1 ? value : 1;
}

static const char* load_picture(const char* path, const vit_engine* engine, const vit_engine_config* config,
                                void* pixels) {
  image picture;
  const char* text = vit_engine_text(engine, "preprocess");
  if (config->channels != 3) return "is a colour picture; this model takes tensors only";
  if (text && strstr(text, "\"squash\"")) return "is a picture; this model squashes pictures: give a tensor";
  const char* error = ends_with(path, ".png") ? read_png(path, &picture) : read_ppm(path, &picture);
  if (error) return error;
  const int height = (int)config->image_height, width = (int)config->image_width;
  const int shorter = height < width ? height : width;
  error = resize_and_crop(&picture, (int)(shorter / crop_of(engine)), width, height, pixels);
  free(picture.pixels);
  return error;
}

static const char* load_tensor(const char* path, size_t bytes, void* values) {
  FILE* file = fopen(path, "rb");
  if (!file) return "cannot be opened";
  const size_t got = fread(values, 1, bytes, file);
  const int more = getc(file) != EOF;
  fclose(file);
  return got == bytes && !more ? NULL : "does not have one float32 for each channel and pixel";
}

static void print_best(float* logits, int64_t classes) {
  double total = 0;
  float largest = logits[0];
  for (int64_t i = 1; i < classes; ++i) largest = fmaxf(largest, logits[i]);
  for (int64_t i = 0; i < classes; ++i) total += exp(logits[i] - largest);
  for (int rank = 0; rank < 5 && rank < classes; ++rank) {
    int64_t best = 0;
    for (int64_t i = 1; i < classes; ++i)
      if (logits[i] > logits[best]) best = i;
    printf("class %lld  %.4f\n", (long long)best, exp(logits[best] - largest) / total);
    logits[best] = -INFINITY;
  }
}

int main(int argc, char** argv) {
  if (argc != 3) {
    fprintf(stderr, "usage: %s MODEL.vit PICTURE.png|PICTURE.ppm|TENSOR.f32\n", argv[0]);
    return 2;
  }
  vit_engine* engine = vit_engine_create(argv[1], 1);
  if (!engine) {
    fprintf(stderr, "%s\n", vit_engine_last_error());
    return 1;
  }
  vit_engine_config config;
  vit_engine_get_config(engine, &config);
  const int tensor = ends_with(argv[2], ".f32");
  const int64_t classes = config.num_classes ? config.num_classes : config.embed_dim;
  const size_t values = (size_t)(config.channels * config.image_height * config.image_width);
  const size_t bytes = values * (tensor ? sizeof(float) : 1);
  void* pixels = malloc(bytes);
  float* logits = malloc((size_t)classes * sizeof(float));
  const char* error = !pixels || !logits ? "needs more memory than there is"
                      : tensor           ? load_tensor(argv[2], bytes, pixels)
                                         : load_picture(argv[2], engine, &config, pixels);
  if (error) fprintf(stderr, "%s %s\n", argv[2], error);
  int failed = error != NULL;
  if (!failed) {
    const vit_images images = {.data = pixels,
                               .pixels = tensor ? VIT_PIXELS_FLOAT32 : VIT_PIXELS_UINT8,
                               .layout = tensor ? VIT_LAYOUT_NCHW : VIT_LAYOUT_NHWC,
                               .batch = 1,
                               .channels = config.channels,
                               .height = config.image_height,
                               .width = config.image_width};
    const vit_output output = {.kind = VIT_OUTPUT_LOGITS, .data = logits, .count = classes};
    failed = vit_engine_forward(engine, &images, &output, 1, 0) != VIT_OK;
    if (failed)
      fprintf(stderr, "%s\n", vit_engine_last_error());
    else
      print_best(logits, classes);
  }
  free(pixels);
  free(logits);
  vit_engine_destroy(engine);
  return failed;
}
