"""主机模拟自己的测试：片段布局对照矩阵乘；故意种下的错误（越界、漏屏障、漏等待、死锁……）都能发现。"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from tests.cuda import host_library as host
from tests.cuda.simulation import FAILED, MODES, marks, pointer, simulate
from tests.op_cases import randn

pytestmark = marks

# 一个 warp：d [16, 8] = a [16, 16] b [8, 16]ᵀ；右操作数按 [n][k] 或 [k][n] 存。
FRAGMENTS = """
#include "mma.cuh"
using namespace dso;
static void kernel(const uint16_t *a, const uint16_t *b, float *d, int half, int trans, int pad) {
  grid_wait();
  auto *tile = reinterpret_cast<uint16_t *>(dynamic_shared());
  int stride = 32 + pad;
  uint16_t *left = tile, *right = tile + 16 * stride;
  for (int i = threadIdx.x; i < 16 * 32; i += 32) {
    left[i / 32 * stride + i % 32] = a[i];
    right[i / 32 * stride + i % 32] = b[i];
  }
  __syncthreads();
  for (int k = 0; k < 32; k += 16) {
    uint32_t x[4], y[4];
    load_a(x, left, stride, 0, k);
    if (trans) load_b_trans(y, right, stride, k % 16, 0);
    else load_b_16x16(y, right, stride, 0, k);
    for (int n = 0; n < 2; n++) {
      float sum[4] = {};
      if (half) F16::mma(sum, x, y[2 * n], y[2 * n + 1]);
      else Bf16::mma(sum, x, y[2 * n], y[2 * n + 1]);
      for (int i = 0; i < 4; i++)
        d[(fragment_row() + i / 2 * 8) * 16 + n * 8 + fragment_column() + i % 2] += sum[i];
    }
  }
}
extern "C" int run(const uint16_t *a, const uint16_t *b, float *d, int half, int trans, int pad) {
  return launch(kernel, dim3(1), dim3(32), 32 * (32 + pad) * 2, nullptr, a, b, d, half, trans, pad);
}
"""

# BUG 选一种错误；0 是对的：64 个线程经共享内存把输入倒过来，两级流水拷贝。
REVERSE = """
#include "mma.cuh"
using namespace dso;
static void kernel(const float *x, float *y, int steps) {
  auto *tile = reinterpret_cast<float *>(dynamic_shared());  // [2][64]
  int t = threadIdx.x;
  if (BUG == 9 && t == 40) return;
  if (BUG != 10) grid_wait();
  auto fetch = [&](int step) {
    if (t < 16) cp_async_16(tile + step % 2 * 64 + t * 4, x + step * 64 + t * 4, true);
    cp_async_commit();
  };
  fetch(0);
  for (int step = 0; step < steps; step++) {
    if (BUG != 1) cp_async_wait<0>();
    if (BUG != 2) __syncthreads();
    if (step + 1 < steps) fetch(BUG == 3 ? step : step + 1);
    y[step * 64 + t] = tile[step % 2 * 64 + (BUG == 4 ? t + 64 + 4 : 63 - t)];
    if (BUG == 5 && t < 32) __syncthreads();
    if (BUG == 6 && t < 16) __shfl_xor_sync(ALL_LANES, 1.0f, 1);
    if (BUG == 7 && t % 32 < 16) __syncwarp(); else if (BUG == 7) __any_sync(ALL_LANES, 1);
  }
  if (BUG == 8) cp_async_16(tile + 1, x, true);
  if (BUG == 10) grid_wait();
}
extern "C" int run(const float *x, float *y, int steps) {
  return launch(kernel, dim3(1), dim3(64), 2 * 64 * 4, nullptr, x, y, steps);
}
"""


@pytest.mark.usefixtures("mode")
def test_fragments_multiply():
    """ldmatrix 与 mma 的片段布局：结果就是矩阵乘，两种类型、两种右操作数。"""
    run = simulate(FRAGMENTS).run
    for half, dtype in ((0, torch.bfloat16), (1, torch.float16)):
        a, b = randn(16, 32, dtype=dtype), randn(16, 32, dtype=dtype)
        d = torch.zeros(16, 16)
        assert run(pointer(a), pointer(b), pointer(d), half, 0, 8) == 0
        torch.testing.assert_close(d, a.float() @ b.float().T)
        d = torch.zeros(16, 16)
        assert run(pointer(a), pointer(b), pointer(d), half, 1, 8) == 0
        both = a.float()[:, :16] @ b.float()[:, :16] + a.float()[:, 16:] @ b.float()[:, :16]
        torch.testing.assert_close(d, both)


def test_bank_conflicts_are_counted():
    """行距是 16 字节的奇数倍时没有库冲突；不补齐就有。"""
    library = simulate(FRAGMENTS)
    a = randn(16, 32, dtype=torch.bfloat16)
    counts = []
    for pad in (8, 0):
        library.dso_host_reset_counts()
        assert library.run(pointer(a), pointer(a), pointer(torch.zeros(16, 16)), 0, 0, pad) == 0
        counts.append(library.dso_host_conflicts())
    assert counts[0] == 0 and counts[1] > 0


def reversed_blocks(x: torch.Tensor) -> torch.Tensor:
    return x.view(-1, 64).flip(1).flatten()


@pytest.mark.usefixtures("mode")
def test_correct_kernel_passes_in_every_order():
    x, y = randn(64 * 5), torch.zeros(64 * 5)
    assert simulate(REVERSE, BUG=0).run(pointer(x), pointer(y), 5) == 0
    assert torch.equal(y, reversed_blocks(x))


@pytest.mark.parametrize("bug", [1, 2, 3], ids=["漏等待", "漏屏障", "覆盖在用的缓冲"])
def test_planted_race_changes_the_result(monkeypatch, bug):
    """至少有一种次序给出错的结果。"""
    library, x = simulate(REVERSE, BUG=bug), randn(64 * 5)
    wrong = 0
    for order, timing in MODES:
        monkeypatch.setenv("DSO_HOST_ORDER", order)
        monkeypatch.setenv("DSO_HOST_ASYNC", timing)
        y = torch.zeros(64 * 5)
        wrong += library.run(pointer(x), pointer(y), 5) != 0 or not torch.equal(
            y, reversed_blocks(x)
        )
    assert wrong > 0


@pytest.mark.parametrize(
    "bug, reason",
    [
        (5, "死锁"),
        (6, "死锁"),
        (7, "不同的集体操作"),
        (8, "16 字节"),
        (9, "没有走到 grid_wait"),
        (10, "grid_wait 之前"),
    ],
    ids=[
        "分支里的屏障",
        "半个 warp 洗牌",
        "走散的 warp",
        "没对齐的拷贝",
        "提前返回的线程不等前面的核",
        "先拷贝再等前面的核",
    ],
)
def test_planted_fault_is_reported(bug, reason):
    library, x = simulate(REVERSE, BUG=bug), randn(64 * 5)
    assert library.run(pointer(x), pointer(torch.zeros(64 * 5)), 5) == FAILED
    assert reason in library.dso_host_failure().decode()
    # 出过错之后还能照常运行。
    y = torch.zeros(64 * 5)
    assert simulate(REVERSE, BUG=0).run(pointer(x), pointer(y), 5) == 0
    assert torch.equal(y, reversed_blocks(x))


def test_early_reads_need_a_kernel_that_waits_first():
    """前两个核里有一个不在 grid_wait 之前放行，才可以在 grid_wait 之前拷贝早已写好的；前一个核写之前的，要它自己不提早。"""
    text = """
    #include "mma.cuh"
    using namespace dso;
    static void kernel(const float *x, int early) {
      if (early == 1) cp_async_16_early(dynamic_shared(), x, true);
      if (early == 2) grid_wait();
      if (early == 3) read_early(), cp_async_16(dynamic_shared(), x, true);
      grid_release();
      grid_wait();
    }
    extern "C" int run(const float *x, int early) {
      return launch(kernel, dim3(1), dim3(1), 16, nullptr, x, early);
    }
    """
    library, x = simulate(text), randn(4)
    both, last = "都在 grid_wait 之前放行", "前一个核在 grid_wait 之前放行"
    # 0、1、3 提早放行，1、3 另外先读；2 等到了才放行。
    for order, reason in (
        ([2, 0, 1], None),
        ([0, 2, 1], None),
        ([2, 0, 0, 1], both),
        ([0, 2, 3], None),
        ([2, 0, 3], last),
    ):
        codes = [library.run(pointer(x), early) for early in order]
        assert codes == [0] * (len(order) - 1) + [FAILED if reason else 0]
        assert reason is None or reason in library.dso_host_failure().decode()


def test_launch_limits():
    """共享内存、线程数超出硬件的上限：启动失败。"""
    text = """
    #include "mma.cuh"
    static void kernel() { dso::grid_wait(); }
    extern "C" int run(int threads, int bytes) {
      return dso::launch(kernel, dim3(1), dim3(threads), bytes, nullptr);
    }
    """
    run = simulate(text).run
    assert run(32, 227 << 10) == 0
    assert run(32, (227 << 10) + 1) == FAILED and run(2048, 0) == FAILED


@pytest.mark.skipif(not host.sanitized(), reason="要在 scripts/cuda_host.sh 里（带 ASan）")
def test_out_of_bounds_shared_access_is_found():
    """读到动态共享内存之外 4 个元素：ASan 让进程停下。"""
    library = simulate(REVERSE, BUG=4)
    script = (
        "import ctypes, sys; x = (ctypes.c_float * 320)(); y = (ctypes.c_float * 320)(); "
        "sys.exit(ctypes.CDLL(sys.argv[1]).run(x, y, 5))"
    )
    command = [sys.executable, "-c", script, library._name]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ)
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr
