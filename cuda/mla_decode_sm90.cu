// mla_decode 的 Hopper 路径：核与选形状；做法见 mla_decode_sm90.cuh。
#include "mla_decode_few_sm90.cuh"
#include "mla_decode_many_sm90.cuh"

namespace {

using namespace dso;
using namespace dso::decode;

template <class S>
__device__ void produce(const DecodeArgs &args, int cta, const CUtensorMap *queries,
                        const CUtensorMap *latent, const CUtensorMap *rope) {
  int part = __shfl_sync(ALL_LANES, (static_cast<int>(threadIdx.x) - S::CONSUMERS) / WARP, 0);
  if (part == PARTS) {
    bool writer = threadIdx.x % WARP == 0 && (S::CTAS == 1 || cluster_rank() == 0);
    Scheduler<S>{args, args.in, queries, {}, {}, {}}.run(cta, writer);
    return;
  }
  Producer<S> producer(args, latent, rope, part);
  Piece piece;
  for (Pieces<S> pieces; pieces.next(&piece);) producer.run(piece);
  grid_wait();
}

template <class Consumer>
__device__ void consume(const DecodeArgs &args) {
  Consumer consumer(args);
  Piece piece;
  for (typename Consumer::Pieces pieces; pieces.next(&piece);) consumer.run(piece);
}

// 全部线程都到了才继续：别的 CTA 要写的共享内存、要到达的 mbarrier 都还在。
template <class S>
__device__ void sync_ctas() {
  if constexpr (S::CTAS == 1) {
    __syncthreads();
  } else {
    cluster_arrive();
    cluster_wait();
  }
}

// 划分先要读 spans：请 L2 先取前面的一些。
__device__ void prefetch_spans(const dso_mla_inputs &in) {
  constexpr int64_t MOST = 1024;
  if (reinterpret_cast<uintptr_t>(in.spans) % 16 != 0) return;
  const int64_t count = in.n_spans < MOST ? in.n_spans : MOST;
  prefetch_l2(in.spans, static_cast<uint32_t>(count * static_cast<int64_t>(sizeof(dso_span))));
}

template <class E, int RANK, int ROWS, int CTAS>
__global__ __launch_bounds__(Shape<RANK, ROWS, CTAS>::THREADS, 1) void mla_decode_sm90_kernel(
    DecodeArgs args, const __grid_constant__ CUtensorMap queries,
    const __grid_constant__ CUtensorMap latent, const __grid_constant__ CUtensorMap rope) {
  using S = Shape<RANK, ROWS, CTAS>;
  int thread = static_cast<int>(threadIdx.x), cta = static_cast<int>(blockIdx.x) / CTAS;
  if (thread == 0) Shared<S>().start();
  if (thread == S::CONSUMERS) prefetch_spans(args.in);
  sync_ctas<S>();
  // settled：划分与读键的不等前一个核（吸收），各自到要用它的结果、要写的时候再等；消费者要用。
  if (args.settled && thread >= S::CONSUMERS)
    read_early();
  else
    grid_wait();
  if (thread >= S::CONSUMERS) {
    if constexpr (!S::FEW) registers_decrease<DECODE_PRODUCER_REGISTERS>();
    produce<S>(args, cta, &queries, &latent, &rope);
  } else if constexpr (S::FEW) {
    consume<Few<E, S>>(args);
  } else {
    registers_increase<DECODE_CONSUMER_REGISTERS>();
    consume<Many<E, S>>(args);
  }
  if constexpr (CTAS > 1) sync_ctas<S>();
}

// ---- 主机侧 ----

// 吸收后的查询 [B*T*H, r / 64, 64]，一次 rows 行、boxes 个 64 列：写成 boxes 个块；界外填 0。
cudaError_t query_map(CUtensorMap *map, const DecodeArgs &args, int rows, int boxes) {
  const dso_mla_inputs &in = args.in;
  return make_tensor_map(map, {args.q_abs,
                               args.dtype,
                               3,
                               {BOX_COLUMNS, in.b * in.t * in.heads, in.rank / BOX_COLUMNS},
                               {1, in.rank, BOX_COLUMNS},
                               {BOX_COLUMNS, rows, boxes}});
}

// 缓存的各行（分页时是各页）：几行、一行几个槽位、一次 TMA 几个槽位。
struct CacheRows {
  int64_t rows, slots;
  int box;
};

CacheRows rows_of(const DecodeArgs &args) {
  const dso_mla_inputs &in = args.in;
  if (!in.pages) return {in.b, in.s, DECODE_KEYS_SM90};
  return {in.page_count, in.page_size, 1 << args.schedule.log_box};
}

// 潜变量 [行, 槽位, r / 64, 64]，一次 chunk 个 64 列：写成 chunk 个块；界外填 0。框不满一块的高时一次 64 列。
cudaError_t latent_map(CUtensorMap *map, const DecodeArgs &args, int chunk) {
  const dso_mla_inputs &in = args.in;
  const CacheRows cache = rows_of(args);
  return make_tensor_map(map,
                         {in.latent,
                          args.dtype,
                          4,
                          {BOX_COLUMNS, cache.slots, in.rank / BOX_COLUMNS, cache.rows},
                          {1, in.latent_ts, BOX_COLUMNS, in.latent_bs},
                          {BOX_COLUMNS, cache.box, cache.box == DECODE_KEYS_SM90 ? chunk : 1, 1}});
}

// 旋转的键 [行, 槽位, width]，一次 64 列；界外（含不足 64 的列）填 0。
cudaError_t rope_map(CUtensorMap *map, const DecodeArgs &args, const void *data, int64_t width,
                     int64_t bs, int64_t ts) {
  const CacheRows cache = rows_of(args);
  return make_tensor_map(map, {data,
                               args.dtype,
                               3,
                               {width, cache.slots, cache.rows},
                               {1, ts, bs},
                               {BOX_COLUMNS, cache.box, 1}});
}

template <class E, int RANK, int ROWS, int CTAS = 1>
cudaError_t run(const DecodeArgs &args, int *bytes, cudaStream_t stream) {
  using S = Shape<RANK, ROWS, CTAS>;
  if (bytes) {
    *bytes = S::BYTES;
    return cudaSuccess;
  }
  const dso_mla_inputs &in = args.in;
  CUtensorMap queries, latent, rope;
  cudaError_t error = query_map(&queries, args, ROWS, S::BOXES);
  if (error == cudaSuccess) error = latent_map(&latent, args, S::CHUNK);
  if (error == cudaSuccess)  // 没有旋转部分时只从界外读
    error = in.rope_dim > 0 ? rope_map(&rope, args, in.rope, in.rope_dim, in.rope_bs, in.rope_ts)
                            : rope_map(&rope, args, in.latent, in.rank, in.latent_bs, in.latent_ts);
  if (error != cudaSuccess) return error;
  return launch_cluster(mla_decode_sm90_kernel<E, RANK, ROWS, CTAS>, CTAS,
                        dim3(static_cast<unsigned>(args.schedule.ctas * CTAS)), dim3(S::THREADS),
                        static_cast<size_t>(S::BYTES), stream, args, queries, latent, rope);
}

template <class E, int RANK>
cudaError_t pick_rows(const DecodeArgs &args, int *bytes, cudaStream_t stream) {
  switch (args.schedule.rows()) {
    case 8:
      return run<E, RANK, 8>(args, bytes, stream);
    case 16:
      return run<E, RANK, 16>(args, bytes, stream);
    case 32:
      return run<E, RANK, 32>(args, bytes, stream);
    case 64:
      return run<E, RANK, 64>(args, bytes, stream);
    default:  // 一个 cluster 的：只有最大的一档 r（cluster_ok）
      return run<E, 512, 64, DECODE_CLUSTER_SM90>(args, bytes, stream);
  }
}

template <class E>
cudaError_t pick_rank(const DecodeArgs &args, int *bytes, cudaStream_t stream) {
  if (args.in.rank <= 128) return pick_rows<E, 128>(args, bytes, stream);
  if (args.in.rank <= 256) return pick_rows<E, 256>(args, bytes, stream);
  return pick_rows<E, 512>(args, bytes, stream);
}

}  // namespace

cudaError_t dso::run_decode_sm90(const DecodeArgs &args, int *bytes, cudaStream_t stream) {
  return args.dtype == DSO_BF16 ? pick_rank<Bf16>(args, bytes, stream)
                                : pick_rank<F16>(args, bytes, stream);
}
