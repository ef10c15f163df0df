// The portable product of 16-bit operands and of float32 rounded to TF32 (gemm_mma.cuh).
#include "gemm_mma.cuh"

namespace vit::cuda {
namespace {

template <class T>
void run(const char* op, const Gemm& g, const Context& context) {
  const Access a = access(g.a, g.dtype), b = access(g.b, g.dtype);
  const int64_t planes = g.batch * g.splits;
  const int64_t K_split = divide_up(divide_up(g.K, kTileK<T>), g.splits) * kTileK<T>;
  const auto go = [&](auto tile, auto k_major_a, auto k_major_b) {
    constexpr int kTile = decltype(tile)::value;
    const int64_t blocks = divide_up(g.M, kTile) * divide_up(g.N, kTile) * planes;
    launch<gemm_mma_kernel<T, kTile, decltype(k_major_a)::value, decltype(k_major_b)::value, Epilogue<T>>>(
        {op, Shape({{"batch", g.batch}, {"M", g.M}, {"N", g.N}, {"K", g.K}}), context, blocks, kGemmThreads,
         static_cast<std::size_t>(mma_shared_bytes(kTile))},
        g.a, g.b, g.batch, g.K, K_split, a.vectors, b.vectors, Epilogue<T>(g));
  };
  const auto choose_b = [&](auto tile, auto k_major_a) {
    if (b.k_major) return go(tile, k_major_a, std::true_type{});
    go(tile, k_major_a, std::false_type{});
  };
  const auto choose_a = [&](auto tile) {
    if (a.k_major) return choose_b(tile, std::true_type{});
    go(tile, std::false_type{}, std::false_type{});
  };
  // Both operands transposed is no direction of linear: one tile size, for the sake of the build.
  if (!a.k_major && b.k_major) return go(std::integral_constant<int, 64>{}, std::false_type{}, std::true_type{});
  if (mma_tile(g.M, g.N, planes) == 128) return choose_a(std::integral_constant<int, 128>{});
  choose_a(std::integral_constant<int, 64>{});
}

}  // namespace

void gemm_mma(const char* op, const Gemm& g, const Context& context) {
  if (g.dtype == DType::bfloat16) return run<bf16>(op, g, context);
  if (g.dtype == DType::float16) return run<f16>(op, g, context);
  run<float>(op, g, context);  // rounded to TF32
}

}  // namespace vit::cuda
