// moe_experts：选路径；各词元的加权和；专家表。
//
// 三步：h（收集在读入时，gate、up 一次算完，激活在写出时）、o、按词元求和。没有原子操作：一个词元的
// 各个 o 由一个线程按 j 的次序相加。
#include <type_traits>

#include "config.cuh"
#include "moe_experts.cuh"

namespace {

using namespace dso;

constexpr int THREADS = 128;

// y[t] 的 V 列：Σ_j weights[t, j] o[行]，再加共享专家的。依赖的读只有两次：先是 BATCH 个行号与权重，再是这些行。
// 启动时排序已经结束：前一个核（算 o 的）的各块都已启动或退出，而它们启动时，更早的核都已过了各自的 grid_wait；所以行号、权重
// 在 grid_wait 之前读。HALF：o 是 16 位的，按字读来再换成 fp32，读才能一起发出。blockIdx.y 是词元。
template <int V, bool HALF>
__global__ __launch_bounds__(THREADS) void moe_combine_kernel(dso_cuda_moe_experts_params p) {
  constexpr int BATCH = 8;
  using Piece = std::conditional_t<HALF, Half16<V>, Vec<V>>;
  grid_release();
  const dso_cuda_moe_routing &r = p.routing;
  int top_k = static_cast<int>(r.top_k);
  int row[BATCH];
  float weight[BATCH];
  auto fetch = [&](int64_t token, int first) {
    const int32_t *rows = r.row + token * top_k + first;
    const float *weights = p.weights ? p.weights + token * top_k + first : nullptr;
#pragma unroll
    for (int i = 0; i < BATCH; i++) {
      bool real = first + i < top_k;
      row[i] = real ? rows[i] : -1;
      weight[i] = real && weights ? weights[i] : 1.0f;
    }
  };
  auto read = [&](int64_t at) {
    if constexpr (HALF)
      return *reinterpret_cast<const Half16<V> *>(static_cast<const uint16_t *>(p.o) + at);
    else
      return load<V>(p.o, p.dtype, at);
  };
  int64_t column = (static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x) * V;
  if (column < p.n) fetch(blockIdx.y, 0);
  grid_wait();
  if (column >= p.n) return;
  bool bf16 = p.dtype == DSO_BF16;
  for (int64_t token = blockIdx.y; token < r.tokens; token += gridDim.y) {
    Vec<V> sum = {};
    auto add = [&](const Piece &o, float scale) {
#pragma unroll
      for (int i = 0; i < V; i++) {
        if constexpr (HALF)
          sum.v[i] += scale * (bf16 ? bf16_bits(o.v[i]) : half_bits(o.v[i]));
        else
          sum.v[i] += scale * o.v[i];
      }
    };
    if (token > blockIdx.y) fetch(token, 0);
    Piece shared = {};
    float shared_scale = 1.0f;
    if (r.shared) {
      shared = read((r.tokens * top_k + token) * p.n + column);
      if (p.w.shared_scale) shared_scale = p.w.shared_scale[token];
    }
    for (int first = 0; first < top_k; first += BATCH) {
      if (first > 0) fetch(token, first);
      Piece o[BATCH];
#pragma unroll
      for (int i = 0; i < BATCH; i++) o[i] = row[i] >= 0 ? read(row[i] * p.n + column) : Piece{};
#pragma unroll
      for (int i = 0; i < BATCH; i++)
        if (row[i] >= 0) add(o[i], weight[i]);
    }
    if (r.shared) add(shared, shared_scale);
    store<V>(p.y, p.x.dtype, token * p.n + column, sum);
  }
}

// 一行 k 个权重（或转置的）能按 16 字节读。量化的行不转置：int8、fp8 一行 k 字节，int4 一行是 16 的倍数。
bool rows_fit(const dso_mat &w, dso_dtype dtype, int64_t k) {
  if (reinterpret_cast<uintptr_t>(w.data) % 16 != 0) return false;
  if (w.dtype == DSO_I8 || w.dtype == DSO_F8) return w.rs % 16 == 0 && k % 16 == 0;
  if (w.dtype == DSO_I4) return w.rs % 16 == 0;
  return w.dtype == dtype && w.rs % 8 == 0;
}

// 一次带过去的专家数：核的参数 CUDA 12.1 起至多 32764 字节（torch 2.10 要的更新）。
constexpr int TABLE = 96;

struct Table {
  dso_expert expert[TABLE];
};

__global__ void moe_table_kernel(Table table, int count, dso_expert *to) {
  grid_release();
  grid_wait();
  int i = static_cast<int>(threadIdx.x);
  if (i < count) to[i] = table.expert[i];
}

}  // namespace

cudaError_t dso::moe_combine(const dso_cuda_moe_experts_params &p, cudaStream_t stream) {
  constexpr int64_t MOST = 65535;  // grid.y 的上限：更多的词元轮着做
  bool wide = wide_ok(p.o, p.dtype, p.n) && wide_ok(p.y, p.x.dtype, p.n);
  int64_t tokens = p.routing.tokens < MOST ? p.routing.tokens : MOST;
  dim3 grid(static_cast<unsigned>(ceil_div(p.n, THREADS * (wide ? 8 : 1))),
            static_cast<unsigned>(tokens));
  if (grid.x == 0 || grid.y == 0) return cudaSuccess;
  auto kernel = !wide                ? moe_combine_kernel<1, false>
                : p.dtype == DSO_F32 ? moe_combine_kernel<8, false>
                                     : moe_combine_kernel<8, true>;
  return launch(kernel, grid, dim3(THREADS), 0, stream, p);
}

int dso_cuda_moe_fits(const dso_cuda_moe_experts_params *p, const dso_expert *expert, int64_t count,
                      dso_dtype dtype) {
  if (dtype == DSO_F32 || p->x.dtype != dtype || p->k % 8 != 0 || p->n % 8 != 0) return 0;
  if (!wide_ok(p->x.data, dtype, p->x.rs)) return 0;
  for (int64_t i = 0; i < count; i++) {
    const dso_expert &e = expert[i];
    bool up_apart = p->w.gated && !p->w.paired;
    if (e.inner % 8 != 0 || !rows_fit(e.gate, dtype, p->k) || !rows_fit(e.down, dtype, e.inner) ||
        (up_apart && !rows_fit(e.up, dtype, p->k)))
      return 0;
  }
  return 1;
}

namespace {

enum Path { GENERAL, DIRECT, SMALL, MMA, SM90 };

// 至多几个专家有词元。
int64_t used_experts(const dso_cuda_moe_routing &r) {
  int64_t slots = r.tokens * r.top_k;
  return slots < r.experts ? slots : r.experts;
}

// 多数块不满 8 行：用省寄存器的一份，在途的读更多。多于 8 行的专家分几块，后读的权重在 L2 里。
bool narrow(const dso_cuda_moe_routing &r) {
  return r.tokens <= 8 ||
         (r.tokens <= MOE_SMALL_TOKENS && r.tokens * r.top_k <= used_experts(r) * MOE_SMALL_NARROW);
}

Path path_of(const dso_cuda_moe_experts_params &p) {
  if (p.dtype == DSO_F32) return GENERAL;
  if (p.w.transposed) return MMA;
  if (hidden_columns(p) == 0) return MMA;  // 没有 h 的一步，算 o 的就不能提前读（moe_small.cu）
  int64_t slots = p.routing.tokens * p.routing.top_k, used = used_experts(p.routing);
  if (!p.saved && moe_direct_fits(p)) return DIRECT;
  bool few = p.routing.tokens <= MOE_SMALL_TOKENS ||
             (slots > 0 && slots <= used * MOE_SMALL_AVERAGE);  // 只有共享专家时看词元数
  if (few && !p.saved) return SMALL;
  // 词元少的界在 Hopper 上不变：一块不满 64 行时只有一组算，每周期要 64 字节权重，已是显存带宽的三倍，空行不花时间。
  Device device;
  bool hopper = device_of(&device) == cudaSuccess && moe_sm90_fits(p, device);
  return hopper ? SM90 : MMA;
}

}  // namespace

int64_t dso_cuda_moe_tile_rows(const dso_cuda_moe_experts_params *p) {
  switch (path_of(*p)) {
    case GENERAL:
      return MOE_GENERAL_ROWS;
    case DIRECT:
      return 0;
    case SMALL:
      return narrow(p->routing) ? 8 : MOE_SMALL_ROWS;
    default:
      return MOE_ROWS;
  }
}

cudaError_t dso_cuda_moe_experts(const dso_cuda_moe_experts_params *p, cudaStream_t stream) {
  if (p->routing.tokens == 0 || p->n == 0) return cudaSuccess;
  Path path = path_of(*p);
  decltype(&moe_mma) products[] = {moe_general, moe_small, moe_small, moe_mma, moe_sm90};
  auto product = products[path];
  cudaError_t error = product(*p, true, stream);
  if (error == cudaSuccess) error = product(*p, false, stream);
  return error == cudaSuccess && path != DIRECT ? moe_combine(*p, stream) : error;
}

cudaError_t dso_cuda_moe_table(const dso_expert *from, int64_t count, dso_expert *to,
                               cudaStream_t stream) {
  cudaError_t error = cudaSuccess;
  for (int64_t first = 0; first < count && error == cudaSuccess; first += TABLE) {
    Table table = {};
    int many = static_cast<int>(count - first < TABLE ? count - first : TABLE);
    for (int i = 0; i < many; i++) table.expert[i] = from[first + i];
    error = launch(moe_table_kernel, dim3(1), dim3(TABLE), 0, stream, table, many, to + first);
  }
  return error;
}
