// mla_decode 的合并。前 blocks 块做登记表（splits）里分开算的各组查询：先从表里挑出真有的，一个任务是一组里的一行、一段
// 列，归 parts 组线程（各 COMBINE_LANES 个），第 p 组加第 p、p + parts……段，最后依次合起来；块不够时轮着做。
// 其余的块（blockIdx.y 为 0 的）一个 warp 一个词元，没有键可看的写 0。
#include "config.cuh"
#include "mla_decode.cuh"
#include "mma.cuh"

namespace {

using namespace dso;

constexpr int WARPS = COMBINE_THREADS / WARP, LANES = COMBINE_LANES;
constexpr int GROUPS = COMBINE_THREADS / LANES;

struct Entry {
  Split split;
  int cta;
};

// 这一块看的各项里有 rows 的，按 CTA 的次序放进 list；返回个数。
__device__ int list_splits(const DecodeArgs &args, Entry *list) {
  __shared__ int counts[WARPS];
  int thread = static_cast<int>(threadIdx.x), lane = thread % WARP, warp = thread / WARP;
  int cta = static_cast<int>(blockIdx.y) * COMBINE_THREADS + thread;
  Split split{0, 0, 0};
  if (cta < args.schedule.ctas) split = args.splits[cta];
  unsigned hits = __ballot_sync(ALL_LANES, split.rows > 0);
  if (lane == 0) counts[warp] = __popc(hits);
  __syncthreads();
  int before = 0, total = 0;
#pragma unroll
  for (int w = 0; w < WARPS; w++) {
    if (w == warp) before = total;
    total += counts[w];
  }
  if (split.rows > 0) list[before + __popc(hits & ((1u << lane) - 1))] = {split, cta};
  __syncthreads();
  return total;
}

// 几段合起来：最大值、指数之和、没有归一化的 CHUNKS 段列（各 V 个）。
template <int V, int CHUNKS>
struct Merged {
  float top = -INFINITY, sum = 0.0f;
  float x[CHUNKS][V] = {};
};

// 一个任务：第 entry 组的第 row 行，从 column 列起。
struct Task {
  int entry, row, column;
};

__device__ Task task_at(int index, int rows, int across, int columns) {
  int at = index / across, entry = at / rows;
  return {entry, at - entry * rows, (index - at * across) * columns};
}

// 一行里从 column 起的 CHUNKS 段列（相隔 LANES * V），加第 part、part + parts……段。一批的读都先发出去，不等最大值。
template <int V, int CHUNKS>
__device__ Merged<V, CHUNKS> merge(const DecodeArgs &args, const Entry &entry, int row, int column,
                                   int part, int parts) {
  constexpr int BATCH = COMBINE_BATCH / CHUNKS;
  const int rank = static_cast<int>(args.in.rank), rows = args.schedule.rows();
  const int tracks = args.schedule.tracks(), last = row < entry.split.rows ? entry.split.last : -1;
  const float *columns = args.part + column;
  Merged<V, CHUNKS> to;
  for (int cta = entry.cta + part * tracks; cta <= last; cta += parts * BATCH * tracks) {
    float m[BATCH], l[BATCH];
    Words<V> y[BATCH][CHUNKS];
#pragma unroll
    for (int j = 0; j < BATCH; j++) {
      int owner = cta + j * parts * tracks;
      bool ok = owner <= last;
      int at = (2 * owner + (owner == entry.cta ? 1 : 0)) * rows + row;
      m[j] = -INFINITY, l[j] = 0.0f;
      load_if(m[j], args.part_m + at, ok);
      load_if(l[j], args.part_l + at, ok);
      const float *from = columns + static_cast<int64_t>(at) * rank;
#pragma unroll
      for (int c = 0; c < CHUNKS; c++) {
        y[j][c] = {};
        load_once(y[j][c], from + c * LANES * V, ok && column + c * LANES * V < rank);
      }
    }
    float old = to.top;
#pragma unroll
    for (int j = 0; j < BATCH; j++) to.top = fmaxf(to.top, m[j]);
    float base = finite_max(to.top), keep = fast_exp2(old - base);
    to.sum *= keep;
#pragma unroll
    for (int e = 0; e < CHUNKS * V; e++) to.x[e / V][e % V] *= keep;
#pragma unroll
    for (int j = 0; j < BATCH; j++) {
      float weight = fast_exp2(m[j] - base);
      to.sum += weight * l[j];
#pragma unroll
      for (int e = 0; e < CHUNKS * V; e++)
        to.x[e / V][e % V] += weight * __uint_as_float(y[j][e / V].v[e % V]);
    }
  }
  return to;
}

// 几组线程各加了几段：依次合起来。一个线程一次一列。
template <int V>
struct Gathered {
  static constexpr int COLUMNS = LANES * V;
  float x[GROUPS][COLUMNS], top[GROUPS], sum[GROUPS];
  int64_t to[GROUPS];  // 结果从哪里写起；没有为 -1
  int room[GROUPS];    // 还有几列

  __device__ void put(const Merged<V, 1> &from, int group, int lane, int64_t at, int left) {
#pragma unroll
    for (int e = 0; e < V; e++) x[group][lane * V + e] = from.x[0][e];
    if (lane == 0) top[group] = from.top, sum[group] = from.sum, to[group] = at, room[group] = left;
  }

  // 从第 first 组起的 parts 组里的第 column 列。
  __device__ float get(int first, int parts, int column) const {
    float most = -INFINITY;
#pragma unroll 4
    for (int g = first; g < first + parts; g++) most = fmaxf(most, top[g]);
    float base = finite_max(most), total = 0.0f, value = 0.0f;
#pragma unroll 4
    for (int g = first; g < first + parts; g++) {
      float weight = fast_exp2(top[g] - base);
      total += weight * sum[g], value += weight * x[g][column];
    }
    return value * inverse_of(total);
  }
};

// parts 是 2 的 log_parts 次方。
template <int V, int CHUNKS>
__global__ __launch_bounds__(COMBINE_THREADS,
                             CHUNKS == 1 ? 2 : 3) void mla_decode_combine(DecodeArgs args,
                                                                          int blocks,
                                                                          int log_parts) {
  constexpr int COLUMNS = LANES * V * CHUNKS;
  __shared__ Entry list[COMBINE_THREADS];
  grid_release();
  const int block = static_cast<int>(blockIdx.x), thread = static_cast<int>(threadIdx.x);
  const int group = thread / LANES, lane = thread % LANES, parts = 1 << log_parts;
  const int rank = static_cast<int>(args.in.rank), rows = args.schedule.rows();
  const int across = (rank + COLUMNS - 1) / COLUMNS, each = GROUPS >> log_parts;
  int index = block * each + (group >> log_parts);
  Task task = task_at(index, rows, across, COLUMNS);                   // 除法多：在等的时候做
  task = {afresh(task.entry), afresh(task.row), afresh(task.column)};  // 不移到 grid_wait 之后
  grid_wait();
  if (block >= blocks) {
    if (blockIdx.y == 0)
      clear_unseen(args.in, static_cast<int64_t>(block - blocks) * WARPS + thread / WARP, args.o,
                   args.dtype, args.in.heads * args.in.rank);
    return;
  }
  const int tasks = list_splits(args, list) * rows * across;
  for (int first = block * each; first < tasks; first += blocks * each) {
    const int column = task.column + lane * V;
    Merged<V, CHUNKS> merged;
    int64_t to = -1;  // 这一行的起点
    if (index < tasks) {
      const Entry &entry = list[task.entry];
      if (task.row < entry.split.rows)
        to = static_cast<int64_t>(entry.split.first + task.row) * rank;
      merged = merge<V, CHUNKS>(args, entry, task.row, column, group & (parts - 1), parts);
    }
    if (log_parts == 0) {
      float inverse = inverse_of(merged.sum);
#pragma unroll
      for (int c = 0; c < CHUNKS; c++) {
        Vec<V> x;
#pragma unroll
        for (int e = 0; e < V; e++) x.v[e] = merged.x[c][e] * inverse;
        int at = column + c * LANES * V;
        if (to >= 0 && at < rank) store<V>(args.o, args.dtype, to + at, x);
      }
    } else if constexpr (CHUNKS == 1) {
      __shared__ Gathered<V> gathered;
      gathered.put(merged, group, lane, to < 0 ? -1 : to + task.column, rank - task.column);
      __syncthreads();
      for (int i = thread; i < each * COLUMNS; i += COMBINE_THREADS) {
        int g = i / COLUMNS << log_parts, at = i % COLUMNS;
        if (gathered.to[g] >= 0 && at < gathered.room[g])
          store_one(args.o, args.dtype, gathered.to[g] + at, gathered.get(g, parts, at));
      }
      __syncthreads();  // 都读过了才放下一轮的
    }
    index += blocks * each;
    task = task_at(index, rows, across, COLUMNS);
  }
}

}  // namespace

cudaError_t dso::run_decode_combine(const DecodeArgs &args, const dso_cuda_mla_decode_params &p,
                                    cudaStream_t stream) {
  const Schedule &s = args.schedule;
  const int64_t rank = args.in.rank, ctas = args.in.n_spans > 0 ? s.ctas : 0;
  bool wide =
      reinterpret_cast<uintptr_t>(args.part) % 16 == 0 && wide_ok(args.o, args.dtype, rank, 4);
  int columns = LANES * (wide ? 4 : 1), log_parts = 0;
  // 至多几组分开算、平均一组分成几段：估得不准只影响快慢与相加的次序。
  int64_t groups = ceil_div(p.most_rows < 1 ? 1 : p.most_rows, s.rows()) * args.in.n_spans;
  if (groups > ctas) groups = ctas;
  int64_t tables = ctas ? ceil_div(ctas, COMBINE_THREADS) : 1,
          most = ceil_div(COMBINE_CTAS, tables);
  int64_t tasks = groups * s.rows() * ceil_div(rank, columns);
  bool many = wide && tasks > most * GROUPS;
  if (many) tasks = groups * s.rows() * ceil_div(rank, columns * COMBINE_WIDE);
  while (!many && 1 << log_parts < GROUPS && (groups * COMBINE_BATCH << log_parts) < ctas)
    log_parts++;
  int64_t blocks = ceil_div(tasks << log_parts, GROUPS);
  if (blocks > most) blocks = most;
  int64_t tokens = p.covered ? 0 : ceil_div(args.in.b * args.in.t, WARPS);
  if (blocks + tokens == 0) return cudaSuccess;
  auto kernel = many   ? mla_decode_combine<4, COMBINE_WIDE>
                : wide ? mla_decode_combine<4, 1>
                       : mla_decode_combine<1, 1>;
  dim3 grid(static_cast<unsigned>(blocks + tokens), static_cast<unsigned>(tables));
  return launch(kernel, grid, dim3(COMBINE_THREADS), 0, stream, args, static_cast<int>(blocks),
                log_parts);
}
