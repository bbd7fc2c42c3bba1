// 解码的工作划分。工作的单位是（span，一组查询，一块键）；全部单位排成一列，平分给固定个数的 CTA，
// 所以各行长短不一也是均衡的，而且不必在主机上知道长度（spans 在设备上，可以放进 CUDA graph）。
//
// CTA 分成几路（tracks，2 的幂），一路一列单位：span i 的第 g 组查询归第 (g + i) % tracks 路。各路看的键大致相同，
// 相邻的 CTA 在不同的路上、同时读同一段键，于是几组查询只从显存读一遍。
//
// 一个 CTA 分到连续的一段：其中完整的（span，组）直接写出结果；只占一部分的写部分结果，由合并核收尾。
// 一段至多有两个不完整：开头的用部分结果槽 2c，结尾的用 2c + 1。划分只取决于形状与 CTA 数，结果逐位确定。
// 各 span 的长度一个 CTA 只扫两遍（求总数、找起点），之后逐个往后走。各 span 一样长时，一段尽量与一组查询的边界对齐。
#pragma once

#include "config.cuh"
#include "mla_common.cuh"

namespace dso {

struct Schedule {
  int rows, keys;           // 一组查询、一块键的大小
  int ctas, minimum_units;  // CTA 数（tracks 的倍数）、每个 CTA 至少几个单位
  int tracks;               // CTA c 在第 c % tracks 路上，是其中的第 c / tracks 个
};

struct Load {  // 一个 span 在一路上的工作量：从第 first 组起，每隔 tracks 组
  int first, groups, blocks;
  __device__ int64_t units() const { return static_cast<int64_t>(groups) * blocks; }
};

__device__ inline Load load_of(const dso_mla_inputs &in, const Schedule &s, int track,
                               int64_t index) {
  dso_span span = in.spans[index];
  int rows = static_cast<int>((span.q_end - span.q_begin) * in.heads);
  int keys = static_cast<int>(span.kv_end - span.kv_begin), groups = (rows + s.rows - 1) / s.rows;
  int first = (track + s.tracks - static_cast<int>(index % s.tracks)) % s.tracks;
  return {first, (groups - first + s.tracks - 1) / s.tracks, (keys + s.keys - 1) / s.keys};
}

// 一个 CTA 走到哪里：还没有做的单位 [begin, end)，begin 在第 index 个 span 里或之后，它之前有 before 个单位。
struct Walk {
  int64_t begin, end, before;
  int index, each;  // each：这一路上每个 CTA 的单位数
};

// 各 span 都是 blocks 块时，一组查询的边界每 blocks 个单位一个：每个 CTA 多做得不多（config.cuh）就能与边界对齐（整数组，
// 或一组正好分成几段）的，给那么多，否则还是 each。
__device__ inline int aligned_share(int each, int blocks) {
  int share = each;
  if (each > blocks) {
    share = (each + blocks - 1) / blocks * blocks;
  } else {
    int pieces = blocks / each, piece = (blocks + pieces - 1) / pieces;
    if (blocks % piece == 0) share = piece;
  }
  int extra = share - each;
  return extra <= each / DECODE_ALIGN_SHARE && extra <= DECODE_ALIGN_UNITS ? share : each;
}

// 整个 warp 一起调用。
__device__ inline Walk start_walk(const dso_mla_inputs &in, const Schedule &s, int cta) {
  int track = cta % s.tracks, ctas = s.ctas / s.tracks;
  int64_t total = 0;
  int blocks = 0;  // 有单位的 span 的块数；mixed：不都一样
  bool mixed = false;
#pragma unroll 2
  for (int64_t i = threadIdx.x % WARP; i < in.n_spans; i += WARP) {
    Load load = load_of(in, s, track, i);
    if (load.units() == 0) continue;
    total += load.units();
    mixed |= blocks != 0 && blocks != load.blocks;
    blocks = load.blocks;
  }
#pragma unroll
  for (int step = WARP / 2; step > 0; step /= 2) total += __shfl_xor_sync(ALL_LANES, total, step);
  int each = static_cast<int>((total + ctas - 1) / ctas);
  if (each < s.minimum_units) each = s.minimum_units;
  unsigned busy = __ballot_sync(ALL_LANES, blocks != 0);
  int common = __shfl_sync(ALL_LANES, blocks, busy ? __ffs(static_cast<int>(busy)) - 1 : 0);
  mixed |= blocks != 0 && blocks != common;
  if (!__any_sync(ALL_LANES, mixed) && busy) each = aligned_share(each, common);
  int64_t begin = static_cast<int64_t>(cta / s.tracks) * each;
  int64_t end = begin + each < total ? begin + each : total;
  Walk walk{begin, end, total, static_cast<int>(in.n_spans), each};
  if (begin >= end) return walk;
  Found found = find_span_by(
      in, [&](int64_t i) { return load_of(in, s, track, i).units(); },
      [&](int64_t, int64_t before, int64_t own) { return begin < before + own; });
  walk.index = static_cast<int>(found.index), walk.before = found.before;
  return walk;
}

// 一个 CTA 连续处理的一段：一组查询看 [key_begin, key_end)（span 内）。
struct Piece {
  Place at;
  int group, key_begin, key_end;
  int units;
  bool whole;  // 这组查询的全部键：直接写结果
  int slot;    // 部分结果槽
  int last;    // 这组查询的最后一段在哪个 CTA
};

// 下一段；没有了返回假。
__device__ inline bool next_piece(const dso_mla_inputs &in, const Schedule &s, int cta, Walk *walk,
                                  Piece *piece) {
  if (walk->begin >= walk->end) return false;
  int track = cta % s.tracks;
  Load load = load_of(in, s, track, walk->index);
  while (walk->begin >= walk->before + load.units()) {
    walk->before += load.units();
    load = load_of(in, s, track, ++walk->index);
  }
  int64_t inside = walk->begin - walk->before, room = walk->end - walk->begin;
  int nth = static_cast<int>(inside / load.blocks), block = static_cast<int>(inside % load.blocks);
  int last = load.blocks - block < room ? load.blocks : block + static_cast<int>(room);
  piece->at = locate(in, walk->index);
  piece->group = load.first + s.tracks * nth;
  piece->key_begin = block * s.keys;
  piece->key_end = last == load.blocks ? piece->at.kv_len : last * s.keys;
  piece->units = last - block;
  piece->whole = block == 0 && last == load.blocks;
  piece->slot = 2 * cta + (block == 0 ? 1 : 0);  // 从中间接着的是开头的一段
  int64_t final_unit = walk->begin - block + load.blocks - 1;
  piece->last = static_cast<int>(final_unit / walk->each) * s.tracks + track;
  walk->begin += piece->units;
  return true;
}

}  // namespace dso
