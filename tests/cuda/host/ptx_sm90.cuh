// cuda/ptx_sm90.cuh 的主机替身。wgmma 的操作数按描述符的各位取，TMA 按张量描述与交错写；DSO_HOST_ASYNC=lazy 时
// wgmma 在各 warp 自己等待时才读操作数、写累加器，TMA 在所有线程都停住时才写。
// 普通的写（cp.async、stmatrix）之后漏了 fence_proxy_async，wgmma 读到时失败；普通的赋值看不见，查不出来。
#pragma once

#include <cuda.h>
#include <ptx.cuh>

#include <initializer_list>

namespace dso {

inline void mbarrier_init(uint64_t *barrier, int arrivals) {
  cuda_host::mbarrier_init(barrier, arrivals);
}
inline void mbarrier_init_fence() {}
inline void mbarrier_arrive(uint64_t *barrier) { cuda_host::mbarrier_arrive(barrier, 0); }
inline void mbarrier_expect(uint64_t *barrier, int bytes) {
  cuda_host::mbarrier_arrive(barrier, bytes);
}
inline void mbarrier_arrive_copies(uint64_t *barrier) {
  cuda_host::mbarrier_arrive_copies(barrier);
}
inline void mbarrier_wait(uint64_t *barrier, int parity) {
  cuda_host::mbarrier_wait(barrier, parity);
}
inline void mbarrier_arrive_at(uint64_t *barrier, int rank) {
  cuda_host::mbarrier_arrive_at(rank, barrier);
}

// ---- cluster ----

inline int cluster_rank() { return cuda_host::cluster_rank(); }
inline void cluster_arrive() { cuda_host::cluster_arrive(); }
inline void cluster_wait() { cuda_host::cluster_wait(); }

// ---- TMA ----

inline bool elected() { return threadIdx.x % 32 == 0; }

// 交错：地址的 [4, 4 + n) 位与 [7, 7 + n) 位异或；bytes 为 16 是不交错。
inline size_t swizzle_address(size_t address, int bytes) {
  return address ^ ((address >> 7 & static_cast<size_t>(bytes / 16 - 1)) << 4);
}

inline void copy_box(const CUtensorMap &map, size_t to, const int (&at)[4]) {
  unsigned char *shared = cuda_host::shared_memory();
  int rows = map.box[1] * map.box[2] * map.box[3];
  for (int row = 0; row < rows; row++) {
    int index[4] = {0, row % map.box[1], row / map.box[1] % map.box[2],
                    row / (map.box[1] * map.box[2])};
    const char *from = map.base;
    bool inside = true;
    for (int i = 1; i < 4; i++) {
      int64_t x = at[i] + index[i];
      inside = inside && x >= 0 && x < map.dims[i];
      from += x * map.strides[i];
    }
    for (int c = 0; c < map.box[0]; c += 8) {  // 16 字节之内不交错
      int64_t x = at[0] + c;
      size_t address = to + static_cast<size_t>((row * map.box[0] + c) * 2);
      size_t place = swizzle_address(address, map.swizzle);
      cuda_host::wrote_async(place);
      std::memset(shared + place, 0, 16);
      int64_t begin = std::max<int64_t>(-x, 0), end = std::min<int64_t>(map.dims[0] - x, 8);
      if (inside && begin < end)
        std::memcpy(shared + place + 2 * begin, from + 2 * (x + begin),
                    static_cast<size_t>(2 * (end - begin)));
    }
  }
}

// mask 是写到 cluster 的哪几个 CTA，各自先后不定；0：只写自己。
inline void tma_load_box(void *to, const CUtensorMap *map, uint64_t *barrier,
                         std::initializer_list<int> place, unsigned mask = 0) {
  using namespace cuda_host;
  touch_global();
  CUtensorMap box = *map;
  if (static_cast<int>(place.size()) != box.rank) fail("TMA 的坐标个数与张量描述的维数不同");
  int at[4] = {};
  std::copy(place.begin(), place.end(), at);
  for (int i = box.rank; i < 4; i++) box.box[i] = 1, box.dims[i] = 1, box.strides[i] = 0;
  int bytes = box.box[0] * box.box[1] * box.box[2] * box.box[3] * 2;
  size_t start = shared_offset(to);
  if (start % 128 != 0) fail("TMA 的共享内存地址没有对齐到 128 字节");
  if (start + static_cast<size_t>(bytes) > shared_size()) fail("TMA 写到了动态共享内存之外");
  size_t signal = shared_offset(barrier);
  count_box();
  auto act = [=] {
    copy_box(box, start, at);
    mbarrier_complete(shared_memory() + signal, bytes);
  };
  if (mask == 0) return defer_global(act);
  for (int rank = 0; mask >> rank != 0; rank++)
    if (mask >> rank & 1) defer_at(rank, act);
}

inline void tma_load(void *to, const CUtensorMap *map, uint64_t *barrier, int x, int y) {
  tma_load_box(to, map, barrier, {x, y});
}
inline void tma_load(void *to, const CUtensorMap *map, uint64_t *barrier, int x, int y, int z) {
  tma_load_box(to, map, barrier, {x, y, z});
}
inline void tma_load(void *to, const CUtensorMap *map, uint64_t *barrier, int x, int y, int z,
                     int w) {
  tma_load_box(to, map, barrier, {x, y, z, w});
}
inline void bulk_load(void *to, const void *from, int bytes, uint64_t *barrier) {
  using namespace cuda_host;
  touch_global();
  size_t start = shared_offset(to), size = static_cast<size_t>(bytes);
  if (start % 16 != 0 || reinterpret_cast<uintptr_t>(from) % 16 != 0 || bytes % 16 != 0)
    fail("成块的拷贝没有对齐到 16 字节");
  if (bytes <= 0 || start + size > shared_size()) fail("成块的拷贝写到了动态共享内存之外");
  size_t signal = shared_offset(barrier);
  defer_global([=] {
    for (size_t at = start; at < start + size; at += 16) wrote_async(at);
    std::memcpy(shared_memory() + start, from, size);
    mbarrier_complete(shared_memory() + signal, bytes);
  });
}
inline void tma_prefetch_box(const CUtensorMap *map, int rank) {
  if (map->rank != rank) cuda_host::fail("TMA 的坐标个数与张量描述的维数不同");
}
inline void tma_prefetch(const CUtensorMap *map, int, int, int) { tma_prefetch_box(map, 3); }
inline void tma_prefetch(const CUtensorMap *map, int, int, int, int) { tma_prefetch_box(map, 4); }
inline void tma_load_multicast(void *to, const CUtensorMap *map, uint64_t *barrier, unsigned mask,
                               int x, int y, int z) {
  tma_load_box(to, map, barrier, {x, y, z}, mask);
}
inline void tma_load_multicast(void *to, const CUtensorMap *map, uint64_t *barrier, unsigned mask,
                               int x, int y, int z, int w) {
  tma_load_box(to, map, barrier, {x, y, z, w}, mask);
}

inline void fence_proxy_async() { cuda_host::fence_proxy(); }

inline void named_barrier_sync(int id, int threads) { cuda_host::named_barrier(id, threads, true); }
inline void named_barrier_arrive(int id, int threads) {
  cuda_host::named_barrier(id, threads, false);
}

template <int COUNT>
void registers_increase() {
  cuda_host::set_registers(COUNT, true);
}
template <int COUNT>
void registers_decrease() {
  cuda_host::set_registers(COUNT, false);
}

// ---- stmatrix ----

struct MatrixStore {
  void *row;
  uint32_t value[4];
};

template <bool TRANS, int MATRICES>
void store_matrices(void **records, int) {
  for (int m = 0; m < MATRICES; m++) {
    void *rows[8];
    for (int i = 0; i < 8; i++) {
      rows[i] = static_cast<MatrixStore *>(records[m * 8 + i])->row;
      if (reinterpret_cast<uintptr_t>(rows[i]) % 16 != 0)
        cuda_host::fail("stmatrix 的行没有对齐到 16 字节");
    }
    cuda_host::count_conflicts(rows, 8);
    for (int i = 0; i < 8; i++)
      cuda_host::wrote(cuda_host::shared_offset(rows[i]),
                       cuda_host::thread_linear() / cuda_host::LANES * cuda_host::LANES + 4 * i);
    for (int lane = 0; lane < cuda_host::LANES; lane++) {
      uint32_t pair = static_cast<MatrixStore *>(records[lane])->value[m];
      for (int e = 0; e < 2; e++) {
        int i = lane / 4, j = lane % 4 * 2 + e;
        if (TRANS) std::swap(i, j);
        auto bits = static_cast<uint16_t>(pair >> (16 * e));
        std::memcpy(static_cast<char *>(rows[i]) + 2 * j, &bits, 2);
      }
    }
  }
}

inline void stmatrix_x4(void *row, const uint32_t (&r)[4]) {
  MatrixStore record{row, {r[0], r[1], r[2], r[3]}};
  cuda_host::collective("stmatrix", &record, 1, store_matrices<false, 4>);
}

inline void stmatrix_x2_trans(void *row, const uint32_t (&r)[2]) {
  MatrixStore record{row, {r[0], r[1]}};
  cuda_host::collective("stmatrix.trans", &record, 1, store_matrices<true, 2>);
}

// ---- wgmma：硬件不等 4 个 warp 到齐，所以这里各 warp 算自己的 16 行 ----

struct Descriptor {
  size_t start, leading, stride;
  int width;  // 交错的宽（字节）；16 是不交错
  explicit Descriptor(uint64_t bits)
      : start((bits & 0x3fff) << 4),
        leading((bits >> 16 & 0x3fff) << 4),
        stride((bits >> 32 & 0x3fff) << 4) {
    const int widths[] = {16, 128, 64, 32};
    width = widths[bits >> 62];
  }

  // M（N）一维第 i 个、K 一维第 k 个元素起的 8 个：沿 K（trans：沿 M、N），相接的 16 字节，不跨交错的单位。
  void eight(uint16_t (&to)[8], bool trans, size_t i, size_t k, uint64_t fence) const {
    auto wide = static_cast<size_t>(width);
    size_t offset;
    if (width == 16)
      offset =
          i / 8 * stride + k / 8 * leading + (trans ? k : i) % 8 * 16 + (trans ? i : k) % 8 * 2;
    else if (trans)
      offset = i / (wide / 2) * leading + i % (wide / 2) * 2 + k / 8 * stride + k % 8 * wide;
    else
      offset = i / 8 * stride + i % 8 * wide + k * 2;
    size_t address = swizzle_address(start + offset, width);
    size_t size = cuda_host::shared_size(), left = address < size ? size - address : 0;
    std::fill(to, to + 8, uint16_t{0x7fff});  // 越界：NaN
    if (left < 2) return;
    cuda_host::read_async(address, fence);
    std::memcpy(to, cuda_host::shared_memory() + address, left < 16 ? left / 2 * 2 : 16);
  }
};

struct GroupProduct {
  float *d;
  uint64_t a, b;
  uint32_t fragment[4];
  bool in_registers, trans_a, trans_b, accumulate, bf16;
  int columns, warp;
};

struct WarpProduct {
  GroupProduct lanes[cuda_host::LANES];
  uint64_t fence;  // 发出时这个 warp 的 fence.proxy.async
};

inline float decode_half(bool bf16, uint16_t bits) {
  return bf16 ? decode_bf16(bits) : decode_f16(bits);
}

// 一个操作数 K 的 16 个、M（N）的 count 个：to [k][stride]。
inline void read_operand(float *to, int stride, const Descriptor &from, bool trans, size_t first,
                         int count, bool bf16, uint64_t fence) {
  uint16_t bits[8];
  for (int i = 0; i < count; i += trans ? 8 : 1)
    for (int k = 0; k < 16; k += trans ? 1 : 8) {
      from.eight(bits, trans, first + static_cast<size_t>(i), static_cast<size_t>(k), fence);
      for (int e = 0; e < 8; e++)
        to[trans ? k * stride + i + e : (k + e) * stride + i] = decode_half(bf16, bits[e]);
    }
}

// 同 multiply_tile：a [k][行]。
__attribute__((optimize("O3"), no_sanitize("address", "undefined"))) inline void multiply_panels(
    const float (&a)[16][16], const float (&b)[16][256], float (&d)[16][256], int columns) {
  for (int row = 0; row < 16; row++)
    for (int begin = 0; begin < columns; begin += 8) {  // columns 是 8 的倍数
      float sum[8] = {};
      for (int k = 0; k < 16; k++)
        for (int n = 0; n < 8; n++) sum[n] += a[k][row] * b[k][begin + n];
      for (int n = 0; n < 8; n++) d[row][begin + n] = sum[n];
    }
}

inline void multiply_group(const WarpProduct &warp) {
  static float a[16][16], b[16][256], d[16][256];
  const GroupProduct &first = warp.lanes[0];
  Descriptor left(first.a), right(first.b);
  if (!first.in_registers)
    read_operand(a[0], 16, left, first.trans_a, static_cast<size_t>(first.warp) * 16, 16,
                 first.bf16, warp.fence);
  for (int lane = 0; lane < cuda_host::LANES && first.in_registers; lane++)
    for (int part = 0; part < 4; part++)
      for (int e = 0; e < 2; e++)
        a[lane % 4 * 2 + 8 * (part >> 1) + e][lane / 4 + 8 * (part & 1)] = decode_half(
            first.bf16, static_cast<uint16_t>(warp.lanes[lane].fragment[part] >> (16 * e)));
  read_operand(b[0], 256, right, first.trans_b, 0, first.columns, first.bf16, warp.fence);
  multiply_panels(a, b, d, first.columns);
  for (int lane = 0; lane < cuda_host::LANES; lane++)
    for (int i = 0; i < first.columns / 2; i++) {
      float value = d[lane / 4 + 8 * (i >> 1 & 1)][i / 4 * 8 + lane % 4 * 2 + (i & 1)];
      float *to = warp.lanes[lane].d + i;
      *to = first.accumulate ? *to + value : value;
    }
}

inline void issue_group(void **records, int count) {
  WarpProduct warp;
  for (int lane = 0; lane < count; lane++) {
    warp.lanes[lane] = *static_cast<GroupProduct *>(records[lane]);
    if (warp.lanes[lane].a != warp.lanes[0].a || warp.lanes[lane].b != warp.lanes[0].b)
      cuda_host::fail("wgmma 的描述符在一个 warp 里不一致");
  }
  warp.fence = cuda_host::fence_of_warp();
  if (!cuda_host::wgmma_fenced(false)) cuda_host::fail("wgmma 之前没有 wgmma_fence");
  cuda_host::defer(cuda_host::MMA_QUEUE, [warp] { multiply_group(warp); });
}

inline int group_warp() { return static_cast<int>(threadIdx.x) / cuda_host::LANES % 4; }

template <bool BF16, int TRANS_A, int TRANS_B, int R>
void wgmma(float (&d)[R], uint64_t a, uint64_t b, bool accumulate) {
  GroupProduct record{d,          a,    b,     {},          false, TRANS_A == 1, TRANS_B == 1,
                      accumulate, BF16, 2 * R, group_warp()};
  cuda_host::collective("wgmma", &record, 1, issue_group);
}

template <bool BF16, int TRANS_B, int R>
void wgmma(float (&d)[R], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
  GroupProduct record{
      d,    0,     b,           {a[0], a[1], a[2], a[3]}, true, false, TRANS_B == 1, accumulate,
      BF16, 2 * R, group_warp()};
  cuda_host::collective("wgmma.register", &record, 1, issue_group);
}

inline void wgmma_fence() {
  cuda_host::collective("wgmma.fence", nullptr, 1,
                        [](void **, int) { cuda_host::wgmma_fenced(true); });
}

inline void wgmma_commit() {
  cuda_host::collective("wgmma.commit", nullptr, 1,
                        [](void **, int) { cuda_host::commit(cuda_host::MMA_QUEUE); });
}

template <int LEFT>
void wgmma_wait() {
  cuda_host::collective("wgmma.wait", nullptr, 1,
                        [](void **, int) { cuda_host::wait_groups(cuda_host::MMA_QUEUE, LEFT); });
}

template <int R>
void wgmma_settle(float (&)[R]) {}

}  // namespace dso
