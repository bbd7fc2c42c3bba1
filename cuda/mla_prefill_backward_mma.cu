// 展开式注意力的反向（sm_80 起的 mma）：dkv 一块 64 个槽位、逐块查询累加，dq 一块 64 个查询、逐块键累加。
#include "mla_prefill.cuh"

namespace {

using namespace dso;

constexpr int TILE = BACKWARD_TILE;
constexpr int WARPS = 8, THREADS = WARPS * WARP;
constexpr int WARPS_N = 2;  // 结果块按行 4 份（各 16 行）、按列 2 份
constexpr int S_TILES = TILE / WARPS_N / 8;
constexpr int P_STRIDE = TILE + TILE_PAD;
constexpr int STAGES = 2;  // 至多

using Params = dso_cuda_mla_prefill_backward_params;

// 共享内存：自己的一块（dkv 是 K、V，dq 是 Q、dO），另一边的各级，P 与 dS，各级的 lse、delta。192/128 维时
// 一级 96 KiB；放得下的卡上两级，145 KiB：下一块一边搬一边算，P 与 dS 各占一块，少两次同步。
template <int QK, int DV>
struct Layout {
  static constexpr int stride = QK + TILE_PAD, v_stride = DV + TILE_PAD;
  static constexpr int v = TILE * stride * 2, block = v + TILE * v_stride * 2;
  static constexpr int rows = block, swap = rows + STAGES * 2 * TILE * 4;  // rows：lse、delta
  static constexpr int swap_bytes = TILE * P_STRIDE * 2;
  __host__ __device__ static constexpr int others(int stages) { return swap + stages * swap_bytes; }
  __host__ __device__ static constexpr int bytes(int stages) {
    return others(stages) + stages * block;
  }
};

// 一个得分块的结果，成对的 16 位：线程的 2 行、S_TILES 个 8 列。
using Pairs = uint32_t[2][S_TILES];

template <class E, int QK, int DV>
struct Backward {
  using L = Layout<QK, DV>;

  const Params &p;
  const dso_mla_inputs &in;
  int stages, head, warp, warp_m, warp_n;
  unsigned char *shared = dynamic_shared();
  float next_lse = 0.0f, next_delta = 0.0f;  // 正在搬的一块里这个线程的查询

  __device__ Backward(const Params &params, int n)
      : p(params),
        in(params.in.in),
        stages(n),
        head(static_cast<int>(blockIdx.y)),
        warp(static_cast<int>(threadIdx.x) / WARP),
        warp_m(warp / WARPS_N),
        warp_n(warp % WARPS_N) {}

  // 自己的、另一边第 stage 级的 K（Q）；V（dO）在它之后 L::v 字节。
  __device__ uint16_t *own() const { return reinterpret_cast<uint16_t *>(shared); }
  __device__ uint16_t *other(int stage) const {
    return reinterpret_cast<uint16_t *>(shared + L::others(stages) + stage * L::block);
  }
  __device__ static uint16_t *second(uint16_t *block) { return block + L::v / 2; }
  __device__ float *lse(int stage) const {
    return reinterpret_cast<float *>(shared + L::rows) + stage * 2 * TILE;
  }
  __device__ float *delta(int stage) const { return lse(stage) + TILE; }
  // P、dS：一级时是同一块。
  __device__ uint16_t *prob_tile() const { return reinterpret_cast<uint16_t *>(shared + L::swap); }
  __device__ uint16_t *ds_tile() const { return prob_tile() + (stages - 1) * L::swap_bytes / 2; }

  // 查询 [first, first + TILE)（span 内）的 Q、dO；超出的填 0。lse、delta 先读进寄存器。
  __device__ void load_queries(const Place &at, int first, uint16_t *q) {
    int width = static_cast<int>(in.nope_dim + in.rope_dim);
    for (int i = warp; i < TILE; i += WARPS) {
      const uint16_t *from = nullptr, *grad = nullptr;
      if (first + i < at.q_len) {
        int64_t token = at.q_begin + first + i;
        from = static_cast<const uint16_t *>(in.q) + query_at(in, token, p.in.first_head + head);
        grad = static_cast<const uint16_t *>(p.grad) +
               (token * in.heads + p.in.first_head + head) * in.v_dim;
      }
      copy_row_async(q + i * L::stride, from, width, QK);
      copy_row_async(second(q) + i * L::v_stride, grad, static_cast<int>(in.v_dim), DV);
    }
    cp_async_commit();
    int i = static_cast<int>(threadIdx.x);
    if (i >= TILE) return;
    bool real = first + i < at.q_len;
    int64_t row = real ? (at.q_begin + first + i) * in.heads + p.in.first_head + head : 0;
    // 以 2 为底；什么都没看见的查询（lse = -inf）没有概率，取 0 即可（它的得分都被置为 -inf）。
    next_lse = real ? finite_max(p.in.lse[row]) * LOG2_E : 0.0f;
    next_delta = real ? p.delta[row] : 0.0f;
  }

  __device__ void put_rows(int stage) {
    int i = static_cast<int>(threadIdx.x);
    if (i < TILE) lse(stage)[i] = next_lse, delta(stage)[i] = next_delta;
  }

  // 槽位 [first, first + TILE)：K、V；[begin, end) 之外与被遮住的填 0。
  __device__ void load_keys(int row, int first, int begin, int end, uint16_t *k) {
    int nope = static_cast<int>(in.nope_dim), rope = static_cast<int>(in.rope_dim);
    for (int i = warp; i < TILE; i += WARPS) {
      int slot = first + i;
      const uint16_t *from = nullptr, *r = nullptr, *value = nullptr;
      if (slot >= begin && slot < end && slot_seen(in, row, slot)) {
        from = static_cast<const uint16_t *>(p.in.kv) + expanded_at(p.in, row, slot, head);
        value = from + nope;
        r = static_cast<const uint16_t *>(in.rope) + slot_at(in, row, slot, in.rope_bs, in.rope_ts);
      }
      copy_row_async(k + i * L::stride, from, nope, nope);
      copy_row_async(k + i * L::stride + nope, r, rope, QK - nope);
      copy_row_async(second(k) + i * L::v_stride, value, static_cast<int>(in.v_dim), DV);
    }
    cp_async_commit();
  }

  template <int WIDTH>
  __device__ void product(const uint16_t *a_tile, const uint16_t *b_tile, int stride,
                          float (&s)[S_TILES][4]) {
#pragma unroll 2
    for (int c = 0; c < WIDTH; c += 16) {
      uint32_t a[4];
      load_a(a, a_tile, stride, warp_m * 16, c);
#pragma unroll
      for (int n = 0; n < S_TILES * 8; n += 16) {
        uint32_t b[4];
        load_b_16x16(b, b_tile, stride, warp_n * S_TILES * 8 + n, c);
        E::mma(s[n / 8], a, b[0], b[1]);
        E::mma(s[n / 8 + 1], a, b[2], b[3]);
      }
    }
  }

  // P = exp(S - lse)、dS = P (dP - delta)；first 是第一个查询，key 是第一个键（都在 span 内，key 可以为负）。
  __device__ void probabilities(const Place &at, int first, int key, uint16_t *q, uint16_t *k,
                                int stage, Pairs &prob, Pairs &ds) {
    float s[S_TILES][4] = {}, dp[S_TILES][4] = {};
    product<QK>(q, k, L::stride, s);
    product<DV>(second(q), second(k), L::v_stride, dp);
    float scale = score_scale(in);
    int own = first + warp_m * 16;
    // 只有跨过因果的边、到了两端或有遮盖的块才逐个判断。
    bool all = !in.kv_mask && key >= 0 && own + 16 <= at.q_len && key + TILE <= at.kv_len &&
               key + TILE <= visible_keys(in, at, own);
#pragma unroll
    for (int i = 0; i < 2; i++) {
      int row = warp_m * 16 + fragment_row() + 8 * i;
      int limit = first + row < at.q_len ? visible_keys(in, at, first + row) : 0;
      float base = lse(stage)[row], shift = delta(stage)[row];
#pragma unroll
      for (int n = 0; n < S_TILES; n++) {
        int column = warp_n * S_TILES * 8 + n * 8 + fragment_column();
        float x[2], y[2];
#pragma unroll
        for (int e = 0; e < 2; e++) {
          int index = key + column + e;
          bool seen = all || (index >= 0 && index < limit && slot_seen(in, at, at.slot + index));
          x[e] = seen ? fast_exp2(s[n][2 * i + e] * scale - base) : 0.0f;
          y[e] = seen ? x[e] * (dp[n][2 * i + e] - shift) * in.softmax_scale : 0.0f;
        }
        prob[i][n] = E::pack(x[0], x[1]), ds[i][n] = E::pack(y[0], y[1]);
      }
    }
  }

  __device__ void put(uint16_t *tile, const Pairs &pairs) {
#pragma unroll
    for (int i = 0; i < 2; i++)
#pragma unroll
      for (int n = 0; n < S_TILES; n++) {
        int row = warp_m * 16 + fragment_row() + 8 * i;
        int column = warp_n * S_TILES * 8 + n * 8 + fragment_column();
        *reinterpret_cast<uint32_t *>(tile + row * P_STRIDE + column) = pairs[i][n];
      }
  }
};

// acc [16 行, N * 8 列] += A [64, 64] B：A 是 P 或 dS（TRANS 时取转置），B 的行是求和的一维。
template <class E, int N, bool TRANS>
__device__ void accumulate(const uint16_t *a_tile, int row, const uint16_t *b_tile, int b_stride,
                           int column, float (&acc)[N][4]) {
#pragma unroll
  for (int c = 0; c < TILE; c += 16) {
    uint32_t a[4];
    if (TRANS)
      load_a_trans(a, a_tile, P_STRIDE, row, c);
    else
      load_a(a, a_tile, P_STRIDE, row, c);
#pragma unroll
    for (int n = 0; n < N; n += 2) {
      uint32_t b[4];
      load_b_trans(b, b_tile, b_stride, c, column + n * 8);
      E::mma(acc[n], a, b[0], b[1]);
      E::mma(acc[n + 1], a, b[2], b[3]);
    }
  }
}

// 每块 64 个槽位、一个头：dK、dV。没有人看的槽位写 0。
template <class E, int QK, int DV>
__global__ __launch_bounds__(THREADS, 1) void mla_backward_dkv(Params params, int stages) {
  grid_wait();
  using B = Backward<E, QK, DV>;
  using L = Layout<QK, DV>;
  constexpr int NK = QK / WARPS_N / 8, NV = DV / WARPS_N / 8;
  B b(params, stages);
  const dso_mla_inputs &in = b.in;
  int tiles = static_cast<int>((in.s + TILE - 1) / TILE);
  int row = static_cast<int>(blockIdx.x) / tiles,
      first = static_cast<int>(blockIdx.x) % tiles * TILE;
  float dk[NK][4] = {}, dv[NV][4] = {};
  for (int64_t i = 0; i < in.n_spans; i++) {
    Place at = locate(in, i);
    int end = at.slot + at.kv_len;
    if (at.row != row || at.q_len == 0 || first + TILE <= at.slot || first >= end) continue;
    int key = first - at.slot;  // 可以为负：这一块从 span 之前开始
    // 因果时，看得见这一块的第一个查询。
    int from = in.causal ? key - (at.kv_len - at.q_len) : 0;
    from = from > 0 ? from / TILE * TILE : 0;
    __syncthreads();  // 上一个 span 的读者都过去了
    b.load_keys(row, first, at.slot, end, b.own());
    b.load_queries(at, from, b.other(0));
    int stage = 0;
    for (int query = from; query < at.q_len; query += TILE) {
      uint16_t *q = b.other(stage);
      bool next = query + TILE < at.q_len;
      b.put_rows(stage);
      cp_async_wait<0>();
      __syncthreads();
      if (next && stages > 1) b.load_queries(at, query + TILE, b.other(1 - stage));
      Pairs prob, ds;
      b.probabilities(at, query, key, q, b.own(), stage, prob, ds);
      b.put(b.prob_tile(), prob);
      auto add_dv = [&] {
        accumulate<E, NV, true>(b.prob_tile(), b.warp_m * 16, B::second(q), L::v_stride,
                                b.warp_n * NV * 8, dv);
      };
      if (stages == 1) {
        __syncthreads();
        add_dv();
        __syncthreads();
      }
      b.put(b.ds_tile(), ds);
      __syncthreads();
      if (stages > 1) add_dv();
      accumulate<E, NK, true>(b.ds_tile(), b.warp_m * 16, q, L::stride, b.warp_n * NK * 8, dk);
      if (stages > 1) {
        stage = 1 - stage;
      } else if (next) {
        __syncthreads();
        b.load_queries(at, query + TILE, q);
      }
    }
  }
  int nope = static_cast<int>(in.nope_dim), rope = static_cast<int>(in.rope_dim);
#pragma unroll
  for (int i = 0; i < 2; i++) {
    int slot = first + b.warp_m * 16 + fragment_row() + 8 * i;
    if (slot >= in.s) continue;
    auto *to = static_cast<uint16_t *>(params.dkv) + expanded_at(params.in, row, slot, b.head);
    float *drope = params.drope + ((row * in.s + slot) * params.in.heads + b.head) * rope;
#pragma unroll
    for (int n = 0; n < NK; n++) {
      int column = b.warp_n * NK * 8 + n * 8 + fragment_column();
      float x = dk[n][2 * i], y = dk[n][2 * i + 1];
      if (column < nope)  // dn、dr 都是 8 的倍数，两列同在一边
        *reinterpret_cast<uint32_t *>(to + column) = E::pack(x, y);
      else if (column < nope + rope)
        drope[column - nope] = x, drope[column - nope + 1] = y;
    }
#pragma unroll
    for (int n = 0; n < NV; n++) {
      int column = b.warp_n * NV * 8 + n * 8 + fragment_column();
      if (column < in.v_dim)
        *reinterpret_cast<uint32_t *>(to + nope + column) = E::pack(dv[n][2 * i], dv[n][2 * i + 1]);
    }
  }
}

// 每块 64 个查询、一个头：dQ。
template <class E, int QK, int DV>
__global__ __launch_bounds__(THREADS, 1) void mla_backward_dq(Params params, int stages) {
  grid_wait();
  using B = Backward<E, QK, DV>;
  using L = Layout<QK, DV>;
  constexpr int NK = QK / WARPS_N / 8;
  B b(params, stages);
  const dso_mla_inputs &in = b.in;
  Place at;
  int first;
  if (!find_tile(in, TILE, gridDim.x - 1 - blockIdx.x, &at, &first)) return;
  int last = first + TILE < at.q_len ? first + TILE : at.q_len;
  int end = visible_keys(in, at, last - 1);
  float dq[NK][4] = {};
  auto load = [&](int key, int stage) {
    b.load_keys(at.row, at.slot + key, at.slot, at.slot + at.kv_len, b.other(stage));
  };
  b.load_queries(at, first, b.own());
  b.put_rows(0);
  if (end > 0) load(0, 0);
  int stage = 0;
  for (int key = 0; key < end; key += TILE) {
    uint16_t *k = b.other(stage);
    bool next = key + TILE < end;
    cp_async_wait<0>();
    __syncthreads();
    if (next && stages > 1) load(key + TILE, 1 - stage);
    Pairs prob, ds;
    b.probabilities(at, first, key, b.own(), k, 0, prob, ds);
    b.put(b.ds_tile(), ds);
    __syncthreads();
    accumulate<E, NK, false>(b.ds_tile(), b.warp_m * 16, k, L::stride, b.warp_n * NK * 8, dq);
    if (stages > 1) {
      stage = 1 - stage;
    } else if (next) {
      __syncthreads();
      load(key + TILE, 0);
    }
  }
  cp_async_wait<0>();
  int width = static_cast<int>(in.nope_dim + in.rope_dim);
#pragma unroll
  for (int i = 0; i < 2; i++) {
    int row = first + b.warp_m * 16 + fragment_row() + 8 * i;
    if (row >= at.q_len) continue;
    auto *to = static_cast<uint16_t *>(params.dq) +
               ((at.q_begin + row) * in.heads + params.in.first_head + b.head) * width;
#pragma unroll
    for (int n = 0; n < NK; n++) {
      int column = b.warp_n * NK * 8 + n * 8 + fragment_column();
      if (column < width)
        *reinterpret_cast<uint32_t *>(to + column) = E::pack(dq[n][2 * i], dq[n][2 * i + 1]);
    }
  }
}

// ---- 主机侧 ----

template <class E, int QK, int DV>
cudaError_t run_mma(const Params *p, const BackwardLaunch &to) {
  using L = Layout<QK, DV>;
  if (to.bytes) {
    *to.bytes = L::bytes(1);
    return cudaSuccess;
  }
  int stages = L::bytes(STAGES) <= to.shared_limit ? STAGES : 1;
  auto bytes = static_cast<size_t>(L::bytes(stages));
  cudaError_t error =
      launch(mla_backward_dkv<E, QK, DV>, to.dkv, dim3(THREADS), bytes, to.stream, *p, stages);
  if (error != cudaSuccess) return error;
  return launch(mla_backward_dq<E, QK, DV>, to.dq, dim3(THREADS), bytes, to.stream, *p, stages);
}

template <class E>
cudaError_t pick(const Params *p, const BackwardLaunch &to) {
  int64_t qk = p->in.in.nope_dim + p->in.in.rope_dim, v = p->in.in.v_dim;
  if (qk <= 96 && v <= 64) return run_mma<E, 96, 64>(p, to);
  if (qk <= 128 && v <= 128) return run_mma<E, 128, 128>(p, to);
  if (qk <= 192 && v <= 128) return run_mma<E, 192, 128>(p, to);
  return run_mma<E, 256, 256>(p, to);
}

}  // namespace

cudaError_t dso::run_backward_mma(const Params &p, const BackwardLaunch &to) {
  return p.in.dtype == DSO_BF16 ? pick<Bf16>(&p, to) : pick<F16>(&p, to);
}
