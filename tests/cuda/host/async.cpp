// 主机模拟的异步部分：推迟的拷贝、TMA、wgmma，mbarrier 与 cluster 里别的 CTA，两个通道的先后；约定见 sim.h。
#include <algorithm>
#include <cstring>

#include "state.h"

namespace cuda_host {
namespace {

const char *const GONE = "动了已经退出的 CTA 的共享内存";

WarpState &current_warp() {
  return state.cta->warp_states[static_cast<size_t>(state.current->linear / LANES)];
}

AsyncQueue &queue_of(Queue queue) {
  return queue == COPY_QUEUE ? state.current->copies : current_warp().products;
}

constexpr uint64_t BARRIER_MARK = 0x6d62617272696572;  // 写在 mbarrier 的 8 个字节里：看得出被覆盖

// 当前 CTA 的；找不到（没有初始化、被覆盖）时返回空。
Transaction *transaction_of(void *barrier) {
  Cta &cta = *state.cta;
  auto base = reinterpret_cast<uintptr_t>(cta.shared);
  auto found = cta.transactions.find(reinterpret_cast<uintptr_t>(barrier) - base);
  if (found == cta.transactions.end()) return nullptr;
  return std::memcmp(barrier, &BARRIER_MARK, sizeof BARRIER_MARK) == 0 ? &found->second : nullptr;
}

const char *const NO_BARRIER = "mbarrier 没有初始化，或者被覆盖了";

void end_phase_if_complete(Transaction &t) {
  if (t.pending == 0 && t.bytes < 0) note_failure("mbarrier 收到的字节比预告的多");
  if (t.pending != 0 || t.bytes != 0) return;
  t.pending = t.count;
  t.phase++;
}

// cluster 里的第 rank 个；不是自己时记下这个线程动过别处。
Cta &peer(int rank) {
  if (rank < 0 || rank >= state.cluster) fail("cluster 里没有这个 CTA");
  Cta &cta = state.ctas[static_cast<size_t>(rank)];
  if (&cta != state.cta) state.current->remote = true;
  return cta;
}

// 暂时当作在别的 CTA 里。
struct Inside {
  Cta *before = state.cta;
  explicit Inside(Cta &cta) { state.cta = &cta; }
  ~Inside() { state.cta = before; }
};

}  // namespace

// ---- 两个通道 ----

void wrote(size_t offset, int thread) { state.cta->proxy.write(offset, thread); }
void wrote_async(size_t offset) { state.cta->proxy.write_async(offset); }
void fence_proxy() { state.cta->proxy.fence(state.current->linear); }

uint64_t fence_of_warp() {
  const auto &all = state.cta->proxy.fenced;
  auto first = all.begin() + state.current->linear / LANES * LANES;
  return *std::min_element(first, all.end() - first < LANES ? all.end() : first + LANES);
}

void read_async(size_t offset, uint64_t fence) {
  if (!state.cta->proxy.sees(offset, fence))
    note_failure("wgmma 读到的是普通的写，中间没有 fence_proxy_async");
}

// ---- 推迟的动作 ----

void postpone(Queue queue, std::function<void()> action) {
  queue_of(queue).open.push_back(std::move(action));
}

void commit(Queue queue) {
  if (!state.is_lazy) return;
  AsyncQueue &mine = queue_of(queue);
  mine.committed.push_back(std::move(mine.open));
  mine.open.clear();
}

void wait_groups(Queue queue, int left) {
  auto &groups = queue_of(queue).committed;
  while (groups.size() > static_cast<size_t>(left)) {
    for (auto &action : groups.front()) action();
    groups.pop_front();
  }
  if (queue == MMA_QUEUE) current_warp().fenced = false;
}

void defer_global(std::function<void()> action) { defer_at(cluster_rank(), std::move(action)); }

void defer_at(int rank, std::function<void()> action) {
  Cta *to = &peer(rank);
  auto run = [to, action = std::move(action)] {
    Inside inside(*to);
    if (to->alive == 0) return note_failure(GONE);
    action();
  };
  if (!state.is_lazy) return run();
  state.pending.push_back(std::move(run));
}

bool wgmma_fenced(bool set) {
  WarpState &warp = current_warp();
  warp.fenced = warp.fenced || set;
  return warp.fenced;
}

// ---- mbarrier ----

void mbarrier_init(void *barrier, int count) {
  size_t at = shared_offset(barrier);
  if (at % 8 != 0 || at + 8 > state.shared_bytes)
    fail("mbarrier 没有对齐到 8 字节，或越出共享内存");
  std::memcpy(barrier, &BARRIER_MARK, sizeof BARRIER_MARK);
  state.cta->transactions[at] = Transaction{count, count, 0, 0};
}

void mbarrier_arrive(void *barrier, int64_t expected_bytes) {
  Transaction *t = transaction_of(barrier);
  if (!t) fail(NO_BARRIER);
  t->bytes += expected_bytes;
  t->pending--;
  end_phase_if_complete(*t);
}

void mbarrier_arrive_copies(void *barrier) {
  if (!transaction_of(barrier)) fail(NO_BARRIER);
  AsyncQueue &mine = queue_of(COPY_QUEUE);
  Actions copies;
  mine.committed.push_back(std::move(mine.open));
  for (Actions &group : mine.committed)
    for (auto &action : group) copies.push_back(std::move(action));
  mine = AsyncQueue{};
  defer_global([copies = std::move(copies), barrier] {
    for (const auto &action : copies) action();
    if (Transaction *t = transaction_of(barrier))
      t->pending--, end_phase_if_complete(*t);
    else
      note_failure(NO_BARRIER);
  });
}

void mbarrier_complete(void *barrier, int64_t bytes) {
  Transaction *t = transaction_of(barrier);
  if (!t) return note_failure(NO_BARRIER);
  t->bytes -= bytes;
  end_phase_if_complete(*t);
}

void mbarrier_wait(void *barrier, int parity) {
  Transaction *t = transaction_of(barrier);
  if (!t) fail(NO_BARRIER);
  wait_until([t, parity] { return t->phase % 2 != static_cast<unsigned>(parity); });
}

void mbarrier_arrive_at(int rank, void *barrier) {
  size_t at = shared_offset(barrier);
  Cta &to = peer(rank);
  if (to.alive == 0) fail(GONE);
  Inside inside(to);
  mbarrier_arrive(to.shared + at, 0);
}

}  // namespace cuda_host
