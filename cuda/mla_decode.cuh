// mla_decode 的各条路径（sm_80 的 mma、sm_90a 的 wgmma、通用的 fp32）共用的参数。
#pragma once

#include "dso_cuda.h"
#include "mla_schedule.cuh"

namespace dso {

// 分给几个 CTA 的一组查询，记在它的第一段所在的 CTA 名下：o 里的 [first, first + rows) 行，最后一段在 CTA last。
struct Split {
  int first, rows, last;  // 没有时 rows 是 0
};

struct DecodeArgs {
  dso_mla_inputs in;
  const void *q_abs;       // [B*T, H, r]：查询的非旋转部分已吸收 W_UK
  void *o;                 // [B*T, H, r]：还没有乘 W_UV
  dso_dtype dtype;         // q_abs 与 o 的类型
  float *part;             // [2 * CTA 数, rows, r]：没有归一化的部分结果
  float *part_m, *part_l;  // [2 * CTA 数, rows]：最大值（以 2 为底的得分）、指数之和
  Split *splits;           // [CTA 数]
  Schedule schedule;
  bool settled;  // 缓存与 spans 可以在 grid_wait 之前读（dso_cuda.h）
};

// 组内第 row 行可见的键的末尾（span 内），不超过 key_end；超出这组的行什么都看不见。
__device__ inline int row_limit(const DecodeArgs &args, const Piece &piece, int row) {
  int heads = static_cast<int>(args.in.heads), flat = piece.group * args.schedule.rows() + row;
  if (flat >= piece.at.q_len * heads) return 0;
  int limit = visible_keys(args.in, piece.at, flat / heads);
  return limit < piece.key_end ? limit : piece.key_end;
}

// 组内第 row 行在 [B*T, H] 里的展平下标；超出这组的为 -1。
__device__ inline int64_t row_at(const DecodeArgs &args, const Piece &piece, int row) {
  int64_t flat = piece.group * args.schedule.rows() + row;
  if (flat >= piece.at.q_len * args.in.heads) return -1;
  return piece.at.q_begin * args.in.heads + flat;
}

// 一组查询里从第 skip 行起的各行。
struct Lines {
  int inside;     // 第一行在 span 里的下标
  int64_t first;  // 在 [B*T, H] 里的下标
  int count;      // 这个 span 里还有几行：可能不是正数，也可能多于一组
};

__device__ inline Lines lines_of(const DecodeArgs &args, const Piece &piece, int skip) {
  const int heads = static_cast<int>(args.in.heads);
  const int inside = (piece.group << args.schedule.log_rows) + skip;
  return {inside, static_cast<int64_t>(piece.at.q_begin) * heads + inside,
          piece.at.q_len * heads - inside};
}

// 一组查询的第一段：记下要合并的。恰好一个线程。
__device__ inline void record_split(const DecodeArgs &args, int cta, const Piece &piece) {
  if (piece.key_begin > 0 || piece.whole) return;
  const Lines lines = lines_of(args, piece, 0);
  args.splits[cta] = {static_cast<int>(lines.first), min_of(lines.count, args.schedule.rows()),
                      piece.last};
}

// 依次 run(一段)，整个 warp 一起；writer 是恰好一个线程，由它记下要合并的。一个 cluster 的几块合起来算一个 CTA。
template <class Run>
__device__ void each_piece(const DecodeArgs &args, int cta, bool writer, Run run) {
  Walk walk = start_walk(args.in, args.schedule, cta);
  if (writer) args.splits[cta].rows = 0;
  Piece piece;
  while (next_piece(args.in, args.schedule, cta, &walk, &piece)) {
    if (writer) record_split(args, cta, piece);
    run(piece);
  }
}

// 写一行的两个相邻元素：完整的一段除以 l 后写结果，否则写部分结果。
__device__ inline void write_pair(const DecodeArgs &args, const Piece &piece, int row, int column,
                                  float a, float b, float l) {
  int64_t at = row_at(args, piece, row);
  if (at < 0 || column >= args.in.rank) return;
  bool second = column + 1 < args.in.rank;
  if (!piece.whole) {
    float *to = args.part +
                static_cast<int64_t>(piece.slot * args.schedule.rows() + row) * args.in.rank +
                column;
    to[0] = a;
    if (second) to[1] = b;
    return;
  }
  float inverse = inverse_of(l);
  store_one(args.o, args.dtype, at * args.in.rank + column, a * inverse);
  if (second) store_one(args.o, args.dtype, at * args.in.rank + column + 1, b * inverse);
}

// 各条路径（mla_decode_{mma,sm90,general}.cu）：bytes 不为空时只算共享内存的大小，不启动。
cudaError_t run_decode_mma(const DecodeArgs &args, int *bytes, cudaStream_t stream);
cudaError_t run_decode_sm90(const DecodeArgs &args, int *bytes, cudaStream_t stream);
cudaError_t run_decode_general(const DecodeArgs &args, int *bytes, cudaStream_t stream);

// 部分结果的合并；不在任何 span 里的词元写 0。
cudaError_t run_decode_combine(const DecodeArgs &args, const dso_cuda_mla_decode_params &p,
                               cudaStream_t stream);

}  // namespace dso
