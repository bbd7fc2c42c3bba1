"""主机模拟的 Hopper 部分：mbarrier 的环，写的是 TMA、cp.async 或 cluster 里别的 CTA；种下的错误都能发现。"""

from __future__ import annotations

import pytest
import torch

from tests.cuda.simulation import FAILED, MODES, marks, pointer, simulate
from tests.op_cases import randn

pytestmark = marks

# 生产者一个 warp、消费者一个 warp，STAGES 级的环：y 是 x 每 64 个一组倒过来。bug 选一种错误。
RING = """
#include <tma.cuh>
#include "mma.cuh"
#include "tile_sm90.cuh"
using namespace dso;
constexpr int STAGES = 2;
static void kernel(const CUtensorMap map, uint16_t *y, int steps, int bug) {
  unsigned char *tile = dynamic_shared();
  auto *full = reinterpret_cast<uint64_t *>(tile + STAGES * 1024), *empty = full + STAGES;
  int t = threadIdx.x;
  if (t == 0) {
    for (int s = 0; s < STAGES && bug != 6; s++) mbarrier_init(full + s, 1);
    for (int s = 0; s < STAGES; s++) mbarrier_init(empty + s, 1);
    mbarrier_init_fence();
  }
  __syncthreads();
  grid_wait();
  for (int step = 0; step < steps; step++) {
    int s = step % STAGES, parity = step / STAGES & 1;
    if (t == 0) {
      if (bug != 2) mbarrier_wait(empty + s, parity ^ 1);
      mbarrier_expect(full + s, bug == 3 ? 256 : bug == 4 ? 64 : 128);
      tma_load(tile + s * 1024 + (bug == 5 ? 64 : 0), &map, full + s, 0, step);
    } else if (t >= 32) {
      if (bug != 1) mbarrier_wait(full + s, parity);
      for (int i = t - 32; i < 64; i += 32)
        y[step * 64 + i] = *reinterpret_cast<uint16_t *>(tile + s * 1024 + swizzled(0, 63 - i));
      __syncwarp();
      if (t == 32) mbarrier_arrive(empty + s);
    }
  }
}
extern "C" int run(const void *x, uint16_t *y, int steps, int bug) {
  CUtensorMap map;
  int error = make_tensor_map(&map, {x, DSO_BF16, 2, {64, steps}, {1, 64}, {64, 1}});
  if (error) return error;
  return launch(kernel, dim3(1), dim3(64), STAGES * 1024 + 4 * 8, nullptr, map, y, steps, bug);
}
"""

# 一个 warp 用 cp.async 拷，各线程写完时到达 mbarrier，另一个 warp 等它。bug：1 先到达再拷，2 不等，3 多等一次到达。
COPIES = """
#include <ptx_sm90.cuh>
#include "mma.cuh"
using namespace dso;
static void kernel(const uint16_t *x, uint16_t *y, int steps, int bug) {
  unsigned char *tile = dynamic_shared();
  auto *full = reinterpret_cast<uint64_t *>(tile + 512), *empty = full + 1;
  int t = threadIdx.x, lane = t % 32;
  if (t == 0) mbarrier_init(full, bug == 3 ? 33 : 32), mbarrier_init(empty, 1);
  __syncthreads();
  grid_wait();
  for (int step = 0; step < steps; step++) {
    if (t < 32) {
      mbarrier_wait(empty, step % 2 ^ 1);
      if (bug == 1) mbarrier_arrive_copies(full);
      cp_async_16(tile + lane * 16, x + step * 256 + lane * 8, true);
      if (bug != 1) mbarrier_arrive_copies(full);
    } else {
      if (bug != 2) mbarrier_wait(full, step % 2);
      for (int i = lane; i < 256; i += 32)
        y[step * 256 + i] = reinterpret_cast<uint16_t *>(tile)[255 - i];
      __syncwarp();
      if (lane == 0) mbarrier_arrive(empty);
    }
  }
}
extern "C" int run(const uint16_t *x, uint16_t *y, int steps, int bug) {
  return launch(kernel, dim3(1), dim3(64), 512 + 16, nullptr, x, y, steps, bug);
}
"""

# 成块的拷贝与 4 字节的 cp.async 写完时记在同一个 mbarrier 上：y 是 x 的前 64 个，再是后 64 个里的偶数对（奇数的填 0）。
# bug：1 源没有对齐，2 大小不是 16 的倍数，3 写到共享内存之外，4 预告的字节多，5 cp.async 没有对齐。
BULK = """
#include <launch.cuh>
#include <ptx_sm90.cuh>
using namespace dso;
static void kernel(const uint16_t *x, uint32_t *y, int bug) {
  unsigned char *tile = dynamic_shared();
  auto *full = reinterpret_cast<uint64_t *>(tile + 256);
  int lane = threadIdx.x;
  if (lane == 0) mbarrier_init(full, 33), mbarrier_init_fence();
  __syncthreads();
  grid_wait();
  if (lane == 0) {
    mbarrier_expect(full, bug == 4 ? 144 : 128);
    bulk_load(tile + (bug == 3 ? 256 : 0), x + (bug == 1), bug == 2 ? 120 : 128, full);
  }
  cp_async_4(tile + 128 + lane * 4, x + 64 + lane * 2 + (bug == 5), lane % 2 == 0);
  mbarrier_arrive_copies(full);
  mbarrier_wait(full, 0);
  for (int i = 0; i < 2; i++)
    y[i * 32 + lane] = reinterpret_cast<uint32_t *>(tile)[i * 32 + lane];
}
extern "C" int run(const uint16_t *x, uint32_t *y, int bug) {
  return launch(kernel, dim3(1), dim3(32), 256 + 8, nullptr, x, y, bug);
}
"""

# 2 个 CTA 一个 cluster，各自是上面那样的环；两个生产者轮着发，一次写到两处，所以要等两处都放行。
# bug：1 只等自己的消费者，2 最后不等别的 CTA，3 第 1 个 CTA 停住，4 开头不等别的 CTA，5 闲着的线程先退出，
# 6 写到没有的 CTA。
CLUSTER = """
#include <launch.cuh>
#include <tma.cuh>
#include "mma.cuh"
#include "tile_sm90.cuh"
using namespace dso;
constexpr int STAGES = 2;
static void sync_cluster() { cluster_arrive(), cluster_wait(); }
static void kernel(const CUtensorMap map, uint16_t *y, int steps, int bug) {
  grid_wait();
  unsigned char *tile = dynamic_shared();
  auto *full = reinterpret_cast<uint64_t *>(tile + STAGES * 1024), *empty = full + STAGES;
  int t = threadIdx.x, rank = cluster_rank();
  if (t == 0) {
    for (int s = 0; s < STAGES; s++) mbarrier_init(full + s, 1);
    for (int s = 0; s < STAGES; s++) mbarrier_init(empty + s, bug == 1 ? 1 : 2);
    mbarrier_init_fence();
  }
  if (bug == 4) __syncthreads();
  else sync_cluster();
  if (bug == 5 && t > 0 && t < 32) return;
  y += blockIdx.x * steps * 64;
  for (int step = 0; step < steps; step++) {
    int s = step % STAGES, parity = step / STAGES & 1;
    if (t == 0) {
      mbarrier_wait(empty + s, parity ^ 1);
      mbarrier_expect(full + s, 128);
      if (step % 2 == rank)
        tma_load_multicast(tile + s * 1024, &map, full + s, bug == 6 ? 7 : 3, 0, step, 0);
    } else if (t >= 32) {
      mbarrier_wait(full + s, parity);
      for (int i = t - 32; i < 64; i += 32)
        y[step * 64 + i] = *reinterpret_cast<uint16_t *>(tile + s * 1024 + swizzled(0, 63 - i));
      __syncwarp();
      if (bug == 1 && t == 32) mbarrier_arrive(empty + s);
      if (bug != 1 && t < 34) mbarrier_arrive_at(empty + s, t - 32);
    }
  }
  if (bug == 3 && rank == 1 && t >= 32) mbarrier_wait(full, steps / STAGES & 1);
  if (bug != 2) sync_cluster();
}
extern "C" int run(const void *x, uint16_t *y, int steps, int ctas, int bug) {
  CUtensorMap map;
  int error = make_tensor_map(&map, {x, DSO_BF16, 3, {64, steps, 1}, {1, 64, 64}, {64, 1, 1}});
  if (error) return error;
  return launch_cluster(kernel, 2, dim3(ctas), dim3(64), STAGES * 1024 + 4 * 8, nullptr, map, y,
                        steps, bug);
}
"""


@pytest.mark.usefixtures("mode")
def test_ring_is_correct_in_every_order():
    x, y = randn(7, 64, dtype=torch.bfloat16), torch.zeros(7, 64, dtype=torch.bfloat16)
    assert simulate(RING).run(pointer(x), pointer(y), 7, 0) == 0
    assert torch.equal(y, x.flip(1))


@pytest.mark.parametrize("bug", [1, 2], ids=["漏等 mbarrier", "没读完就覆盖"])
def test_planted_race_changes_the_result(monkeypatch, bug):
    x, wrong = randn(7, 64, dtype=torch.bfloat16), 0
    for order, timing in MODES:
        monkeypatch.setenv("DSO_HOST_ORDER", order)
        monkeypatch.setenv("DSO_HOST_ASYNC", timing)
        y = torch.zeros(7, 64, dtype=torch.bfloat16)
        code = simulate(RING).run(pointer(x), pointer(y), 7, bug)
        wrong += code != 0 or not torch.equal(y, x.flip(1))
    assert wrong > 0


@pytest.mark.usefixtures("mode")
@pytest.mark.parametrize(
    "bug, reason",
    [(3, "死锁"), (4, "字节"), (5, "128 字节"), (6, "没有初始化")],
    ids=["字节多报", "字节少报", "没对齐的框", "没初始化的 mbarrier"],
)
def test_planted_fault_is_reported(bug, reason):
    x, y = randn(7, 64, dtype=torch.bfloat16), torch.zeros(7, 64, dtype=torch.bfloat16)
    library = simulate(RING)
    assert library.run(pointer(x), pointer(y), 7, bug) == FAILED
    assert reason in library.dso_host_failure().decode()


def clustered(bug=0, ctas=4):
    """(返回码, 各 CTA 的结果, 应得的)。"""
    x, y = randn(8, 64, dtype=torch.bfloat16), torch.zeros(ctas, 8, 64, dtype=torch.bfloat16)
    code = simulate(CLUSTER).run(pointer(x), pointer(y), 8, ctas, bug)
    return code, y, x.flip(1).expand_as(y)


@pytest.mark.usefixtures("mode")
def test_multicast_is_correct_in_every_order():
    code, got, want = clustered()
    assert code == 0 and torch.equal(got, want)


@pytest.mark.parametrize("bug", [1, 4], ids=["不等对方放行", "对方还没有初始化"])
def test_planted_race_in_a_cluster_is_found(monkeypatch, bug):
    wrong = 0
    for order, timing in MODES:
        monkeypatch.setenv("DSO_HOST_ORDER", order)
        monkeypatch.setenv("DSO_HOST_ASYNC", timing)
        code, got, want = clustered(bug)
        wrong += code != 0 or not torch.equal(got, want)
    assert wrong > 0


@pytest.mark.usefixtures("mode")
@pytest.mark.parametrize(
    "bug, reason",
    [(2, "退出"), (3, "96 个到了 cluster"), (5, "已经退出"), (6, "没有这个 CTA")],
    ids=["最后没有屏障", "死锁", "先退出的线程", "没有的 CTA"],
)
def test_planted_fault_in_a_cluster_is_reported(bug, reason):
    assert clustered(bug)[0] == FAILED
    assert reason in simulate(CLUSTER).dso_host_failure().decode()


def test_a_grid_is_whole_clusters():
    assert clustered(ctas=3)[0] == FAILED
    assert "cluster" in simulate(CLUSTER).dso_host_failure().decode()


def copied(bug=0):
    """(返回码, 核的结果, 应得的)。"""
    x, y = randn(5, 256, dtype=torch.bfloat16), torch.zeros(5, 256, dtype=torch.bfloat16)
    return simulate(COPIES).run(pointer(x), pointer(y), 5, bug), y, x.flip(1)


@pytest.mark.usefixtures("mode")
def test_copies_arrive_on_the_barrier():
    code, got, want = copied()
    assert code == 0 and torch.equal(got, want)
    assert copied(3)[0] == FAILED
    assert "死锁" in simulate(COPIES).dso_host_failure().decode()


@pytest.mark.parametrize("bug", [1, 2], ids=["先到达再拷", "不等"])
def test_copies_that_are_not_waited_for(monkeypatch, bug):
    monkeypatch.setenv("DSO_HOST_ASYNC", "lazy")
    code, got, want = copied(bug)
    assert code != 0 or not torch.equal(got, want)


def bulk(bug=0):
    """(返回码, 核的结果, 应得的)。"""
    x, y = torch.arange(136, dtype=torch.int16), torch.zeros(64, dtype=torch.int32)
    want = x[:128].view(torch.int32).clone()
    want[33::2] = 0
    return simulate(BULK).run(pointer(x), pointer(y), bug), y, want


@pytest.mark.usefixtures("mode")
def test_bulk_copies_arrive_on_the_barrier():
    code, got, want = bulk()
    assert code == 0 and torch.equal(got, want)


@pytest.mark.parametrize(
    "bug, reason", [(1, "对齐"), (2, "对齐"), (3, "之外"), (4, "死锁"), (5, "对齐")], ids=str
)
def test_faulty_bulk_copies_are_reported(bug, reason):
    assert bulk(bug)[0] == FAILED
    assert reason in simulate(BULK).dso_host_failure().decode()
