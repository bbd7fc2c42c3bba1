// 展开式注意力的前向（sm_80 起）：K、V 已由矩阵乘展开（按头分组，见 binding_cuda_prefill.cpp），旋转部分各头共用。
// 在线 softmax 的做法见 FlashAttention-2（arXiv 2307.08691）：P 留在寄存器里，直接作第二个乘法的左操作数。
//
// 一块 128 个查询、一个头；8 个 warp 各 16 行，逐块 64 个键。没有 T x S 的得分，也没有拼接的 K。
#include "mla_prefill.cuh"

namespace {

using namespace dso;

constexpr int WARPS = PREFILL_ROWS / 16;
constexpr int THREADS = WARPS * WARP;

// 动态共享内存：Q、各级的 K 与 V。
template <int DV>
struct Layout {
  int width, stride, v_stride, stages, k, v, bytes;
  __host__ __device__ Layout(int64_t qk_dim, int s) : stages(s) {
    width = static_cast<int>((qk_dim + 31) / 32 * 32);
    stride = width + TILE_PAD, v_stride = DV + TILE_PAD;
    k = PREFILL_ROWS * stride * 2;
    v = k + stages * PREFILL_KEYS * stride * 2;
    bytes = v + stages * PREFILL_KEYS * v_stride * 2;
  }
};

template <class E, int DV>
struct Attend {
  const dso_cuda_mla_prefill_params &p;
  const dso_mla_inputs &in;
  Layout<DV> layout;
  Place at;
  int first, head, warp;  // 第一个查询（span 内）、组内的头
  uint16_t *q, *keys, *values;

  float o[DV / 8][4] = {};
  float m[2] = {-INFINITY, -INFINITY}, l[2] = {0.0f, 0.0f};
  int limit[2];

  __device__ Attend(const dso_cuda_mla_prefill_params &params, int stages, const Place &place,
                    int begin)
      : p(params),
        in(params.in),
        layout(in.nope_dim + in.rope_dim, stages),
        at(place),
        first(begin),
        head(static_cast<int>(blockIdx.y)),
        warp(static_cast<int>(threadIdx.x) / WARP) {
    unsigned char *shared = dynamic_shared();
    q = reinterpret_cast<uint16_t *>(shared);
    keys = reinterpret_cast<uint16_t *>(shared + layout.k);
    values = reinterpret_cast<uint16_t *>(shared + layout.v);
    for (int i = 0; i < 2; i++) {
      int row = first + warp * 16 + fragment_row() + 8 * i;
      limit[i] = row < at.q_len ? visible_keys(in, at, row) : 0;
    }
  }

  __device__ uint16_t *key_tile(int block) const {
    return keys + block % layout.stages * PREFILL_KEYS * layout.stride;
  }
  __device__ uint16_t *value_tile(int block) const {
    return values + block % layout.stages * PREFILL_KEYS * layout.v_stride;
  }

  __device__ void load_queries() {
    int width = static_cast<int>(in.nope_dim + in.rope_dim);
    for (int row = warp; row < PREFILL_ROWS; row += WARPS) {
      const uint16_t *from = nullptr;
      if (first + row < at.q_len)
        from = static_cast<const uint16_t *>(in.q) +
               query_at(in, at.q_begin + first + row, p.first_head + head);
      copy_row_async(q + row * layout.stride, from, width, layout.width);
    }
  }

  // 一块键与值；范围之外、被遮住的填 0。
  __device__ void load_block(int block) {
    int nope = static_cast<int>(in.nope_dim), rope = static_cast<int>(in.rope_dim);
    for (int i = warp; i < PREFILL_KEYS; i += WARPS) {
      int key = block * PREFILL_KEYS + i, slot = at.slot + key;
      const uint16_t *k = nullptr, *r = nullptr, *v = nullptr;
      if (key < at.kv_len && slot_seen(in, at, slot)) {
        k = static_cast<const uint16_t *>(p.kv) + expanded_at(p, at.row, slot, head);
        v = k + nope;
        r = static_cast<const uint16_t *>(in.rope) +
            slot_at(in, at.row, slot, in.rope_bs, in.rope_ts);
      }
      uint16_t *to = key_tile(block) + i * layout.stride;
      copy_row_async(to, k, nope, nope);
      copy_row_async(to + nope, r, rope, layout.width - nope);
      copy_row_async(value_tile(block) + i * layout.v_stride, v, static_cast<int>(in.v_dim), DV);
    }
    cp_async_commit();
  }

  __device__ void score(int block, float (&s)[PREFILL_KEYS / 8][4]) {
    const uint16_t *tile = key_tile(block);
#pragma unroll 2
    for (int k = 0; k < layout.width; k += 16) {
      uint32_t a[4];
      load_a(a, q, layout.stride, warp * 16, k);
#pragma unroll
      for (int n = 0; n < PREFILL_KEYS; n += 16) {
        uint32_t b[4];
        load_b_16x16(b, tile, layout.stride, n, k);
        E::mma(s[n / 8], a, b[0], b[1]);
        E::mma(s[n / 8 + 1], a, b[2], b[3]);
      }
    }
  }

  // 只有跨过因果的边、到了末尾或有遮盖的块才逐个判断。
  __device__ void hide(int block, float (&s)[PREFILL_KEYS / 8][4]) {
    int end = (block + 1) * PREFILL_KEYS, row = first + warp * 16;
    bool all = end <= at.kv_len && row + 16 <= at.q_len && end <= visible_keys(in, at, row);
    if (all && !in.kv_mask) return;
#pragma unroll
    for (int n = 0; n < PREFILL_KEYS / 8; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        int key = block * PREFILL_KEYS + n * 8 + fragment_column() + (i & 1);
        bool seen = key < limit[i >> 1] && slot_seen(in, at, at.slot + key);
        s[n][i] = seen ? s[n][i] : -INFINITY;
      }
  }

  __device__ void softmax(float (&s)[PREFILL_KEYS / 8][4]) {
    float scale = score_scale(in);
#pragma unroll
    for (int i = 0; i < 2; i++) {
      float top = s[0][2 * i];
#pragma unroll
      for (int n = 0; n < PREFILL_KEYS / 8; n++)
        top = fmaxf(top, fmaxf(s[n][2 * i], s[n][2 * i + 1]));
      top = fmaxf(m[i], quad_max(top) * scale);
      float base = finite_max(top), keep = fast_exp2(m[i] - base), sum = 0.0f;
      m[i] = top;
#pragma unroll
      for (int n = 0; n < PREFILL_KEYS / 8; n++)
#pragma unroll
        for (int e = 0; e < 2; e++) {
          float &x = s[n][2 * i + e];
          x = fast_exp2(x * scale - base);
          sum += x;
        }
      l[i] = l[i] * keep + sum;
#pragma unroll
      for (int n = 0; n < DV / 8; n++) o[n][2 * i] *= keep, o[n][2 * i + 1] *= keep;
    }
  }

  // P 的结果片段就是下一个乘法的左操作数片段：相邻两列的 8x8 拼成 16x16。
  __device__ void accumulate(int block, const float (&s)[PREFILL_KEYS / 8][4]) {
    const uint16_t *tile = value_tile(block);
#pragma unroll
    for (int k = 0; k < PREFILL_KEYS; k += 16) {
      const float (&x)[4] = s[k / 8], (&y)[4] = s[k / 8 + 1];
      uint32_t a[4] = {E::pack(x[0], x[1]), E::pack(x[2], x[3]), E::pack(y[0], y[1]),
                       E::pack(y[2], y[3])};
#pragma unroll
      for (int n = 0; n < DV; n += 16) {
        uint32_t b[4];
        load_b_trans(b, tile, layout.v_stride, k, n);
        E::mma(o[n / 8], a, b[0], b[1]);
        E::mma(o[n / 8 + 1], a, b[2], b[3]);
      }
    }
  }

  __device__ void step(int block) {
    float s[PREFILL_KEYS / 8][4] = {};
    score(block, s);
    hide(block, s);
    softmax(s);
    accumulate(block, s);
  }

  __device__ void store() {
#pragma unroll
    for (int i = 0; i < 2; i++) {
      int row = first + warp * 16 + fragment_row() + 8 * i;
      float sum = quad_sum(l[i]);
      if (row >= at.q_len) continue;
      int64_t to = (at.q_begin + row) * in.heads + p.first_head + head;
      if (fragment_column() == 0) p.lse[to] = sum == 0.0f ? -INFINITY : m[i] / LOG2_E + logf(sum);
      float inverse = inverse_of(sum);
#pragma unroll
      for (int n = 0; n < DV / 8; n++) {
        int column = n * 8 + fragment_column();
        if (column >= in.v_dim) continue;  // dv 是 8 的倍数，两列同在
        auto *pair =
            reinterpret_cast<uint32_t *>(static_cast<uint16_t *>(p.out) + to * in.v_dim + column);
        *pair = E::pack(o[n][2 * i] * inverse, o[n][2 * i + 1] * inverse);
      }
    }
  }

  __device__ void run() {
    int last = first + PREFILL_ROWS < at.q_len ? first + PREFILL_ROWS : at.q_len;
    int end = visible_keys(in, at, last - 1);
    int blocks = (end + PREFILL_KEYS - 1) / PREFILL_KEYS;
    load_queries();
    if (blocks > 0) load_block(0);
    for (int block = 0; block < blocks; block++) {
      cp_async_wait<0>();
      __syncthreads();
      bool next = block + 1 < blocks;
      if (next && layout.stages > 1) load_block(block + 1);
      step(block);
      if (next && layout.stages == 1) {
        __syncthreads();
        load_block(block + 1);
      }
    }
    cp_async_wait<0>();  // 一个键都看不见时，查询的拷贝也要等完
    store();
  }
};

template <class E, int DV>
__global__ __launch_bounds__(THREADS, 1) void mla_prefill_kernel(dso_cuda_mla_prefill_params p,
                                                                 int stages) {
  grid_wait();
  Place at;
  int first;
  // 靠后的查询看得多、耗时长，先做。
  int64_t tile = gridDim.x - 1 - blockIdx.x;
  if (!find_tile(p.in, PREFILL_ROWS, tile, &at, &first)) return;
  Attend<E, DV> attend(p, stages, at, first);
  attend.run();
}

// ---- 通用路径：fp32 计算，任何维度；一个 warp 一个查询，一次 32 个键 ----

struct GeneralLayout {
  int qk, dv, k_stride, q, k, v, o, p, bytes;
  __host__ __device__ explicit GeneralLayout(const dso_mla_inputs &in) {
    qk = static_cast<int>(in.nope_dim + in.rope_dim), dv = static_cast<int>(in.v_dim);
    k_stride = qk | 1;  // 奇数：相邻线程读相邻键的同一列，不冲突
    q = 0, k = q + GENERAL_ROWS * qk, v = k + GENERAL_KEYS * k_stride;
    o = v + GENERAL_KEYS * dv, p = o + GENERAL_ROWS * dv;
    bytes = (p + GENERAL_ROWS * GENERAL_KEYS) * 4;
  }
};

__global__ __launch_bounds__(GENERAL_THREADS,
                             2) void mla_prefill_general(dso_cuda_mla_prefill_params p) {
  grid_wait();
  const dso_mla_inputs &in = p.in;
  Place at;
  int first;
  if (!find_tile(in, GENERAL_ROWS, gridDim.x - 1 - blockIdx.x, &at, &first)) return;
  GeneralLayout to(in);
  auto *shared = reinterpret_cast<float *>(dynamic_shared());
  int thread = static_cast<int>(threadIdx.x), row = thread / WARP, lane = thread % WARP;
  int head = static_cast<int>(blockIdx.y), query = first + row,
      nope = static_cast<int>(in.nope_dim);
  bool real = query < at.q_len;
  const auto *kv = static_cast<const float *>(p.kv);
  float *q = shared + to.q + row * to.qk, *o = shared + to.o + row * to.dv,
        *prob = shared + to.p + row * GENERAL_KEYS;
  int64_t from = real ? query_at(in, at.q_begin + query, p.first_head + head) : 0;
  for (int c = lane; c < to.qk; c += WARP) q[c] = real ? load_one(in.q, in.q_dtype, from + c) : 0;
  for (int c = lane; c < to.dv; c += WARP) o[c] = 0.0f;
  float m = -INFINITY, l = 0.0f;
  int limit = real ? visible_keys(in, at, query) : 0;
  int last = first + GENERAL_ROWS < at.q_len ? first + GENERAL_ROWS : at.q_len;
  int end = visible_keys(in, at, last - 1);
  for (int begin = 0; begin < end; begin += GENERAL_KEYS) {
    for (int i = thread; i < GENERAL_KEYS * (to.qk + to.dv); i += GENERAL_THREADS) {
      int key = i / (to.qk + to.dv), c = i % (to.qk + to.dv), slot = at.slot + begin + key;
      float x = 0.0f;
      if (begin + key < at.kv_len && slot_seen(in, at, slot)) {
        int64_t base = expanded_at(p, at.row, slot, head);
        if (c < nope)
          x = kv[base + c];
        else if (c < to.qk)
          x = load_one(in.rope, in.rope_dtype,
                       slot_at(in, at.row, slot, in.rope_bs, in.rope_ts) + c - nope);
        else
          x = kv[base + nope + c - to.qk];
      }
      shared[c < to.qk ? to.k + key * to.k_stride + c : to.v + key * to.dv + c - to.qk] = x;
    }
    __syncthreads();
    int key = begin + lane;
    float s = -INFINITY;
    if (key < limit && slot_seen(in, at, at.slot + key)) {
      const float *k = shared + to.k + lane * to.k_stride;
      float sum = 0.0f;
      for (int c = 0; c < to.qk; c++) sum += q[c] * k[c];
      s = sum * score_scale(in);
    }
    float top = s;
#pragma unroll
    for (int step = WARP / 2; step > 0; step /= 2)
      top = fmaxf(top, __shfl_xor_sync(ALL_LANES, top, step));
    top = fmaxf(top, m);
    float base = finite_max(top), keep = fast_exp2(m - base), value = fast_exp2(s - base);
    m = top, l = l * keep + warp_sum(value);
    prob[lane] = value;
    __syncwarp();
    for (int c = lane; c < to.dv; c += WARP) {
      float sum = 0.0f;
      for (int j = 0; j < GENERAL_KEYS; j++) sum += prob[j] * shared[to.v + j * to.dv + c];
      o[c] = o[c] * keep + sum;
    }
    __syncthreads();
  }
  if (!real) return;
  int64_t out = (at.q_begin + query) * in.heads + p.first_head + head;
  float inverse = inverse_of(l);
  if (lane == 0) p.lse[out] = l == 0.0f ? -INFINITY : m / LOG2_E + logf(l);
  for (int c = lane; c < to.dv; c += WARP)
    store_one(p.out, p.out_dtype, out * in.v_dim + c, o[c] * inverse);
}

// bytes 不为空时只算最少要多少共享内存，不启动。
template <class E, int DV>
cudaError_t run_mma(const dso_cuda_mla_prefill_params *p, dim3 grid, int *bytes,
                    cudaStream_t stream) {
  int64_t qk = p->in.nope_dim + p->in.rope_dim;
  if (bytes) {
    *bytes = Layout<DV>(qk, 1).bytes;
    return cudaSuccess;
  }
  Device device;
  cudaError_t error = device_of(&device);
  if (error != cudaSuccess) return error;
  int stages = Layout<DV>(qk, 2).bytes <= device.shared_limit ? 2 : 1;
  return launch(mla_prefill_kernel<E, DV>, grid, dim3(THREADS),
                static_cast<size_t>(Layout<DV>(qk, stages).bytes), stream, *p, stages);
}

template <class E>
cudaError_t pick_v(const dso_cuda_mla_prefill_params *p, dim3 grid, int *bytes,
                   cudaStream_t stream) {
  if (p->in.v_dim <= 64) return run_mma<E, 64>(p, grid, bytes, stream);
  if (p->in.v_dim <= 128) return run_mma<E, 128>(p, grid, bytes, stream);
  return run_mma<E, 256>(p, grid, bytes, stream);
}

int forward_shared(const dso_mla_inputs *in, dso_dtype dtype) {
  int bytes = GeneralLayout(*in).bytes;
  dso_cuda_mla_prefill_params p{};
  p.in = *in;
  if (dtype != DSO_F32) pick_v<Bf16>(&p, dim3(), &bytes, nullptr);
  return bytes;
}

}  // namespace

int dso_cuda_mla_prefill_fits(const dso_mla_inputs *in, dso_dtype dtype, int backward) {
  auto even = [](const void *data, int64_t a, int64_t b, int64_t c) {
    return reinterpret_cast<uintptr_t>(data) % 16 == 0 && a % 8 == 0 && b % 8 == 0 && c % 8 == 0;
  };
  Device device;
  if (device_of(&device) != cudaSuccess) return 0;
  int bytes =
      backward ? dso_cuda_mla_prefill_backward_shared(in, dtype) : forward_shared(in, dtype);
  if (bytes > device.shared_limit) return 0;
  if (dtype == DSO_F32) return 1;
  return in->q_dtype == dtype && in->rope_dtype == dtype && in->nope_dim % 8 == 0 &&
         in->rope_dim % 8 == 0 && in->v_dim % 8 == 0 && in->nope_dim + in->rope_dim <= 256 &&
         in->v_dim <= 256 && even(in->q, in->q_bs, in->q_ts, in->q_hs) &&
         even(in->rope, in->rope_bs, in->rope_ts, 0);
}

cudaError_t dso_cuda_mla_prefill(const dso_cuda_mla_prefill_params *p, cudaStream_t stream) {
  const dso_mla_inputs &in = p->in;
  if (in.b * in.t == 0 || in.n_spans == 0 || p->heads == 0) return cudaSuccess;
  bool mma = p->dtype != DSO_F32;
  // 块数的上界：每个 span 至多多出一块零头。
  int64_t tiles = ceil_div(in.b * in.t, mma ? PREFILL_ROWS : GENERAL_ROWS) + in.n_spans;
  dim3 grid(static_cast<unsigned>(tiles), static_cast<unsigned>(p->heads));
  if (!mma)
    return launch(mla_prefill_general, grid, dim3(GENERAL_THREADS),
                  static_cast<size_t>(GeneralLayout(in).bytes), stream, *p);
  Device device;
  cudaError_t error = device_of(&device);
  if (error != cudaSuccess) return error;
  if (prefill_sm90_fits(in, device))
    return run_prefill_sm90(p, static_cast<int>(tiles), device.sms, stream);
  return p->dtype == DSO_BF16 ? pick_v<Bf16>(p, grid, nullptr, stream)
                              : pick_v<F16>(p, grid, nullptr, stream);
}
