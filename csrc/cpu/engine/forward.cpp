// The whole network in one parallel region.
//
//   tokens = [prefix; patches W + b + positions]
//   tokens += proj(attention(qkv(norm1(tokens)))),  tokens += fc2(gelu(fc1(norm2(tokens))))     for each block
//   logits = head(norm(pool(tokens)))
//
// Threads take whole images where there are enough: no thread waits for another, and the queries, keys and values of an
// image stay in its L2. What is left over, fewer images than threads, is done by all threads together: they share the
// rows (all tokens of all these images), where there are few rows per thread also the columns, and the heads. Then two
// barriers per block suffice, or five where columns are shared.
//
// The residual stream is float32. Rows go through a block in pieces of kRows, so that what norm, fc1 and the activation
// make stays in L2 until it is used. Nothing here decides the order of a sum: gemm.h and attention_fwd.cpp do, from
// sizes alone, so that a result depends neither on the threads nor on what else is in the batch.
#include "cpu/engine/embed.h"
#include "cpu/engine/head.h"
#include "cpu/engine/kernels.h"

namespace vit::VIT_ISA {
namespace {

template <class T>
void run(Pass<T>& p, Pass<T>& of_tokens) {
  embed(p);
  p.meet();
  const int64_t whole = p.s.depth - p.ends_with_token();
  for (int64_t l = 0; l < whole; ++l)
    for (int64_t b = 0; b < p.images; b += p.group) block(p, l, b, min(p.group, p.images - b));
  if (p.ends_with_token()) last_block(p, of_tokens);
  p.meet();
  head(p, of_tokens);
}

template <class T>
void forward(const Forward& f) {
  struct Region {
    const Forward& f;
    Buffers<T> memory;
    Share share;
  } region{f, Buffers<T>(f.network->shape, f.B, f.threads, f.arena), Share(f.network->shape, f.B, f.threads)};
  for (int i = 0; i <= f.threads; ++i) region.memory.barriers[i] = Barrier();
  run_threads(
      f.threads,
      [](void* data, int thread, int threads) {
        const Region& region = *static_cast<const Region*>(data);
        const Forward& f = region.f;
        const Shape& s = f.network->shape;
        Clock clock(thread == 0 ? f.seconds : nullptr);
        const int64_t whole = f.B / threads;  // images of each thread alone
        for (int64_t i = 0; i < whole; i += region.share.images) {
          const int64_t images = min(region.share.images, whole - i);
          const Team alone;
          Pass<T> pass(f, region.memory, alone, thread, clock, thread * whole + i, images, region.share.group);
          run(pass, pass);
        }
        const int64_t rest = f.B - threads * whole;
        if (rest == 0) return;
        region.memory.barriers[0].wait(threads);  // slices of other threads become part of the common memory
        const Team team = Team::of<T>(thread, threads, rest * s.N(), s.C, region.memory.barriers);
        const Team of_rest = Team::of<T>(thread, threads, rest, s.C, region.memory.barriers);
        Pass<T> pass(f, region.memory, team, thread, clock, threads * whole, rest, rest);
        Pass<T> of_tokens(f, region.memory, of_rest, thread, clock, threads * whole, rest, rest);
        run(pass, of_tokens);
      },
      &region);
}

// The type between the products. Where a level multiplies bfloat16 in float, what it multiplies stays float: only the
// weights are bfloat16.
template <class F>
auto with_type(Precision precision, const F& f) {
  return precision == Precision::float32 ? f(float{}) : f(Operand<bf16>{});
}

}  // namespace

int64_t engine_arena_bytes(const Network& network, int64_t B, int threads) {
  return with_type(network.shape.precision,
                   [&](auto t) { return Buffers<decltype(t)>(network.shape, B, threads, nullptr).bytes; });
}

void engine_forward(const Forward& f) {
  with_type(f.network->shape.precision, [&](auto t) { forward<decltype(t)>(f); });
}

}  // namespace vit::VIT_ISA
