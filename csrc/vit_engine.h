/* The inference engine as a C library: one packed model, pixels to logits in one call, no Python.
 *
 *   vit_engine* engine = vit_engine_create("vit_base.vit", 0);
 *   float logits[1000];
 *   vit_images images = {pixels, VIT_PIXELS_UINT8, VIT_LAYOUT_NHWC, 1, 3, 224, 224};
 *   vit_output output = {VIT_OUTPUT_LOGITS, 0, logits, 1000};
 *   if (!engine || vit_engine_forward(engine, &images, &output, 1, 0) != VIT_OK) puts(vit_engine_last_error());
 *   vit_engine_destroy(engine);
 *
 * Functions return a vit_status, or null where they return a pointer; vit_engine_last_error says what went wrong, what
 * was given and what is allowed. After an error the engine is as usable as before. All functions may be called from any
 * thread: one forward runs per engine at a time, others wait for it. A forked child may use the engines of its parent,
 * with one thread.
 */
#ifndef VIT_ENGINE_H
#define VIT_ENGINE_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#if defined(__GNUC__)
#define VIT_API __attribute__((visibility("default")))
#else
#define VIT_API
#endif

/* Raised by one whenever a struct or function of this file, or the format of engine files, changes. Files of version 4
 * are read, too: their networks have none of the options that came with 5. */
#define VIT_ENGINE_VERSION 5

typedef struct vit_engine vit_engine;

typedef enum vit_status {
  VIT_OK = 0,
  VIT_INVALID = 1,     /* an argument */
  VIT_FILE = 2,        /* a file that cannot be read or written, is truncated, foreign, or of another version or ISA */
  VIT_UNSUPPORTED = 3, /* a network the engine cannot run */
  VIT_MEMORY = 4,      /* out of memory */
  VIT_NOT_FINITE = 5,  /* an image holds NaN or infinity; the outputs are undefined */
  VIT_FAILED = 6       /* anything else */
} vit_status;

/* The last two are for weights of blocks in a bfloat16 engine: stored in 8 or 4 bits, for their size alone. */
typedef enum vit_precision {
  VIT_FLOAT32 = 0,
  VIT_BFLOAT16 = 1,
  VIT_INT8 = 2,
  VIT_STORED8 = 3,
  VIT_STORED4 = 4
} vit_precision;
/* What the head reads: the first token; the mean, the largest values or half of both of the patches; all tokens; what a
 * learned query reads from them (a "MAP" head); the first two tokens, each with a head of its own (DeiT's distilled).
 */
typedef enum vit_pool {
  VIT_POOL_TOKEN = 0,
  VIT_POOL_AVERAGE = 1,
  VIT_POOL_NONE = 2,
  VIT_POOL_MAX = 3,
  VIT_POOL_AVERAGE_MAX = 4,
  VIT_POOL_ATTENTION = 5,
  VIT_POOL_DISTILLED = 6
} vit_pool;
typedef enum vit_activation { VIT_GELU = 1, VIT_GELU_TANH = 2, VIT_QUICK_GELU = 3, VIT_SILU = 4 } vit_activation;
typedef enum vit_norm { VIT_LAYER_NORM = 0, VIT_RMS_NORM = 1 } vit_norm;
typedef enum vit_last_norm { VIT_NORM_AFTER_POOL = 0, VIT_NORM_FIRST = 1, VIT_NORM_ABSENT = 2 } vit_last_norm;
/* Which elements of a query or key are turned together: 2k and 2k + 1, or k and k + D / 2. */
typedef enum vit_rotary { VIT_ROTARY_NONE = 0, VIT_ROTARY_INTERLEAVED = 1, VIT_ROTARY_HALF = 2 } vit_rotary;

/* uint8 pixels are 0 .. 255 and are normalised with the engine's mean and std; float32 ones are normalised already. */
typedef enum vit_pixels { VIT_PIXELS_UINT8 = 0, VIT_PIXELS_FLOAT32 = 1 } vit_pixels;
typedef enum vit_layout { VIT_LAYOUT_NCHW = 0, VIT_LAYOUT_NHWC = 1 } vit_layout;

typedef struct vit_images {
  const void* data; /* contiguous [batch, channels, height, width] or [batch, height, width, channels] */
  int32_t pixels;   /* vit_pixels */
  int32_t layout;   /* vit_layout */
  int64_t batch, channels, height, width;
} vit_images;

/* What depends on the size of the images: of another than the engine's own, positions of the grid of their patches. */
typedef struct vit_grid {
  int64_t height, width;  /* of the images */
  const float* positions; /* [patches, embed_dim], zeros where there are none */
  int64_t num_positions;  /* floats at positions */
  const float* rotary;    /* as the tensor "rotary"; null where the network has no rotary positions */
  int64_t num_rotary;
} vit_grid;

typedef enum vit_output_kind {
  VIT_OUTPUT_LOGITS = 0,   /* [batch, classes]; [batch, tokens, classes] without pooling; features without a head */
  VIT_OUTPUT_FEATURES = 1, /* [batch, dim] after pooling and the last norm; [batch, tokens, dim] without pooling */
  VIT_OUTPUT_TOKENS = 2,   /* [batch, tokens, dim] after block `block`, not normalised */
  VIT_OUTPUT_ATTENTION = 3 /* [batch, heads, tokens]: attention of the first token to every token in block `block` */
} vit_output_kind;

typedef struct vit_output {
  int32_t kind;  /* vit_output_kind */
  int32_t block; /* from 0, for the kinds that name one */
  float* data;
  int64_t count; /* floats at data: must be what the kind asks for */
} vit_output;

typedef struct vit_engine_config {
  int32_t precision, pool, activation; /* vit_precision, vit_pool, vit_activation */
  int32_t dynamic_pad;                 /* nonzero: smaller images with as many patches are padded with zeros */
  int32_t norm_first;                  /* vit_last_norm: where the last norm stands */
  int32_t drop_edge;                   /* nonzero: pixels beyond the last whole patch are not read */
  int32_t norm;                        /* vit_norm: what all norms are */
  int32_t embed_norm, pre_norm;        /* nonzero: a norm of projected patches; of all tokens before the first block */
  int32_t qk_norm;                     /* nonzero: one of queries and keys, by head */
  int32_t attn_norm, mlp_norm;         /* nonzero: one before attn.proj, before mlp.fc2 */
  int32_t gated;                       /* nonzero: mlp.fc1 makes gates and values, of which fc2 reads act(gate) value */
  int32_t rotary;                      /* vit_rotary, by "rotary" [patches, 2 D]: sines, then cosines */
  int32_t rotary_of_heads;             /* nonzero: each block and head has its own, [depth, num_heads, patches, 2 D] */
  int32_t pool_prefix;                 /* nonzero: pooling reads the prefix tokens, too */
  int32_t pool_activation;             /* vit_activation of VIT_POOL_ATTENTION's MLP, else 0 */
  int64_t channels, image_height, image_width, patch_height, patch_width;
  int64_t prefix_tokens; /* in front of the patches; the class token is the first */
  int64_t embed_dim, depth, num_heads, mlp_width, num_classes; /* mlp_width: what fc2 reads */
  int64_t pool_heads, pool_mlp_width;                          /* of VIT_POOL_ATTENTION, else 0 */
  double norm_eps;
} vit_engine_config;

/* A float32 weight under timm's name, and for matrices the vit_precision they are packed for. Besides timm's names:
 * "prefix" [prefix_tokens, embed_dim] (class token and registers with their positions, as the first block takes them),
 * "positions" [patches, embed_dim] (may be absent), "mean" and "std" [channels]; "blocks.I.<layer>.scale" [outputs],
 * where the rows of a weight packed for int8 are rounded already: whole multiples of it, from -127 to 127 (may be
 * absent). Layer scales are part of attn.proj and mlp.fc2. Gates are the first rows of a gated mlp.fc1.
 * VIT_POOL_ATTENTION: "attn_pool.keys" [pool_heads, embed_dim], whose product with a token is its score, and
 * "attn_pool.values.H.weight" and ".bias" of each head. VIT_POOL_DISTILLED: the two heads side by side, halved, are one
 * "head.weight" [num_classes, 2 embed_dim]. */
typedef struct vit_tensor {
  const char* name;
  const float* data;
  int64_t count;
  int32_t precision;
} vit_tensor;

typedef struct vit_text {
  const char *key, *value;
} vit_text;

/* Reads an engine file, which may then be changed, truncated or removed. Checksums of header and data are compared:
 * a damaged file is an error. max_batch 0: no limit; a given one is a limit for which memory is reserved now. */
VIT_API vit_engine* vit_engine_create(const char* path, int64_t max_batch);

/* The same with the file mapped into memory, which all processes that map it share. Whoever maps a file promises that
 * it does not change while the engine lives: one that is written over gives other results, one that becomes shorter
 * kills the process (SIGBUS). vit_engine_save, or a rename over it, replaces a file without changing it. */
VIT_API vit_engine* vit_engine_map(const char* path, int64_t max_batch);

/* Packs weights for this machine; an error where a tensor is missing, is given twice, or belongs to no part of the
 * network: what vit.Engine(model) of the Python package calls. Texts are kept with the weights.
 */
VIT_API vit_engine* vit_engine_build(const vit_engine_config* config, const vit_tensor* tensors, int64_t num_tensors,
                                     const vit_text* texts, int64_t num_texts, int64_t max_batch);

/* Writes the packed weights as one safetensors file, which runs on processors of the same instruction-set level. The
 * file is written beside its place, brought to the disk, and renamed: at every moment the old file or the new one is
 * there. A symbolic link is replaced, not followed. */
VIT_API int vit_engine_save(const vit_engine* engine, const char* path);

/* images -> all wanted outputs. num_threads 0: as many as this process may use. Results depend neither on it nor on
 * what else is in the batch. Memory is taken at the first call and when the batch or the threads grow, else never. */
VIT_API int vit_engine_forward(vit_engine* engine, const vit_images* images, const vit_output* outputs,
                               int64_t num_outputs, int32_t num_threads);

/* The same for images of the size that `grid` says. Its arrays are read until the call returns. */
VIT_API int vit_engine_forward_grid(vit_engine* engine, const vit_images* images, const vit_grid* grid,
                                    const vit_output* outputs, int64_t num_outputs, int32_t num_threads);

/* No call of this engine may be running. Null does nothing. */
VIT_API void vit_engine_destroy(vit_engine* engine);

/* What num_threads 0 means: the cores this process may use, or fewer where its container's quota is smaller or other
 * work keeps cores busy. */
VIT_API int32_t vit_engine_default_threads(void);

/* Why the last call of this thread failed; valid until its next failure. */
VIT_API const char* vit_engine_last_error(void);
/* And the vit_status of that failure, for the functions that return a pointer. */
VIT_API int vit_engine_last_status(void);

VIT_API int vit_engine_get_config(const vit_engine* engine, vit_engine_config* config);
/* A text kept with the weights, or "isa"; null when there is none of that key. */
VIT_API const char* vit_engine_text(const vit_engine* engine, const char* key);
/* Bytes of the packed weights and of the memory for intermediate results; either may be null. */
VIT_API int vit_engine_memory(const vit_engine* engine, int64_t* weights, int64_t* intermediate);

/* Time of the first thread by phase, added up over forwards since profiling was switched on (on = 1) or off (0). */
enum { VIT_PHASES = 12 };
VIT_API int vit_engine_profile(vit_engine* engine, int32_t on);
VIT_API int vit_engine_profile_read(vit_engine* engine, double seconds[VIT_PHASES]);
/* "embed", "norm", "qkv", ...; null beyond the last. */
VIT_API const char* vit_engine_phase_name(int32_t phase);

/* For callers in other languages, so that they type no number of this file again: the values of enums and the offsets
 * of fields by name, for example {"precision", "bfloat16", VIT_BFLOAT16} and {"vit_images", "batch", 16}. Status
 * VIT_INVALID for an index beyond the last. */
typedef struct vit_name {
  const char *of, *name;
  int64_t value;
} vit_name;
VIT_API int vit_engine_name(int32_t index, vit_name* name);

#ifdef __cplusplus
}
#endif
#endif
