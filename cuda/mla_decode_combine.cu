// mla_decode 的合并：前 splits 块各管一个 CTA 名下分开算的一组查询，parts 个 warp 一行的 128 列，各加几段；其余的块（只在
// y、z 为 0 时有）一个 warp 一个词元，没有键可看的写 0。
#include "config.cuh"
#include "mla_decode.cuh"
#include "mma.cuh"

namespace {

using namespace dso;

constexpr int WARPS = COMBINE_THREADS / WARP;

// 从 part 起的一段列（至多 4 个，连续）；范围之外是 0。
__device__ float4 load_columns(const float *part, int64_t left) {
  if (left >= 4 && reinterpret_cast<uintptr_t>(part) % 16 == 0)
    return *reinterpret_cast<const float4 *>(part);
  return make_float4(left > 0 ? part[0] : 0.0f, left > 1 ? part[1] : 0.0f,
                     left > 2 ? part[2] : 0.0f, left > 3 ? part[3] : 0.0f);
}

// 一行：这个 warp 是这一行的 parts 个里的第 part 个；scratch 是这一行的 [parts, 32]。
__device__ void combine_row(const DecodeArgs &args, int cta, int row, int part, int parts,
                            float4 *scratch) {
  const dso_mla_inputs &in = args.in;
  const Schedule &s = args.schedule;
  Split split = args.splits[cta];
  bool mine = row < split.rows;
  int lane = static_cast<int>(threadIdx.x) % WARP;
  int count = mine ? (split.last - cta) / s.tracks + 1 : 0;
  auto slot = [&](int i) {  // 第 i 段的这一行
    return static_cast<int64_t>(2 * (cta + i * s.tracks) + (i == 0 ? 1 : 0)) * s.rows + row;
  };
  float top = -INFINITY, sum = 0.0f;
  for (int i = lane; i < count; i += WARP) top = fmaxf(top, args.part_m[slot(i)]);
  float base = finite_max(warp_max(top));
  int64_t column = blockIdx.z * COMBINE_COLUMNS + lane * 4, left = in.rank - column;
  float4 x = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  for (int first = 0; first < count; first += WARP) {
    int i = first + lane, here = count - first < WARP ? count - first : WARP;
    float weight = i < count ? fast_exp2(args.part_m[slot(i)] - base) : 0.0f;
    if (i < count) sum += weight * args.part_l[slot(i)];
#pragma unroll 4
    for (int j = part; j < here; j += parts) {
      float w = __shfl_sync(ALL_LANES, weight, j);
      float4 y = load_columns(args.part + slot(first + j) * in.rank + column, left);
      x.x += w * y.x, x.y += w * y.y, x.z += w * y.z, x.w += w * y.w;
    }
  }
  if (parts > 1) {
    scratch[part * WARP + lane] = x;
    __syncthreads();
    if (part > 0) return;
    for (int p = 1; p < parts; p++) {
      float4 y = scratch[p * WARP + lane];
      x.x += y.x, x.y += y.y, x.z += y.z, x.w += y.w;
    }
  }
  sum = warp_sum(sum);
  float inverse = sum == 0.0f ? 0.0f : 1.0f / sum;
  const float values[] = {x.x * inverse, x.y * inverse, x.z * inverse, x.w * inverse};
#pragma unroll
  for (int e = 0; e < 4; e++)
    if (mine && e < left)
      store_one(args.o, args.dtype, (split.first + row) * in.rank + column + e, values[e]);
}

__global__ __launch_bounds__(COMBINE_THREADS) void mla_decode_combine(DecodeArgs args, int splits,
                                                                      int parts) {
  __shared__ float4 scratch[COMBINE_THREADS];
  grid_release();
  grid_wait();
  int block = static_cast<int>(blockIdx.x), warp = static_cast<int>(threadIdx.x) / WARP;
  if (block < splits)
    combine_row(args, block, static_cast<int>(blockIdx.y) * (WARPS / parts) + warp / parts,
                warp % parts, parts, scratch + warp / parts * parts * WARP);
  else if (blockIdx.y + blockIdx.z == 0)
    clear_unseen(args.in, static_cast<int64_t>(block - splits) * WARPS + warp, args.o, args.dtype,
                 args.in.heads * args.in.rank);
}

}  // namespace

cudaError_t dso::run_decode_combine(const DecodeArgs &args, const dso_cuda_mla_decode_params &p,
                                    cudaStream_t stream) {
  const Schedule &s = args.schedule;
  int splits = args.in.n_spans > 0 ? s.ctas : 0;
  int64_t tokens = p.covered ? 0 : ceil_div(args.in.b * args.in.t, WARPS);
  // 一组查询平均分给几个 CTA：多的由几个 warp 分着加。只影响快慢与相加的次序。
  int64_t groups = ceil_div(p.most_rows < 1 ? 1 : p.most_rows, s.rows) * args.in.n_spans;
  int parts = 1;
  while (parts < WARPS && groups * parts * COMBINE_SEGMENTS < s.ctas) parts *= 2;
  dim3 grid(static_cast<unsigned>(splits + tokens),
            static_cast<unsigned>(ceil_div(s.rows, WARPS / parts)),
            static_cast<unsigned>(ceil_div(args.in.rank, COMBINE_COLUMNS)));
  return launch(mla_decode_combine, grid, dim3(COMBINE_THREADS), 0, stream, args, splits, parts);
}
