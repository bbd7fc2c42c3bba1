// sample_filter：约定与取舍同 csrc/sample_filter.c，三个核，不排序。
//
//   score_kernel   许多 CTA 分一行：惩罚、除以温度，写在输出里（正好作中转），留下每 SELECT_BLOCK 个的最大值、
//                  每块的最大值与 Σ exp；
//   select_kernel  一行一块：定出保留到哪里（Cut）。先用各小块的最大值略过不可能的，余下的细找：按与最大值的差
//                  线性分格，再在那一格里按键的高 11、中 11、低 10 位各统计一遍；
//   write_kernel   许多 CTA 分一行：写出概率。
//
// 直方图用整数：质量化成 2^-52 的整数，原子加与次序无关。其余的和都按固定的次序。
#include <cfloat>

#include "dso_cuda.h"
#include "vocab.cuh"

namespace {

using namespace dso;

constexpr int CHUNK_BLOCKS = VOCAB_CHUNK / SELECT_BLOCK;
constexpr int EACH_BINS = SELECT_BINS / SELECT_THREADS;
constexpr double MASS_ONE = 4503599627370496.0;  // 2^52

// 保留大于 value 的，与等于它而下标不小于 first 的；除以 before（min-p 之前的和）之后不小于 least 的。
struct Cut {
  float best;  // 最大的分数；NaN 表示这一行不合法
  float value;
  int64_t first;
  float before, least, scale;  // 1 / 和；least 为负表示没有 min-p
};

struct View {
  double *sum;       // [行, 块] Σ exp(s - 块的最大值)
  Cut *cut;          // [行]
  float *chunk_top;  // [行, 块]
  float *top;        // [行, 小块]
  int64_t chunks, blocks;
};

__host__ View view_of(const dso_sample_filter_params *p, void *scratch, size_t *bytes) {
  int64_t tasks = p->rows * p->positions;
  View v = {};
  v.chunks = vocab_chunks(p->vocab), v.blocks = ceil_div(p->vocab, SELECT_BLOCK);
  v.sum = static_cast<double *>(scratch);
  v.cut = reinterpret_cast<Cut *>(v.sum + tasks * v.chunks);
  v.chunk_top = reinterpret_cast<float *>(v.cut + tasks);
  v.top = v.chunk_top + tasks * v.chunks;
  *bytes = static_cast<size_t>(tasks) *
           (static_cast<size_t>(v.chunks) * 12 + sizeof(Cut) + static_cast<size_t>(v.blocks) * 4);
  return v;
}

// ---- 分数 ----

__device__ void penalize(const dso_sample_filter_params &p, int64_t task, const VocabChunk &at,
                         int64_t from, float *s) {
  if (!p.token || p.penalty == 1.0f) return;
  int64_t count = p.token_len ? p.token_len[task] : p.tokens;
  count = count > p.tokens ? p.tokens : count;
  const int64_t *token = p.token + task / p.positions * p.token_rs;
  for (int64_t j = threadIdx.x; j < count; j += VOCAB_THREADS) {
    int64_t t = token[j];
    if (t < at.begin || t >= at.end) continue;
    float x = load_one(p.logits.data, p.logits.dtype, from + t);  // 由原值算，重复的写同一个数
    s[t - at.begin] = (x < 0.0f ? x * p.penalty : x / p.penalty) / p.temperature;
  }
}

// 小块 threadIdx.x / 4 的最大值；四个线程各看 16 个，次序错开，没有库冲突。
__device__ float block_top(const float *s) {
  int b = static_cast<int>(threadIdx.x) / 4, q = static_cast<int>(threadIdx.x) % 4;
  float top = -INFINITY;
#pragma unroll
  for (int j = 0; j < SELECT_BLOCK / 4; j++)
    top = max_nan(top, s[b * SELECT_BLOCK + q + 4 * ((j + b) % (SELECT_BLOCK / 4))]);
  top = max_nan(top, __shfl_xor_sync(ALL_LANES, top, 1));
  return max_nan(top, __shfl_xor_sync(ALL_LANES, top, 2));
}

static_assert(VOCAB_THREADS == 4 * CHUNK_BLOCKS, "四个线程一个小块");

template <int V>
__global__ void __launch_bounds__(VOCAB_THREADS, 4)
    score_kernel(dso_sample_filter_params p, View v) {
  __shared__ float s[VOCAB_CHUNK];
  grid_release();
  grid_wait();
  int64_t task = blockIdx.x / v.chunks, chunk = blockIdx.x % v.chunks;
  VocabChunk at(chunk, p.vocab);
  int64_t from = task / p.positions * p.logits.rs + task % p.positions * p.logits.ps;
  for (int j = static_cast<int>(threadIdx.x) * V; j < VOCAB_CHUNK; j += VOCAB_THREADS * V) {
    Vec<V> x;
    bool inside = at.begin + j < at.end;
    if (inside) x = load<V>(p.logits.data, p.logits.dtype, from + at.begin + j);
#pragma unroll
    for (int n = 0; n < V; n++) s[j + n] = inside ? x.v[n] / p.temperature : -INFINITY;
  }
  __syncthreads();
  penalize(p, task, at, from, s);
  __syncthreads();
  float top = block_top(s);
  int64_t b = chunk * CHUNK_BLOCKS + threadIdx.x / 4;
  if (threadIdx.x % 4 == 0 && b < v.blocks) v.top[task * v.blocks + b] = top;
  top = block_reduce(top, MaxNanOp());
  float base = top == -INFINITY ? 0.0f : top;
  double sum = 0.0;
  float *out = p.probs + task * p.vocab + at.begin;
  for (int64_t j = threadIdx.x; j < at.end - at.begin; j += VOCAB_THREADS) {
    sum += expf(s[j] - base);
    out[j] = s[j];
  }
  sum = block_reduce(sum, AddOp());
  if (threadIdx.x != 0) return;
  v.sum[blockIdx.x] = sum, v.chunk_top[blockIdx.x] = top;
}

// ---- 细找 ----

// 从大到小看，已有 count 个、质量 above（MASS_ONE 为 1）时，下一个保留与否。
struct Rule {
  double threshold;
  int64_t least;
  double scale;  // 质量 = exp(s - best) * scale；0 表示不看质量
  __device__ bool keeps(double above, int64_t count) const {
    return count < least || static_cast<float>((MASS_ONE - above) / MASS_ONE) > threshold;
  }
};

// 要看的分数：不小于 floor 的；top 非空时它是各小块的最大值，略过不够大的小块。
struct Elements {
  const float *s, *top;
  int64_t n;
  float floor, best;
};

// f(在不在内, 下标, 分数)：一个 warp 的线程总是一起调用。
template <class F>
__device__ void each(const Elements &x, F f) {
  int64_t lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  for (int64_t b = warp; b * SELECT_BLOCK < x.n; b += SELECT_THREADS / WARP) {
    if (x.top && x.top[b] < x.floor) continue;
    for (int64_t i = b * SELECT_BLOCK + lane; i < (b + 1) * SELECT_BLOCK; i += WARP) {
      float s = i < x.n ? x.s[i] : -INFINITY;
      f(i < x.n && s >= x.floor, i, s);
    }
  }
}

using Mass = unsigned long long;

struct Bins {
  unsigned count[SELECT_BINS];
  Mass mass[SELECT_BINS];
};

// 一个 warp 的都落在同一格（相同的分数很多）时合成一次原子加。
__device__ void add_to_bin(Bins &bins, bool inside, int bin, Mass mass) {
  unsigned who = __ballot_sync(ALL_LANES, inside);
  if (!who) return;
  int leader = __ffs(static_cast<int>(who)) - 1, common = __shfl_sync(ALL_LANES, bin, leader);
  bool same = __ballot_sync(ALL_LANES, inside && bin == common) == who;
  unsigned count = 1;
  if (same) {
    mass = warp_reduce(inside ? mass : Mass{0}, AddOp());
    count = static_cast<unsigned>(__popc(who));
    inside = static_cast<int>(threadIdx.x % WARP) == leader;
  }
  if (!inside) return;
  atomicAdd(&bins.count[bin], count);
  if (mass) atomicAdd(&bins.mass[bin], mass);
}

// 已经看到哪里：更大的个数与质量，边界所在的格的个数与质量。
struct Progress {
  int64_t count, inside;
  Mass above, mass;
  int bin;
};

// 各格从小到大（分数从大到小）看，边界所在的格：第一个看完它就不再保留的，没有就是最后一个不空的。
__device__ void choose(const Bins &bins, const Rule &rule, Progress &at) {
  __shared__ Progress next;
  int first = static_cast<int>(threadIdx.x) * EACH_BINS;
  int64_t count = 0;
  Mass mass = 0;
  for (int b = first; b < first + EACH_BINS; b++) count += bins.count[b], mass += bins.mass[b];
  count = at.count + block_before(count);
  mass = at.above + block_before(mass);
  int stop = SELECT_BINS, last = -1;
  int64_t seen = count;
  Mass passed = mass;
  for (int b = first; b < first + EACH_BINS; b++) {
    if (!bins.count[b]) continue;
    last = b, seen += bins.count[b], passed += bins.mass[b];
    if (stop == SELECT_BINS && !rule.keeps(static_cast<double>(passed), seen)) stop = b;
  }
  int chosen = block_reduce(stop, MinOp());
  last = block_reduce(last, MaxOp());
  if (chosen == SELECT_BINS) chosen = last;
  if (chosen / EACH_BINS == static_cast<int>(threadIdx.x)) {
    for (int b = first; b < chosen; b++) count += bins.count[b], mass += bins.mass[b];
    next = {count, bins.count[chosen], mass, bins.mass[chosen], chosen};
  }
  __syncthreads();
  at = next;
}

// 第 pass 遍分数 s 落在哪一格；不在已选定的格里的是 -1。第 0 遍：与最大值的差线性分格，各格大致均匀，差得太多的
// （-inf）都在最后一格；之后三遍：键取反（大的在前）的高 11、中 11、低 10 位。
struct Digits {
  float best, scale;
  int pass, whole;  // whole：第 0 遍选定的格
  uint32_t prefix;  // 之后各遍选定的
  __device__ int linear(float s) const {
    float far = (best - s) * scale;
    return far < SELECT_BINS - 1 ? static_cast<int>(far) : SELECT_BINS - 1;
  }
  __device__ int shift() const { return pass == 1 ? 21 : pass == 2 ? 10 : 0; }
  __device__ int bits() const { return pass == 3 ? 10 : 11; }
  __device__ int bin(float s) const {
    if (pass == 0) return linear(s);
    uint32_t key = ~ordered_key(s) >> shift();
    bool mine = linear(s) == whole && (pass == 1 || key >> bits() == prefix);
    return mine ? static_cast<int>(key & ((1u << bits()) - 1)) : -1;
  }
  __device__ void chose(int bin) {
    if (pass == 0)
      whole = bin;
    else
      prefix = prefix << bits() | static_cast<uint32_t>(bin);
    pass++;
  }
};

// 一遍。
__device__ void narrow(const Elements &x, const Rule &rule, const Digits &digits, Bins &bins,
                       Progress &at) {
  __syncthreads();  // 上一遍读完了
  for (int b = static_cast<int>(threadIdx.x); b < SELECT_BINS; b += SELECT_THREADS)
    bins.count[b] = 0, bins.mass[b] = 0;
  __syncthreads();
  each(x, [&](bool inside, int64_t, float s) {
    int bin = inside ? digits.bin(s) : -1;
    Mass mass = 0;
    if (bin >= 0 && rule.scale > 0)
      mass = static_cast<Mass>(static_cast<double>(expf(s - x.best)) * rule.scale + 0.5);
    add_to_bin(bins, bin >= 0, bin, mass);
  });
  __syncthreads();
  choose(bins, rule, at);
}

// 保留大于 value 的，与等于它的（去掉其中下标最小的 skip 个）。至少有一个不小于 floor 的。
struct Edge {
  float value;
  int64_t skip;
};

__device__ Edge find_edge(const Elements &x, const Rule &rule, Bins &bins) {
  Progress at = {};
  float low = x.floor > x.best - 80.0f ? x.floor : x.best - 80.0f;
  float scale = x.best > low ? static_cast<float>(SELECT_BINS) / (x.best - low) : 0.0f;
  Digits digits = {x.best, scale, 0, 0, 0};
#pragma unroll 1
  while (digits.pass < 4) {
    narrow(x, rule, digits, bins, at);
    digits.chose(at.bin);
  }
  // 相同的分数里保留前几个：keeps 随个数单调
  double above = static_cast<double>(at.above);
  double own = static_cast<double>(at.mass) / static_cast<double>(at.inside);
  int64_t kept = 1, beyond = at.inside;
  while (kept < beyond) {
    int64_t middle = (kept + beyond) / 2;
    if (rule.keeps(above + static_cast<double>(middle) * own, at.count + middle))
      kept = middle + 1;
    else
      beyond = middle;
  }
  return {key_value(~digits.prefix), at.inside - kept};
}

// 等于 value 的里第 skip 个（从 0 数）的下标。每个线程连续的几个小块。
__device__ int64_t tie_index(const Elements &x, float value, int64_t skip) {
  __shared__ int64_t found;
  int64_t blocks = (x.n + SELECT_BLOCK - 1) / SELECT_BLOCK;
  int64_t most = (blocks + SELECT_THREADS - 1) / SELECT_THREADS;
  int64_t begin = threadIdx.x * most, end = begin + most < blocks ? begin + most : blocks;
  auto walk = [&](int64_t rank) {  // 从 rank 数起；到 skip 就记下
    for (int64_t b = begin; b < end; b++) {
      if (x.top[b] < value) continue;
      for (int64_t i = b * SELECT_BLOCK; i < (b + 1) * SELECT_BLOCK && i < x.n; i++)
        if (x.s[i] == value && rank++ == skip) found = i;
    }
    return rank;
  };
  int64_t mine = walk(skip + 1) - (skip + 1);
  int64_t before = block_before(mine);
  if (before <= skip && skip < before + mine) walk(before);
  __syncthreads();
  return found;
}

// 保留下来的 Σ exp(s - best)。
__device__ double kept_sum(const Elements &x, const Cut &cut) {
  double sum = 0.0;
  each(x, [&](bool inside, int64_t i, float s) {
    float e = expf(s - x.best);
    bool kept = inside && (s > cut.value || (s == cut.value && i >= cut.first));
    if (kept && (cut.least < 0.0f || e * cut.before >= cut.least)) sum += e;
  });
  return block_reduce(sum, AddOp());
}

__device__ void keep_top_k(const dso_sample_filter_params &p, Elements &x, int64_t blocks,
                           Bins &bins, Cut &cut) {
  Rule rule = {INFINITY, p.top_k, 0.0};
  if (p.top_k < blocks) {  // 各小块最大值里第 k 大的不大于全体第 k 大的
    Elements tops = {x.top, nullptr, blocks, -INFINITY, x.best};
    x.floor = find_edge(tops, rule, bins).value;
  }
  x.floor = cut.value = find_edge(x, rule, bins).value;
}

__device__ void keep_top_p(const dso_sample_filter_params &p, Elements &x, double sum, Bins &bins,
                           Cut &cut) {
  Rule rule = {static_cast<double>(static_cast<float>(1.0 - p.top_p)), 1, MASS_ONE / sum};
  // 概率不大于 (1 - p) / 2V 的加起来到不了 1 - p；多留一点，免得取对数的舍入
  double least = 0.5 * (1.0 - p.top_p) / static_cast<double>(p.vocab) * sum;
  float floor = x.best + static_cast<float>(log(least)) - 1e-3f;
  x.floor = floor > x.floor ? floor : x.floor;
  if (!(x.floor <= x.best)) x.floor = x.best;
  Edge edge = find_edge(x, rule, bins);
  x.floor = cut.value = edge.value;
  cut.first = edge.skip > 0 ? tie_index(x, edge.value, edge.skip) : 0;
}

__global__ void __launch_bounds__(SELECT_THREADS)
    select_kernel(dso_sample_filter_params p, View v) {
  __shared__ Bins bins;
  grid_release();
  grid_wait();
  int64_t task = blockIdx.x;
  const float *tops = v.chunk_top + task * v.chunks;
  float best = -INFINITY;
  for (int64_t c = threadIdx.x; c < v.chunks; c += SELECT_THREADS) best = max_nan(best, tops[c]);
  best = block_reduce(best, MaxNanOp());
  bool valid = best >= -FLT_MAX && best <= FLT_MAX;
  if (threadIdx.x == 0) {
    p.fault[task] = !valid;
    if (!valid) v.cut[task].best = NAN;
  }
  if (!valid) return;  // 整个块一起退出
  double sum = 0.0;
  for (int64_t c = threadIdx.x; c < v.chunks; c += SELECT_THREADS)
    sum += v.sum[task * v.chunks + c] * exp(static_cast<double>(tops[c]) - best);
  sum = block_reduce(sum, AddOp());
  Elements x = {p.probs + task * p.vocab, v.top + task * v.blocks, p.vocab, -INFINITY, best};
  Cut cut = {best, -INFINITY, 0, 0.0f, -1.0f, 0.0f};
  if (p.top_k > 0 && p.top_k < p.vocab) {
    keep_top_k(p, x, v.blocks, bins, cut);
    sum = kept_sum(x, cut);
  }
  if (p.top_p < 1.0) {
    keep_top_p(p, x, sum, bins, cut);
    sum = kept_sum(x, cut);
  }
  cut.before = static_cast<float>(1.0 / sum);
  if (p.min_p > 0.0f) {
    cut.least = p.min_p * cut.before;
    sum = kept_sum(x, cut);
  }
  cut.scale = static_cast<float>(1.0 / sum);
  if (threadIdx.x == 0) v.cut[task] = cut;
}

// ---- 写出 ----

__global__ void __launch_bounds__(VOCAB_THREADS)
    write_kernel(dso_sample_filter_params p, const Cut *cuts, int64_t chunks) {
  grid_release();
  grid_wait();
  int64_t task = blockIdx.x / chunks;
  VocabChunk at(blockIdx.x % chunks, p.vocab);
  Cut cut = cuts[task];
  bool valid = cut.best == cut.best;
  float *out = p.probs + task * p.vocab;
  for (int64_t i = at.begin + threadIdx.x; i < at.end; i += VOCAB_THREADS) {
    float s = out[i], e = expf(s - cut.best);
    bool kept = s > cut.value || (s == cut.value && i >= cut.first);
    kept = kept && (cut.least < 0.0f || e * cut.before >= cut.least);
    out[i] = valid ? kept ? e * cut.scale : 0.0f : NAN;
  }
}

}  // namespace

size_t dso_cuda_sample_filter_scratch(const dso_sample_filter_params *p) {
  size_t bytes = 0;
  view_of(p, nullptr, &bytes);
  return bytes;
}

cudaError_t dso_cuda_sample_filter(const dso_sample_filter_params *p, void *scratch,
                                   cudaStream_t stream) {
  int64_t tasks = p->rows * p->positions;
  if (tasks == 0) return cudaSuccess;
  size_t bytes = 0;
  View v = view_of(p, scratch, &bytes);
  dim3 grid(static_cast<unsigned>(tasks * v.chunks)), block(VOCAB_THREADS);
  cudaError_t error = wide_positions(p->logits, p->vocab)
                          ? launch(score_kernel<8>, grid, block, 0, stream, *p, v)
                          : launch(score_kernel<1>, grid, block, 0, stream, *p, v);
  if (error != cudaSuccess) return error;
  error = launch(select_kernel, dim3(static_cast<unsigned>(tasks)), dim3(SELECT_THREADS), 0, stream,
                 *p, v);
  if (error != cudaSuccess) return error;
  return launch(write_kernel, grid, block, 0, stream, *p, static_cast<const Cut *>(v.cut),
                v.chunks);
}
