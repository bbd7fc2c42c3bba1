// cuda/ptx.cuh 的主机替身：同样的片段布局，同样的异步语义（见 sim.h 的 DSO_HOST_ASYNC）。
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

namespace dso {

inline unsigned char *dynamic_shared() { return cuda_host::shared_memory(); }

template <int V>
struct alignas(4 * V) Words {
  uint32_t v[V];
};

inline uint32_t shared_address(const void *p) {
  return static_cast<uint32_t>(cuda_host::shared_offset(p));
}

// ---- 提前启动 ----

inline void grid_wait() { cuda_host::wait_grid(); }
inline void read_early() { cuda_host::read_early(); }
inline void grid_release() { cuda_host::release_grid(); }

inline void prefetch_l2(const void *from, uint32_t bytes) {
  if (reinterpret_cast<uintptr_t>(from) % 16 != 0 || bytes % 16 != 0)
    cuda_host::fail("L2 预取没有对齐到 16 字节");
}

// ---- 异步拷贝 ----

template <int BYTES>
void copy_async(void *to, const void *from, bool valid) {
  using namespace cuda_host;
  if (reinterpret_cast<uintptr_t>(to) % BYTES != 0 ||
      (valid && reinterpret_cast<uintptr_t>(from) % BYTES != 0))
    fail(BYTES == 16 ? "cp.async 的地址没有对齐到 16 字节" : "cp.async 的地址没有对齐到 4 字节");
  size_t at = shared_offset(to);
  int thread = thread_linear();
  defer(COPY_QUEUE, [=] {
    wrote(at, thread);
    if (valid)
      std::memcpy(to, from, BYTES);
    else
      std::memset(to, 0, BYTES);
  });
}

inline void cp_async_16(void *to, const void *from, bool valid) {
  if (valid) cuda_host::touch_global();
  copy_async<16>(to, from, valid);
}

inline void cp_async_4(void *to, const void *from, bool valid) {
  if (valid) cuda_host::touch_global();
  copy_async<4>(to, from, valid);
}

inline void cp_async_16_early(void *to, const void *from, bool valid) {
  if (valid) cuda_host::touch_settled();
  copy_async<16>(to, from, valid);
}

inline void cp_async_commit() { cuda_host::commit(cuda_host::COPY_QUEUE); }

template <int LEFT>
void cp_async_wait() {
  cuda_host::wait_groups(cuda_host::COPY_QUEUE, LEFT);
}

inline const void *chunks_after(const void *base, uint32_t count) {
  return static_cast<const char *>(base) + static_cast<uint64_t>(count) * 16;
}

// ---- 矩阵片段 ----

struct MatrixLoad {
  const void *row;
  uint32_t result[4];
};

// 8x8 矩阵 m 的元素 (i, j)。
inline uint16_t matrix_element(void **records, int m, int i, int j) {
  uint16_t value;
  const void *row = static_cast<MatrixLoad *>(records[m * 8 + i])->row;
  std::memcpy(&value, static_cast<const char *>(row) + 2 * j, 2);
  return value;
}

template <bool TRANS>
void load_matrices(void **records, int count) {
  for (int m = 0; m < 4; m++) {
    const void *rows[8];
    for (int i = 0; i < 8; i++) {
      rows[i] = static_cast<MatrixLoad *>(records[m * 8 + i])->row;
      if (reinterpret_cast<uintptr_t>(rows[i]) % 16 != 0)
        cuda_host::fail("ldmatrix 的行没有对齐到 16 字节");
    }
    cuda_host::count_conflicts(rows, 8);
    for (int lane = 0; lane < count; lane++) {
      int i = lane / 4, j = lane % 4 * 2;
      uint16_t low = TRANS ? matrix_element(records, m, j, i) : matrix_element(records, m, i, j);
      uint16_t high =
          TRANS ? matrix_element(records, m, j + 1, i) : matrix_element(records, m, i, j + 1);
      static_cast<MatrixLoad *>(records[lane])->result[m] = low | static_cast<uint32_t>(high) << 16;
    }
  }
}

inline void ldmatrix_x4(uint32_t (&r)[4], const void *row) {
  MatrixLoad record{row, {}};
  cuda_host::collective("ldmatrix", &record, 1, load_matrices<false>);
  std::copy(record.result, record.result + 4, r);
}

inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void *row) {
  MatrixLoad record{row, {}};
  cuda_host::collective("ldmatrix.trans", &record, 1, load_matrices<true>);
  std::copy(record.result, record.result + 4, r);
}

struct MatrixProduct {
  float *d;
  uint32_t a[4], b[2];
};

// 只碰自己的数组：不插桩、照 -O3 编译，主机模拟的时间多半在这里。各元素仍按 k 的次序相加。
__attribute__((optimize("O3"), no_sanitize("address", "undefined"))) inline void multiply_tile(
    const float (&a)[16][16], const float (&b)[16][8], float (&d)[16][8]) {
  for (int row = 0; row < 16; row++) {
    float sum[8] = {};
    for (int k = 0; k < 16; k++)
      for (int n = 0; n < 8; n++) sum[n] += a[row][k] * b[k][n];
    for (int n = 0; n < 8; n++) d[row][n] = sum[n];
  }
}

template <class Decode>
void multiply(void **records, Decode decode) {
  static float a[16][16], b[16][8], d[16][8];
  for (int lane = 0; lane < 32; lane++) {
    const auto &mine = *static_cast<MatrixProduct *>(records[lane]);
    int row = lane / 4, column = lane % 4 * 2;
    for (int part = 0; part < 4; part++)
      for (int e = 0; e < 2; e++)
        a[row + 8 * (part & 1)][column + 8 * (part >> 1) + e] =
            decode(static_cast<uint16_t>(mine.a[part] >> (16 * e)));
    for (int part = 0; part < 2; part++)
      for (int e = 0; e < 2; e++)
        b[column + 8 * part + e][row] = decode(static_cast<uint16_t>(mine.b[part] >> (16 * e)));
  }
  multiply_tile(a, b, d);
  for (int lane = 0; lane < 32; lane++) {
    float *to = static_cast<MatrixProduct *>(records[lane])->d;
    for (int i = 0; i < 4; i++) to[i] += d[lane / 4 + 8 * (i >> 1)][lane % 4 * 2 + (i & 1)];
  }
}

inline float decode_bf16(uint16_t bits) {
  return __uint_as_float(static_cast<unsigned>(bits) << 16);
}
inline float decode_f16(uint16_t bits) { return __half2float(__ushort_as_half(bits)); }

inline void mma_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  MatrixProduct record{d, {a[0], a[1], a[2], a[3]}, {b0, b1}};
  cuda_host::collective("mma.bf16", &record, 1,
                        [](void **records, int) { multiply(records, decode_bf16); });
}

inline void mma_f16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  MatrixProduct record{d, {a[0], a[1], a[2], a[3]}, {b0, b1}};
  cuda_host::collective("mma.f16", &record, 1,
                        [](void **records, int) { multiply(records, decode_f16); });
}

inline uint32_t pack_bf16(float a, float b) {
  return __float2bfloat16_rn(a).bits | static_cast<uint32_t>(__float2bfloat16_rn(b).bits) << 16;
}

inline uint32_t pack_f16(float a, float b) {
  return __float2half_rn(a).bits | static_cast<uint32_t>(__float2half_rn(b).bits) << 16;
}

inline uint32_t fma_bf16(uint32_t a, uint32_t b, uint32_t c) {
  auto at = [](uint32_t x, int i) { return decode_bf16(static_cast<uint16_t>(x >> (16 * i))); };
  return pack_bf16(std::fma(at(a, 0), at(b, 0), at(c, 0)), std::fma(at(a, 1), at(b, 1), at(c, 1)));
}

inline uint32_t fma_f16(uint32_t a, uint32_t b, uint32_t c) {
  auto at = [](uint32_t x, int i) { return decode_f16(static_cast<uint16_t>(x >> (16 * i))); };
  return pack_f16(std::fma(at(a, 0), at(b, 0), at(c, 0)), std::fma(at(a, 1), at(b, 1), at(c, 1)));
}

template <unsigned SELECTOR>
uint32_t select_bytes(uint32_t x) {
  uint32_t r = 0;
  for (int i = 0; i < 4; i++) {
    unsigned from = SELECTOR >> (4 * i) & 15;
    if (from < 4) r |= (x >> (8 * from) & 255) << (8 * i);
  }
  return r;
}

template <class T>
T load_l2(const T *from) {
  cuda_host::touch_global();
  return *from;
}

template <class T, class From>
void load_aligned(T &to, const From *from, bool valid) {
  if (!valid) return;
  if (reinterpret_cast<uintptr_t>(from) % alignof(T) != 0) cuda_host::fail("宽访存的地址没有对齐");
  std::memcpy(&to, from, sizeof to);
}

inline Words<4> load_once(const void *from) {
  cuda_host::touch_global();
  Words<4> r;
  load_aligned(r, from, true);
  return r;
}

template <int V>
void load_once(Words<V> &to, const void *from, bool valid) {
  load_aligned(to, from, valid);
}

inline void load_if(float &to, const float *from, bool valid) { load_aligned(to, from, valid); }
inline void load_if(uint32_t &to, const uint8_t *from, bool valid) {
  if (valid) to = *from;
}

inline int afresh(int x) { return x; }

inline float fast_exp2(float x) { return std::exp2(x); }

}  // namespace dso
