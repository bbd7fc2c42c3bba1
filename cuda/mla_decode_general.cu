// mla_decode 的通用路径：任何类型的组合、任何维度，fp32 计算；一次 8 行，一个 warp 一行。
#include "config.cuh"
#include "mla_decode.cuh"
#include "mma.cuh"

namespace {

using namespace dso;

struct GeneralLayout {
  int q_stride, k_stride, q, k, o, p, m, l, alpha, bytes;
  __host__ __device__ GeneralLayout(const dso_mla_inputs &in, int64_t keys) {
    q_stride = static_cast<int>(in.rank + in.rope_dim);
    k_stride = q_stride | 1;  // 奇数：相邻线程读相邻键的同一列，不冲突
    q = 0, k = q + GENERAL_ROWS * q_stride;
    o = k + static_cast<int>(keys) * k_stride;
    p = o + GENERAL_ROWS * static_cast<int>(in.rank);
    m = p + GENERAL_ROWS * GENERAL_KEYS;
    l = m + GENERAL_ROWS, alpha = l + GENERAL_ROWS;
    bytes = (alpha + GENERAL_ROWS) * 4;
  }
};

__device__ void general_keys(const DecodeArgs &args, const Piece &piece, int first, float *keys,
                             int stride) {
  const dso_mla_inputs &in = args.in;
  int width = static_cast<int>(in.rank + in.rope_dim), count = args.schedule.keys();
  for (int i = static_cast<int>(threadIdx.x); i < count * width; i += GENERAL_THREADS) {
    int key = i / width, column = i % width;
    int slot = piece.at.slot + first + key, row = piece.at.row;
    float x = 0.0f;
    if (first + key < piece.key_end && slot_seen(in, piece.at, slot)) {
      if (column < in.rank) {
        x = load_one(in.latent, in.latent_dtype,
                     slot_at(in, row, slot, in.latent_bs, in.latent_ts) + column);
        if (in.scale) x *= in.scale[slot_at(in, row, slot, in.scale_bs, 1)];
      } else {
        x = load_one(in.rope, in.rope_dtype,
                     slot_at(in, row, slot, in.rope_bs, in.rope_ts) + column - in.rank);
      }
    }
    keys[key * stride + column] = x;
  }
}

// 一个 warp 一行：得分、最大值、P 与 alpha。
__device__ void general_scores(const DecodeArgs &args, const Piece &piece, int first, float *shared,
                               const GeneralLayout &at) {
  const dso_mla_inputs &in = args.in;
  int row = static_cast<int>(threadIdx.x) / WARP, key = static_cast<int>(threadIdx.x) % WARP;
  int index = first + key;
  bool seen = key < args.schedule.keys() && index < row_limit(args, piece, row) &&
              slot_seen(in, piece.at, piece.at.slot + index);
  float s = -INFINITY;
  if (seen) {
    const float *x = shared + at.q + row * at.q_stride, *y = shared + at.k + key * at.k_stride;
    float sum = 0.0f;
    for (int c = 0; c < at.q_stride; c++) sum += x[c] * y[c];
    s = sum * score_scale(in);
  }
  float top = s;
#pragma unroll
  for (int step = WARP / 2; step > 0; step /= 2)
    top = fmaxf(top, __shfl_xor_sync(ALL_LANES, top, step));
  float old = shared[at.m + row];
  top = fmaxf(top, old);
  float base = finite_max(top), value = fast_exp2(s - base), sum = warp_sum(value);
  shared[at.p + row * GENERAL_KEYS + key] = value;
  __syncwarp();
  if (key == 0) {
    float keep = fast_exp2(old - base);
    shared[at.m + row] = top, shared[at.alpha + row] = keep;
    shared[at.l + row] = shared[at.l + row] * keep + sum;
  }
}

__device__ void general_piece(const DecodeArgs &args, const Piece &piece, float *shared,
                              const GeneralLayout &at) {
  const dso_mla_inputs &in = args.in;
  int thread = static_cast<int>(threadIdx.x), rank = static_cast<int>(in.rank);
  for (int i = thread; i < GENERAL_ROWS * at.q_stride; i += GENERAL_THREADS) {
    int row = i / at.q_stride, column = i % at.q_stride;
    int64_t to = row_at(args, piece, row);
    float x = 0.0f;
    if (to >= 0)
      x = column < rank
              ? load_one(args.q_abs, args.dtype, to * in.rank + column)
              : load_one(in.q, in.q_dtype,
                         query_at(in, to / in.heads, to % in.heads) + in.nope_dim + column - rank);
    shared[at.q + i] = x;
  }
  for (int i = thread; i < GENERAL_ROWS * rank; i += GENERAL_THREADS) shared[at.o + i] = 0.0f;
  if (thread < GENERAL_ROWS) shared[at.m + thread] = -INFINITY, shared[at.l + thread] = 0.0f;
  for (int block = 0; block < piece.units; block++) {
    int first = piece.key_begin + block * args.schedule.keys();
    general_keys(args, piece, first, shared + at.k, at.k_stride);
    __syncthreads();
    general_scores(args, piece, first, shared, at);
    __syncthreads();
    for (int c = thread; c < rank; c += GENERAL_THREADS) {
      float sum[GENERAL_ROWS] = {};
      for (int key = 0; key < args.schedule.keys(); key++) {
        float value = shared[at.k + key * at.k_stride + c];
#pragma unroll
        for (int r = 0; r < GENERAL_ROWS; r++)
          sum[r] += shared[at.p + r * GENERAL_KEYS + key] * value;
      }
#pragma unroll
      for (int r = 0; r < GENERAL_ROWS; r++) {
        float *o = shared + at.o + r * rank + c;
        *o = *o * shared[at.alpha + r] + sum[r];
      }
    }
    __syncthreads();
  }
  for (int i = thread; i < GENERAL_ROWS * ((rank + 1) / 2); i += GENERAL_THREADS) {
    int row = i / ((rank + 1) / 2), c = i % ((rank + 1) / 2) * 2;
    const float *o = shared + at.o + row * rank + c;
    write_pair(args, piece, row, c, o[0], c + 1 < rank ? o[1] : 0.0f, shared[at.l + row]);
  }
  if (!piece.whole && thread < GENERAL_ROWS) {
    args.part_m[piece.slot * GENERAL_ROWS + thread] = shared[at.m + thread];
    args.part_l[piece.slot * GENERAL_ROWS + thread] = shared[at.l + thread];
  }
  __syncthreads();
}

__global__ __launch_bounds__(GENERAL_THREADS, 2) void mla_decode_general(DecodeArgs args) {
  grid_wait();
  GeneralLayout at(args.in, args.schedule.keys());
  auto *shared = reinterpret_cast<float *>(dynamic_shared());
  each_piece(args, static_cast<int>(blockIdx.x), threadIdx.x == 0,
             [&](const Piece &piece) { general_piece(args, piece, shared, at); });
}

}  // namespace

cudaError_t dso::run_decode_general(const DecodeArgs &args, int *bytes, cudaStream_t stream) {
  int needed = GeneralLayout(args.in, args.schedule.keys()).bytes;
  if (bytes) {
    *bytes = needed;
    return cudaSuccess;
  }
  return launch(mla_decode_general, dim3(static_cast<unsigned>(args.schedule.ctas)),
                dim3(GENERAL_THREADS), static_cast<size_t>(needed), stream, args);
}
