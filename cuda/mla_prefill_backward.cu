// 展开式注意力的反向（sm_80 起）。K、V 按头分组重新展开，概率由前向的 lse 重算。
//
// 三个核：delta = 逐行 Σ dO · O；dq，每块 64 个查询，逐块键累加；dkv，每块 64 个槽位，逐块查询累加。
// 分成两个核而不是用原子加：多算一遍得分，换来逐位确定、而且没有 fp32 的 dq 中间张量。
// 同一行的几个 span 的键可以重叠：dkv 的一块依次看这一行的每个 span。
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

// ---- delta：8 个线程一行，一次各读 V 个 ----

constexpr int DELTA_LANES = 8, DELTA_ROWS = THREADS / DELTA_LANES;

template <int V>
__global__ void mla_backward_delta(Params p) {
  grid_wait();
  const dso_mla_inputs &in = p.in.in;
  int64_t row = static_cast<int64_t>(blockIdx.x) * DELTA_ROWS + threadIdx.x / DELTA_LANES;
  bool real = row < in.b * in.t * in.heads;
  float sum = 0.0f;
  for (int64_t c = threadIdx.x % DELTA_LANES * V; real && c < in.v_dim; c += DELTA_LANES * V) {
    Vec<V> x = load<V>(p.grad, in.q_dtype, row * in.v_dim + c),
           y = load<V>(p.in.out, in.q_dtype, row * in.v_dim + c);
#pragma unroll
    for (int i = 0; i < V; i++) sum += x.v[i] * y.v[i];
  }
#pragma unroll
  for (int step = DELTA_LANES / 2; step > 0; step /= 2)
    sum += __shfl_xor_sync(ALL_LANES, sum, step);
  if (real && threadIdx.x % DELTA_LANES == 0) p.delta[row] = sum;
}

// ---- 通用路径：fp32，任何维度；一个 warp 一行（查询或键），另一边每个线程一个 ----

struct GeneralLayout {
  int qk, dv, other, stride, own_qk, own_dv, a, b, p, d, out_qk, out_dv, bytes;
  __host__ __device__ explicit GeneralLayout(const dso_mla_inputs &in) {
    qk = static_cast<int>(in.nope_dim + in.rope_dim), dv = static_cast<int>(in.v_dim);
    stride = (qk + dv) | 1;  // 另一边的一行：qk 个之后 dv 个
    own_qk = 0, own_dv = own_qk + GENERAL_ROWS * qk;
    other = own_dv + GENERAL_ROWS * dv;
    p = other + GENERAL_KEYS * stride, d = p + GENERAL_ROWS * GENERAL_KEYS;
    a = d + GENERAL_ROWS * GENERAL_KEYS, b = a + GENERAL_KEYS;
    out_qk = b + GENERAL_KEYS, out_dv = out_qk + GENERAL_ROWS * qk;
    bytes = (out_dv + GENERAL_ROWS * dv) * 4;
  }
};

// 一行查询：q 与 dO，[qk + dv]。
__device__ float query_element(const Params &p, const Place &at, int query, int head, int c,
                               int qk) {
  const dso_mla_inputs &in = p.in.in;
  int64_t token = at.q_begin + query, full = p.in.first_head + head;
  if (c < qk) return load_one(in.q, in.q_dtype, query_at(in, token, full) + c);
  return load_one(p.grad, in.q_dtype, (token * in.heads + full) * in.v_dim + c - qk);
}

// 一行键：K、旋转部分、V，[qk + dv]。
__device__ float key_element(const Params &p, int row, int slot, int head, int c, int qk) {
  const dso_mla_inputs &in = p.in.in;
  int nope = static_cast<int>(in.nope_dim);
  const auto *kv = static_cast<const float *>(p.in.kv) + expanded_at(p.in, row, slot, head);
  if (c < nope) return kv[c];
  if (c >= qk) return kv[nope + c - qk];
  return load_one(in.rope, in.rope_dtype,
                  slot_at(in, row, slot, in.rope_bs, in.rope_ts) + c - nope);
}

// P 与 dS：x、y 是一行查询与一行键。
__device__ void pair_terms(const Params &p, const float *query, const float *query_grad,
                           const float *key, const float *value, int qk, int dv, float lse,
                           float delta, bool seen, float *prob, float *ds) {
  *prob = *ds = 0.0f;
  if (!seen) return;
  float s = 0.0f, dp = 0.0f, scale = p.in.in.softmax_scale;
  for (int c = 0; c < qk; c++) s += query[c] * key[c];
  for (int c = 0; c < dv; c++) dp += query_grad[c] * value[c];
  *prob = fast_exp2((s * scale - finite_max(lse)) * LOG2_E);
  *ds = *prob * (dp - delta) * scale;
}

__device__ bool key_seen(const dso_mla_inputs &in, const Place &at, int query, int key) {
  return query < at.q_len && key >= 0 && key < visible_keys(in, at, query) &&
         slot_seen(in, at, at.slot + key);
}

__global__ __launch_bounds__(GENERAL_THREADS, 2) void mla_backward_dq_general(Params p) {
  grid_wait();
  const dso_mla_inputs &in = p.in.in;
  Place at;
  int first;
  if (!find_tile(in, GENERAL_ROWS, gridDim.x - 1 - blockIdx.x, &at, &first)) return;
  GeneralLayout to(in);
  auto *shared = reinterpret_cast<float *>(dynamic_shared());
  int row = static_cast<int>(threadIdx.x) / WARP, lane = static_cast<int>(threadIdx.x) % WARP;
  int head = static_cast<int>(blockIdx.y), query = first + row;
  bool real = query < at.q_len;
  float *q = shared + to.own_qk + row * to.qk, *g = shared + to.own_dv + row * to.dv;
  float *ds = shared + to.d + row * GENERAL_KEYS, *dq = shared + to.out_qk + row * to.qk;
  for (int c = lane; c < to.qk; c += WARP)
    q[c] = real ? query_element(p, at, query, head, c, to.qk) : 0.0f, dq[c] = 0.0f;
  for (int c = lane; c < to.dv; c += WARP)
    g[c] = real ? query_element(p, at, query, head, to.qk + c, to.qk) : 0.0f;
  int64_t flat = (at.q_begin + query) * in.heads + p.in.first_head + head;
  float lse = real ? p.in.lse[flat] : 0.0f, delta = real ? p.delta[flat] : 0.0f;
  int last = first + GENERAL_ROWS < at.q_len ? first + GENERAL_ROWS : at.q_len;
  int end = visible_keys(in, at, last - 1), width = to.qk + to.dv;
  for (int begin = 0; begin < end; begin += GENERAL_KEYS) {
    for (int i = static_cast<int>(threadIdx.x); i < GENERAL_KEYS * width; i += GENERAL_THREADS) {
      int key = begin + i / width, c = i % width;
      bool seen = key < at.kv_len && slot_seen(in, at, at.slot + key);
      shared[to.other + i / width * to.stride + c] =
          seen ? key_element(p, at.row, at.slot + key, head, c, to.qk) : 0.0f;
    }
    __syncthreads();
    const float *key = shared + to.other + lane * to.stride;
    float prob;
    pair_terms(p, q, g, key, key + to.qk, to.qk, to.dv, lse, delta,
               key_seen(in, at, query, begin + lane), &prob, ds + lane);
    __syncwarp();
    for (int c = lane; c < to.qk; c += WARP) {
      float sum = 0.0f;
      for (int j = 0; j < GENERAL_KEYS; j++) sum += ds[j] * shared[to.other + j * to.stride + c];
      dq[c] += sum;
    }
    __syncthreads();
  }
  if (!real) return;
  for (int c = lane; c < to.qk; c += WARP) store_one(p.dq, in.q_dtype, flat * to.qk + c, dq[c]);
}

__global__ __launch_bounds__(GENERAL_THREADS, 2) void mla_backward_dkv_general(Params p) {
  grid_wait();
  const dso_mla_inputs &in = p.in.in;
  GeneralLayout to(in);
  auto *shared = reinterpret_cast<float *>(dynamic_shared());
  int lane = static_cast<int>(threadIdx.x) % WARP, own = static_cast<int>(threadIdx.x) / WARP;
  int head = static_cast<int>(blockIdx.y), nope = static_cast<int>(in.nope_dim);
  int tiles = static_cast<int>((in.s + GENERAL_ROWS - 1) / GENERAL_ROWS);
  int row = static_cast<int>(blockIdx.x) / tiles;
  int first = static_cast<int>(blockIdx.x) % tiles * GENERAL_ROWS, slot = first + own;
  float *k = shared + to.own_qk + own * to.qk, *v = shared + to.own_dv + own * to.dv;
  float *prob = shared + to.p + own * GENERAL_KEYS, *ds = shared + to.d + own * GENERAL_KEYS;
  float *dk = shared + to.out_qk + own * to.qk, *dv = shared + to.out_dv + own * to.dv;
  bool usable = slot < in.s && slot_seen(in, row, slot);
  for (int c = lane; c < to.qk; c += WARP) dk[c] = 0.0f;
  for (int c = lane; c < to.dv; c += WARP) dv[c] = 0.0f;
  int width = to.qk + to.dv;
  for (int64_t i = 0; i < in.n_spans; i++) {
    Place at = locate(in, i);
    int end = at.slot + at.kv_len;
    if (at.row != row || at.q_len == 0 || first + GENERAL_ROWS <= at.slot || first >= end) continue;
    bool inside = usable && slot >= at.slot && slot < end;
    for (int c = lane; c < to.qk; c += WARP)
      k[c] = inside ? key_element(p, row, slot, head, c, to.qk) : 0.0f;
    for (int c = lane; c < to.dv; c += WARP)
      v[c] = inside ? key_element(p, row, slot, head, to.qk + c, to.qk) : 0.0f;
    int from = in.causal ? first - at.slot - (at.kv_len - at.q_len) : 0;
    for (int begin = from > 0 ? from : 0; begin < at.q_len; begin += GENERAL_KEYS) {
      __syncthreads();
      for (int n = static_cast<int>(threadIdx.x); n < GENERAL_KEYS * width; n += GENERAL_THREADS) {
        int query = begin + n / width;
        shared[to.other + n / width * to.stride + n % width] =
            query < at.q_len ? query_element(p, at, query, head, n % width, to.qk) : 0.0f;
      }
      if (own == 0) {
        bool real = begin + lane < at.q_len;
        int64_t flat = (at.q_begin + begin + lane) * in.heads + p.in.first_head + head;
        shared[to.a + lane] = real ? p.in.lse[flat] : 0.0f;
        shared[to.b + lane] = real ? p.delta[flat] : 0.0f;
      }
      __syncthreads();
      const float *query = shared + to.other + lane * to.stride;
      bool seen = inside && key_seen(in, at, begin + lane, slot - at.slot);
      pair_terms(p, query, query + to.qk, k, v, to.qk, to.dv, shared[to.a + lane],
                 shared[to.b + lane], seen, prob + lane, ds + lane);
      __syncwarp();
      for (int c = lane; c < width; c += WARP) {
        const float *weight = c < to.qk ? ds : prob;
        float sum = 0.0f;
        for (int j = 0; j < GENERAL_KEYS; j++)
          sum += weight[j] * shared[to.other + j * to.stride + c];
        (c < to.qk ? dk[c] : dv[c - to.qk]) += sum;
      }
      __syncwarp();
    }
    __syncthreads();
  }
  if (slot >= in.s) return;
  auto *dkv = static_cast<float *>(p.dkv) + expanded_at(p.in, row, slot, head);
  float *drope = p.drope + ((row * in.s + slot) * p.in.heads + head) * in.rope_dim;
  for (int c = lane; c < to.qk; c += WARP) (c < nope ? dkv[c] : drope[c - nope]) = dk[c];
  for (int c = lane; c < to.dv; c += WARP) dkv[nope + c] = dv[c];
}

// ---- 主机侧 ----

struct Launches {
  dim3 dkv, dq;
  cudaStream_t stream;
  int *bytes;  // 不为空时只算至少要多少共享内存，不启动
  int shared_limit;
};

template <class E, int QK, int DV>
cudaError_t run_mma(const Params *p, const Launches &to) {
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
cudaError_t pick(const Params *p, const Launches &to) {
  int64_t qk = p->in.in.nope_dim + p->in.in.rope_dim, v = p->in.in.v_dim;
  if (qk <= 96 && v <= 64) return run_mma<E, 96, 64>(p, to);
  if (qk <= 128 && v <= 128) return run_mma<E, 128, 128>(p, to);
  if (qk <= 192 && v <= 128) return run_mma<E, 192, 128>(p, to);
  return run_mma<E, 256, 256>(p, to);
}

cudaError_t run_general(const Params *p, const Launches &to) {
  auto bytes = static_cast<size_t>(GeneralLayout(p->in.in).bytes);
  cudaError_t error =
      launch(mla_backward_dkv_general, to.dkv, dim3(GENERAL_THREADS), bytes, to.stream, *p);
  if (error != cudaSuccess) return error;
  return launch(mla_backward_dq_general, to.dq, dim3(GENERAL_THREADS), bytes, to.stream, *p);
}

}  // namespace

cudaError_t dso_cuda_mla_backward_delta(const Params *p, cudaStream_t stream) {
  int64_t rows = p->in.in.b * p->in.in.t * p->in.in.heads;
  if (rows == 0) return cudaSuccess;
  dim3 grid(static_cast<unsigned>(ceil_div(rows, DELTA_ROWS)));
  const dso_mla_inputs &in = p->in.in;
  bool wide = wide_ok(p->grad, in.q_dtype, in.v_dim) && wide_ok(p->in.out, in.q_dtype, in.v_dim);
  return wide ? launch(mla_backward_delta<8>, grid, dim3(THREADS), 0, stream, *p)
              : launch(mla_backward_delta<1>, grid, dim3(THREADS), 0, stream, *p);
}

int dso_cuda_mla_prefill_backward_shared(const dso_mla_inputs *in, dso_dtype dtype) {
  int bytes = GeneralLayout(*in).bytes;
  Params p{};
  p.in.in = *in;
  if (dtype != DSO_F32) pick<Bf16>(&p, {dim3(), dim3(), nullptr, &bytes, 0});
  return bytes;
}

cudaError_t dso_cuda_mla_prefill_backward(const Params *p, cudaStream_t stream) {
  const dso_mla_inputs &in = p->in.in;
  if (in.b * in.s == 0 || p->in.heads == 0) return cudaSuccess;
  bool mma = p->in.dtype != DSO_F32;
  int64_t tile = mma ? TILE : GENERAL_ROWS;
  auto heads = static_cast<unsigned>(p->in.heads);
  Launches to{dim3(static_cast<unsigned>(in.b * ceil_div(in.s, tile)), heads),
              dim3(static_cast<unsigned>(ceil_div(in.b * in.t, tile) + in.n_spans), heads), stream,
              nullptr, 0};
  if (!mma) return run_general(p, to);
  Device device;
  cudaError_t error = device_of(&device);
  if (error != cudaSuccess) return error;
  if (prefill_sm90_fits(in, device)) {
    error = run_backward_dkv_sm90(*p, stream);
    return error == cudaSuccess ? run_backward_dq_sm90(*p, stream) : error;
  }
  to.shared_limit = device.shared_limit;
  return p->in.dtype == DSO_BF16 ? pick<Bf16>(p, to) : pick<F16>(p, to);
}
