// Hopper 的解码读分页的缓存：一块键由几个框拼成，一个框是同一页里相邻的 2^log_box 个槽位（页的大小除得尽，块从它的倍数起）。
#pragma once

#include "mla_decode.cuh"

namespace dso::decode {

// 一段里各框在哪一页；整个 warp 一起，一个线程查一个框，提前一轮查。
struct PageList {
  const dso_mla_inputs &in;
  int log_box;
  int row = 0, first = 0, count = 0;  // 这一段的第一个槽位、框数
  int base = 0, page = 0, offset = 0, next_page = 0, next_offset = 0;

  __device__ PageList(const dso_mla_inputs &in, int log_box) : in(in), log_box(log_box) {}

  __device__ void start(const Piece &piece) {
    row = piece.at.row, first = piece.at.slot + piece.key_begin, base = 0;
    count = (piece.key_end - piece.key_begin + (1 << log_box) - 1) >> log_box;
    find(0, page, offset), find(WARP, next_page, next_offset);
  }

  // 第 index 个框的页、页内的槽位；index 只增不减，一次至多多走 WARP 个。
  __device__ void at(int index, int *in_page, int *in_slot) {
    if (index - base >= WARP) {
      base += WARP, page = next_page, offset = next_offset;
      find(base + WARP, next_page, next_offset);
    }
    *in_page = __shfl_sync(ALL_LANES, page, index - base);
    *in_slot = __shfl_sync(ALL_LANES, offset, index - base);
  }

 private:
  __device__ void find(int from, int &to, int &inside) const {
    const int index = from + static_cast<int>(threadIdx.x) % WARP;
    if (index >= count) return;
    const int size = static_cast<int>(in.page_size), slot = first + (index << log_box);
    const int nth = slot / size;
    inside = slot - nth * size;
    to = load_l2(in.pages + row * in.pages_bs + nth);
  }
};

}  // namespace dso::decode
