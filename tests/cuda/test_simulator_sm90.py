"""主机模拟的 Hopper 部分：TMA 的框、wgmma 的布局对照矩阵乘、寄存器的分配；种下的错误都能发现。"""

from __future__ import annotations

import ctypes

import pytest
import torch

from tests.cuda.simulation import FAILED, marks, pointer, simulate
from tests.op_cases import randn

pytestmark = marks

# 4 个 warp：d [64, N] = a b，两个操作数由 TMA 拷进来，各自可以 K 或 M（N）一维连续。swizzle、leading、stride
# 不是 -1 时换掉描述符的一项，wait 为 0 时不等（种下的错误）。
PRODUCT = """
#include <tma.cuh>
#include "mma.cuh"
#include "tile_sm90.cuh"
using namespace dso;
struct Fault { int swizzle, leading, stride, wait; };
// 一个操作数的描述符，K 的第 k 个 16；块是 [n][64]，或 n / 64 块 [64][64]。
static uint64_t operand(unsigned char *tile, bool trans, int k, const Fault &fault) {
  uint64_t d = trans ? mn_major(tile + k * 16 * BOX_ROW, 64 * BOX_ROW) : k_major(tile + k * 32);
  auto replace = [&](int value, int bits, int at) {
    if (value < 0) return;
    uint64_t mask = (uint64_t{1} << bits) - 1;
    d = (d & ~(mask << at)) | static_cast<uint64_t>(value) << at;
  };
  replace(fault.swizzle, 2, 62);
  replace(fault.leading, 14, 16);
  replace(fault.stride, 14, 32);
  return d;
}
template <bool BF16, int N, int TA, int TB, bool REGISTERS>
static void kernel(const CUtensorMap a, const CUtensorMap b, float *d, Fault fault) {
  unsigned char *left = dynamic_shared(), *right = left + 64 * BOX_ROW;
  auto *full = reinterpret_cast<uint64_t *>(right + N * BOX_ROW);
  int t = threadIdx.x, row = t / 32 * 16 + t % 32 / 4;
  if (t == 0) mbarrier_init(full, 1), mbarrier_init_fence();
  __syncthreads();
  grid_wait();
  if (t == 0) {
    mbarrier_expect(full, (64 + N) * BOX_ROW);
    tma_load(left, &a, full, 0, 0);
    for (int n = 0; n < N; n += 64)
      tma_load(right + n * BOX_ROW, &b, full, TB ? n : 0, TB ? 0 : n);
  }
  mbarrier_wait(full, 0);
  float sum[N / 2];
  wgmma_fence();
  for (int k = 0; k < 4; k++) {
    uint64_t y = operand(right, TB, k, fault);
    if constexpr (REGISTERS) {
      uint32_t x[4];
      for (int i = 0; i < 4; i++)
        x[i] = *reinterpret_cast<uint32_t *>(
            left + swizzled(row + i % 2 * 8, k * 16 + i / 2 * 8 + t % 4 * 2));
      wgmma<BF16, TB>(sum, x, y, k > 0);
    } else {
      wgmma<BF16, TA, TB>(sum, operand(left, TA, k, fault), y, k > 0);
    }
  }
  wgmma_commit();
  if (fault.wait) wgmma_wait<0>();
  wgmma_settle(sum);
  for (int i = 0; i < N / 2; i++)
    d[(row + i / 2 % 2 * 8) * N + i / 4 * 8 + t % 4 * 2 + i % 2] = sum[i];
}
template <int N, int TA, int TB, bool REGISTERS = false>
static int go(const void *a, const void *b, float *d, int bf16, Fault fault) {
  CUtensorMap left, right;
  dso_dtype type = bf16 ? DSO_BF16 : DSO_F16;
  int error = make_tensor_map(&left, {a, type, 2, {64, 64}, {1, 64}, {64, 64}});
  error |= make_tensor_map(&right, {b, type, 2, {TB ? N : 64, TB ? 64 : N}, {1, TB ? N : 64},
                                    {64, N < 64 ? N : 64}});
  if (error) return error;
  auto *run = bf16 ? kernel<true, N, TA, TB, REGISTERS> : kernel<false, N, TA, TB, REGISTERS>;
  return launch(run, dim3(1), dim3(128), (64 + N) * BOX_ROW + 8, nullptr, left, right, d, fault);
}
extern "C" int run(int way, const void *a, const void *b, float *d, int bf16, Fault fault) {
  switch (way) {
    case 0: return go<8, 0, 0>(a, b, d, bf16, fault);
    case 1: return go<16, 1, 0>(a, b, d, bf16, fault);
    case 2: return go<32, 0, 0>(a, b, d, bf16, fault);
    case 3: return go<64, 1, 1>(a, b, d, bf16, fault);
    case 4: return go<128, 0, 0>(a, b, d, bf16, fault);
    case 5: return go<256, 0, 1>(a, b, d, bf16, fault);
    case 6: return go<128, 0, 0, true>(a, b, d, bf16, fault);
    default: return go<128, 0, 1, true>(a, b, d, bf16, fault);
  }
}
"""

# (N, a 沿 M 连续, b 沿 N 连续)，次序同上面的 run；最后两种的 a 在寄存器里。
WAYS = [
    (8, 0, 0),
    (16, 1, 0),
    (32, 0, 0),
    (64, 1, 1),
    (128, 0, 0),
    (256, 0, 1),
    (128, 0, 0),
    (128, 0, 1),
]

# TMA：把 [C, B, A] 的张量里从 (x, y, z) 起的框 [2, 8, 64] 原样写回（坐标可以在界外）。
BOX = """
#include <tma.cuh>
#include "mma.cuh"
#include "tile_sm90.cuh"
using namespace dso;
static void kernel(const CUtensorMap map, uint16_t *out, int x, int y, int z, int rank) {
  unsigned char *tile = dynamic_shared();
  auto *full = reinterpret_cast<uint64_t *>(tile + 16 * BOX_ROW);
  if (threadIdx.x == 0) mbarrier_init(full, 1), mbarrier_init_fence();
  __syncthreads();
  grid_wait();
  if (threadIdx.x == 0) {
    mbarrier_expect(full, 16 * BOX_ROW);
    if (rank == 4) tma_load(tile, &map, full, x, y, z, 0);
    else tma_load(tile, &map, full, x, y, z);
  }
  mbarrier_wait(full, 0);
  for (int i = threadIdx.x; i < 16 * 64; i += 32)
    out[i] = *reinterpret_cast<uint16_t *>(tile + swizzled(i / 64, i % 64));
}
extern "C" int run(const void *base, uint16_t *out, int64_t a, int64_t b, int64_t c, int64_t row,
                   int x, int y, int z, int rank) {
  CUtensorMap map;
  int error = make_tensor_map(&map, {base, DSO_BF16, rank, {a, b, c, 1}, {1, row, row * b, 8},
                                     {64, 8, 2, 1}});
  if (error) return error;
  return launch(kernel, dim3(1), dim3(32), 16 * BOX_ROW + 8, nullptr, map, out, x, y, z, rank);
}
"""

# d = a bᵀ，两个操作数 [64, 64] 由普通的写（cp.async 或 stmatrix）放进共享内存。fence：0 没有，1 写的线程（屏障之前），
# 2 读的线程（屏障之后），3 只有一半写的线程。
PROXIES = """
#include <launch.cuh>
#include <ptx_sm90.cuh>
#include "mma.cuh"
#include "tile_sm90.cuh"
using namespace dso;
static void kernel(const uint16_t *a, const uint16_t *b, float *d, bool matrices, int fence) {
  grid_wait();
  unsigned char *tile = dynamic_shared();
  int t = threadIdx.x, lane = t % 32, row = t / 32 * 16;
  for (int side = 0; side < 2; side++) {
    const uint16_t *from = side ? b : a;
    unsigned char *to = tile + side * 64 * BOX_ROW;
    for (int i = t; i < 64 * 8 && !matrices; i += 128)
      cp_async_16(to + swizzled(i / 8, i % 8 * 8), from + i * 8, true);
    for (int k = 0; k < 64 && matrices; k += 16) {
      uint32_t pairs[4];
      for (int i = 0; i < 4; i++)
        pairs[i] = *reinterpret_cast<const uint32_t *>(
            from + (row + lane / 4 + i % 2 * 8) * 64 + k + i / 2 * 8 + lane % 4 * 2);
      stmatrix_x4(to + swizzled(row + lane % 16, k + lane / 16 * 8), pairs);
    }
  }
  cp_async_commit();
  cp_async_wait<0>();
  if (fence == 1 || (fence == 3 && t < 64)) fence_proxy_async();
  __syncthreads();
  if (fence == 2) fence_proxy_async();
  float sum[32];
  wgmma_fence();
  for (int k = 0; k < 4; k++)
    wgmma<true, 0, 0>(sum, k_major(tile + k * 32), k_major(tile + 64 * BOX_ROW + k * 32), k > 0);
  wgmma_commit();
  wgmma_wait<0>();
  wgmma_settle(sum);
  for (int i = 0; i < 32; i++)
    d[(row + lane / 4 + i / 2 % 2 * 8) * 64 + i / 4 * 8 + lane % 4 * 2 + i % 2] = sum[i];
}
extern "C" int run(const void *a, const void *b, float *d, int matrices, int fence) {
  return launch(kernel, dim3(1), dim3(128), 128 * BOX_ROW, nullptr,
                static_cast<const uint16_t *>(a), static_cast<const uint16_t *>(b), d,
                matrices != 0, fence);
}
"""

# 3 组各 128 个线程：每线程 168 个寄存器，一组让出来，两组增加。
REGISTERS = """
#include <launch.cuh>
#include <ptx_sm90.cuh>
using namespace dso;
static void kernel(int *done) {
  grid_wait();
  if (threadIdx.x >= 256) registers_decrease<PRODUCER>();
  else registers_increase<CONSUMER>();
  done[threadIdx.x] = 1;
}
extern "C" int run(int *done) { return launch(kernel, dim3(1), dim3(384), 0, nullptr, done); }
"""


class Fault(ctypes.Structure):
    """描述符里换掉的项（-1：不换），与是否等 wgmma。"""

    _fields_ = [(name, ctypes.c_int) for name in ("swizzle", "leading", "stride", "wait")]


def multiply(way, dtype, **fault):
    """(返回码, 核的结果, 矩阵乘)。"""
    width, trans_a, trans_b = WAYS[way]
    a, b = randn(64, 64, dtype=dtype), randn(width, 64, dtype=dtype)
    stored = [x.T.contiguous() if trans else x for x, trans in ((a, trans_a), (b, trans_b))]
    d = torch.zeros(64, width)
    values = {"swizzle": -1, "leading": -1, "stride": -1, "wait": 1, **fault}
    code = simulate(PRODUCT).run(
        way, *map(pointer, (*stored, d)), int(dtype == torch.bfloat16), Fault(**values)
    )
    return code, d, a.float() @ b.float().T


@pytest.mark.usefixtures("mode")
@pytest.mark.parametrize("way", range(len(WAYS)))
def test_products(way):
    """各种宽度、两种类型，操作数沿 K 或沿 M（N）连续，左操作数在共享内存或寄存器里。"""
    for dtype in (torch.bfloat16, torch.float16):
        code, got, want = multiply(way, dtype)
        assert code == 0
        torch.testing.assert_close(got, want)


WRONG = {
    "不交错": (4, {"swizzle": 0}),
    "64 字节交错": (4, {"swizzle": 2}),
    "32 字节交错": (5, {"swizzle": 3}),
    "K 连续的步距": (4, {"stride": 512 // 16}),
    "N 连续的步距": (5, {"stride": 512 // 16}),
    "N 连续的块距": (5, {"leading": 4096 // 16}),
    "漏等 wgmma": (4, {"wait": 0}),
}


@pytest.mark.usefixtures("mode")
@pytest.mark.parametrize("matrices", [0, 1], ids=["cp.async", "stmatrix"])
@pytest.mark.parametrize("fence", range(4), ids=["没有", "写的线程", "读的线程", "一半写的线程"])
def test_plain_writes_need_a_proxy_fence(matrices, fence):
    """普通的写给 wgmma 读之前，写的或读的线程要 fence_proxy_async。"""
    a, b = randn(64, 64, dtype=torch.bfloat16), randn(64, 64, dtype=torch.bfloat16)
    d, library = torch.zeros(64, 64), simulate(PROXIES)
    code = library.run(*map(pointer, (a, b, d)), matrices, fence)
    if fence in (1, 2):
        assert code == 0
        torch.testing.assert_close(d, a.float() @ b.float().T)
    else:
        assert code == FAILED
        assert "fence_proxy_async" in library.dso_host_failure().decode()


@pytest.mark.parametrize("way, fault", WRONG.values(), ids=WRONG)
def test_wrong_operand_changes_the_result(monkeypatch, way, fault):
    monkeypatch.setenv("DSO_HOST_ASYNC", "lazy")
    code, got, want = multiply(way, torch.bfloat16, **fault)
    assert code != 0 or not torch.allclose(got, want, rtol=0.1, atol=0.1)


@pytest.mark.usefixtures("mode")
@pytest.mark.parametrize("rank", [3, 4])
@pytest.mark.parametrize("at", [(0, 0, 0), (64, 3, 1), (-8, 5, 2), (40, -3, -1), (500, 0, 0)])
def test_boxes(at, rank):
    """框里在界外的元素是 0；行距可以大于行宽。"""
    x = randn(3, 10, 88, dtype=torch.bfloat16)
    inside = x[..., :80]
    got = torch.zeros(2, 8, 64, dtype=torch.bfloat16)
    sizes = [ctypes.c_int64(n) for n in (80, 10, 3, 88)]
    assert simulate(BOX).run(pointer(x), pointer(got), *sizes, *at, rank) == 0
    padded = torch.zeros(3 + 8, 10 + 32, 80 + 1200, dtype=torch.bfloat16)
    padded[4:7, 16:26, 600:680] = inside
    i, j, k = at[2] + 4, at[1] + 16, at[0] + 600
    assert torch.equal(got, padded[i : i + 2, j : j + 8, k : k + 64])


@pytest.mark.parametrize("row", [81, 0])
def test_maps_that_the_hardware_refuses(row):
    """行距不是 16 字节的倍数、为 0：编码失败。"""
    x = randn(3, 10, 88, dtype=torch.bfloat16)
    sizes = [ctypes.c_int64(n) for n in (80, 10, 3, row)]
    assert simulate(BOX).run(pointer(x), pointer(x), *sizes, 0, 0, 0, 3) == 1


@pytest.mark.usefixtures("mode")
@pytest.mark.parametrize(
    "producer, consumer, reason",
    [(40, 232, ""), (48, 232, "死锁"), (24, 248, "死锁"), (176, 232, "方向")],
)
def test_registers_come_from_the_other_groups(producer, consumer, reason):
    """寄存器总共 3 * 168：超出的在硬件上永远等不到。"""
    library = simulate(REGISTERS, PRODUCER=producer, CONSUMER=consumer)
    done = torch.zeros(384, dtype=torch.int32)
    assert library.run(pointer(done)) == (FAILED if reason else 0)
    assert reason in library.dso_host_failure().decode()
    assert reason or done.all()
