// Pooling: the tokens of an image as the head reads them.
//
// By attention, one learned query reads the tokens x: y = proj(a) and then y + mlp(norm(y)), where head h of the query
// q gives a_h = sum over tokens of softmax(scale q_h (K_h x + k_h)) (V_h x + v_h). The sum over k_h is the same for all
// tokens, and the weights of a softmax add up to 1, so that
//
//   a_h = V_h mean_h + v_h,  mean_h = sum of softmax(x keys_h) x,  keys_h = scale K_h^T q_h
//
// and no token is projected: 4 N H C operations an image in place of 4 N C^2, with 12 heads a 64th.
#pragma once

#include "cpu/engine/block.h"

namespace vit::VIT_ISA {

template <class T>
void last_norm(const Pass<T>& p, const float* x, float* y) {
  norm_one(p.s, p.net.norm, x, y, p.s.C);
}

// y = the mean of the tokens x, their largest values, or half of both; of what the last norm makes of them if it stands
// before.
template <class T>
void reduce(const Pass<T>& p, const float* x, float* y) {
  const Shape& s = p.s;
  const int64_t first = s.first_pooled(), count = s.N() - first;
  const bool mean = s.pool != Pool::max, most = s.pool != Pool::average;
  float* largest = p.own.pool;
  memset(y, 0, static_cast<size_t>(s.C) * sizeof(float));
  for (int64_t i = first; i < s.N(); ++i) {
    const float* row = x + i * s.C;
    if (s.last_norm == LastNorm::first) {
      last_norm(p, row, p.own.row);
      row = p.own.row;
    }
    if (mean)
      for_vectors(
          s.C, [&](int64_t j, int64_t n) { store<float>(y + j, load<float>(y + j, n) + load<float>(row + j, n), n); });
    if (most)
      for_vectors(s.C, [&](int64_t j, int64_t n) {
        const f32v v = load<float>(row + j, n);
        store<float>(largest + j, i == first ? v : vmax(v, load<float>(largest + j, n)), n);
      });
  }
  const float share = s.pool == Pool::average_max ? 0.5f : 1.0f, scale = share / static_cast<float>(count);
  for_vectors(s.C, [&](int64_t j, int64_t n) {
    f32v v = scale * load<float>(y + j, n);
    if (most) v = share * load<float>(largest + j, n) + (mean ? v : f32v{});
    store<float>(y + j, v, n);
  });
}

// What the heads of the learned query read from the tokens x of one image: y [C]. The tokens are normalised in place
// where the last norm stands before: nobody reads them again.
template <class T>
void read_by_query(Pass<T>& p, float* x, T* y) {
  const Shape& s = p.s;
  const AttentionPool& w = p.net.pool;
  const int64_t first = s.first_pooled(), count = s.N() - first, H = s.pool_heads, C = s.C;
  float *scores = p.own.pool, *means = p.own.pool + H * s.N();
  for (int64_t i = 0; i < count; ++i) {
    float* row = x + (first + i) * C;
    if (s.last_norm == LastNorm::first) last_norm(p, row, row);
    for (int64_t h = 0; h < H; ++h) {
      f32v dot{};
      for_vectors(C, [&](int64_t j, int64_t n) {
        dot = fma(load<float>(row + j, n), load<float>(w.keys + h * C + j, n), dot);
      });
      scores[h * count + i] = 1.44269504f * sum(dot);
    }
  }
  for (int64_t h = 0; h < H; ++h) softmax_of_row(scores + h * count, count);
  memset(means, 0, static_cast<size_t>(H * C) * sizeof(float));
  for (int64_t i = 0; i < count; ++i)
    for (int64_t h = 0; h < H; ++h) add_row(scores[h * count + i], x + (first + i) * C, means + h * C, C);
  for_vectors(H * C, [&](int64_t j, int64_t n) { store<float>(p.own.means + j, load<float>(means + j, n), n); });
  for (int64_t h = 0; h < H; ++h) {
    const Linear& values = w.values[h];
    linear<Activation::none, T, T>(p, p.own.means + h * C, Area{0, 1, 0, panels_of<T>(values.N)}, values, nullptr,
                                   y + h * values.N);
  }
}

// Pooling by attention of the images of a pass into p.pooled. `of_tokens` divides one row of each image, see
// last_block.
template <class T>
void attention_pool(Pass<T>& p, Pass<T>& of_tokens) {
  const Shape& s = p.s;
  for (int64_t b = p.team.member; b < p.images; b += p.team.members) {
    read_by_query(p, p.tokens + b * s.N() * s.C, p.attended + b * s.C);
    memset(p.pooled + b * s.C, 0, static_cast<size_t>(s.C) * sizeof(float));
  }
  p.meet();
  of_tokens.for_rows(p.images, [&](int64_t i0, int64_t i1) {
    rest_of_block(of_tokens, p.net.pool.rest, s.pool_activation, p.attended + i0 * s.C, i1 - i0, p.pooled + i0 * s.C);
  });
  p.meet();
}

}  // namespace vit::VIT_ISA
