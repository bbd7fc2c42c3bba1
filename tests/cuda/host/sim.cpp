// 主机模拟的调度：谁什么时候运行，在哪里等（异步的动作在 async.cpp）；约定见 sim.h。
#include "sim.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>

#include "state.h"

namespace cuda_host {
namespace {

std::mutex one_at_a_time;
std::string failure;
long conflict_count = 0, box_count = 0;

void fiber_loop() {
#if defined(DSO_HOST_ASAN)
  const void *bottom;
  size_t size;
  __sanitizer_finish_switch_fiber(nullptr, &bottom, &size);
  state.scheduler.bottom = bottom, state.scheduler.size = size;
#endif
  for (;;) {
    (*state.body)();
    state.current->done = true;
    switch_context(state.current->context, state.scheduler);
  }
}

void pause_here() { switch_context(state.current->context, state.scheduler); }

bool runnable(Fiber &fiber) {
  if (fiber.done) return false;
  if (!fiber.ready) return true;
  if (!fiber.ready()) return false;
  fiber.ready = nullptr;
  return true;
}

// 硬件上退出的线程不再算数，屏障可能碰巧放行；写成这样的核多半是错的，一律不许。
const char *const EXITED = "死锁：有的线程已经退出，别的还停在 __syncthreads 或 cluster 的屏障上";

void release_if_complete(Barrier &barrier) {
  if (barrier.want == 0 || barrier.here < barrier.want) return;
  barrier.here = 0, barrier.want = 0;
  barrier.turn++;
}

void run_fiber(Fiber &fiber) {
  state.current = &fiber, state.cta = fiber.cta;
  if (!fiber.started) start_context(fiber.context, fiber.stack.get(), STACK_BYTES, fiber_loop);
  fiber.started = true;
  switch_context(state.scheduler, fiber.context);
  state.current = nullptr;
  if (!fiber.done) return;
  fiber.cta->alive--;
  if (!fiber.waited) note_failure("有线程没有走到 grid_wait 就结束了");
  if (fiber.cta->barriers[0].here > 0 || state.cluster_barrier.here > 0) note_failure(EXITED);
  if (fiber.remote) note_failure("线程动过别的 CTA 的共享内存，没有再过 cluster 的屏障就退出");
}

// 至多 LANES 个的次序：线程、warp、CTA 都不会更多。
struct Ordering {
  int order[LANES], count;
  const int *begin() const { return order; }
  const int *end() const { return order + count; }
};

Ordering ordering(int count) {
  Ordering o{{}, count};
  for (int i = 0; i < count; i++) o.order[i] = state.order == Order::REVERSE ? count - 1 - i : i;
  if (state.order == Order::RANDOM) std::shuffle(o.order, o.order + count, state.random);
  return o;
}

// 推迟的动作里先执行第几个。
size_t next_pending() {
  size_t last = state.pending.size() - 1;
  if (state.order == Order::RANDOM) return state.random() % (last + 1);
  return state.order == Order::REVERSE ? last : 0;
}

// 一个 warp 一直运行到谁都不能继续；有进展返回 true。
bool run_warp(Cta &cta, int warp) {
  int first = warp * LANES, count = std::min(LANES, state.count - first);
  bool any = false;
  for (bool moved = true; moved && !state.failed;) {
    moved = false;
    for (int lane : ordering(count)) {
      Fiber &fiber = *cta.fibers[static_cast<size_t>(first + lane)];
      if (state.failed || !runnable(fiber)) continue;
      run_fiber(fiber);
      moved = any = true;
    }
  }
  return any;
}

// 一个 CTA 一直运行到谁都不能继续：几个 CTA 之间也错开得最远。
bool run_cta(Cta &cta) {
  int warps = static_cast<int>(cta.warps.size());
  bool any = false;
  for (bool moved = true; moved && !state.failed;) {
    moved = false;
    for (int warp : ordering(warps)) moved = run_warp(cta, warp) || moved;
    any = any || moved;
  }
  return any;
}

// 各线程停在哪里：从第一个还没有结束的 CTA 报起。
void describe_deadlock() {
  int waiting = 0, barrier = 0;
  const Cta *first = nullptr;
  for (int i = 0; i < state.cluster; i++) {
    const Cta &cta = state.ctas[static_cast<size_t>(i)];
    waiting += cta.alive;
    if (!first && cta.alive > 0) first = &cta;
    for (const Barrier &b : cta.barriers) barrier += b.here;
  }
  char text[240];
  std::snprintf(
      text, sizeof text,
      "死锁：块 (%u, %u, %u) 起还有 %d 个线程停着（%d 个在屏障上，%d 个到了 cluster 的屏障）",
      first->at.x, first->at.y, first->at.z, waiting, barrier, state.cluster_barrier.here);
  note_failure(text);
}

// 结束时不许还有没写完的 TMA。
void check_transactions() {
  if (!state.pending.empty()) note_failure("块结束时还有 TMA 没有写完");
  for (int i = 0; i < state.cluster; i++)
    for (const auto &entry : state.ctas[static_cast<size_t>(i)].transactions)
      if (entry.second.bytes != 0) note_failure("块结束时 mbarrier 的字节数对不上");
}

void start_cta(Cta &cta, dim3 at, int warps) {
  cta.warps.assign(static_cast<size_t>(warps), Meeting{});
  cta.groups.assign(static_cast<size_t>((warps + GROUP_WARPS - 1) / GROUP_WARPS), Meeting{});
  cta.warp_states.assign(static_cast<size_t>(warps), WarpState{});
  cta.transactions.clear();
  for (Barrier &barrier : cta.barriers) barrier = Barrier{};
  cta.alive = state.count, cta.spare_registers = 0, cta.at = at;
  std::memset(cta.shared, 0xff, state.shared_bytes);
  cta.proxy.reset(state.shared_bytes, state.count);
  for (int i = 0; i < state.count; i++) {
    Fiber &fiber = *cta.fibers[static_cast<size_t>(i)];
    fiber.cta = &cta, fiber.reported = fiber.remote = fiber.waited = fiber.early = false;
    fiber.done = false, fiber.ready = nullptr, fiber.linear = i;
    fiber.registers = REGISTERS / state.count / 8 * 8;  // 编译器至多给这么多（launch_bounds）
    fiber.copies = AsyncQueue{};
    auto n = static_cast<unsigned>(i);
    fiber.index = dim3(n % state.block.x, n / state.block.x % state.block.y,
                       n / (state.block.x * state.block.y));
  }
}

bool all_exited() {
  int alive = 0;
  for (int i = 0; i < state.cluster; i++) alive += state.ctas[static_cast<size_t>(i)].alive;
  return alive == 0;
}

// 从 at 起相邻的几个 CTA（一个 cluster）一起运行。
void run_cluster(dim3 at) {
  int warps = (state.count + LANES - 1) / LANES;
  state.cluster_barrier = Barrier{};
  state.pending.clear();
  for (int i = 0; i < state.cluster; i++)
    start_cta(state.ctas[static_cast<size_t>(i)], dim3(at.x + static_cast<unsigned>(i), at.y, at.z),
              warps);
  while (!all_exited() && !state.failed) {
    bool any = false;
    for (int i : ordering(state.cluster)) any = run_cta(state.ctas[static_cast<size_t>(i)]) || any;
    if (any || state.failed) continue;
    if (state.pending.empty()) return describe_deadlock();
    auto next = state.pending.begin() + static_cast<ptrdiff_t>(next_pending());
    auto action = std::move(*next);
    state.pending.erase(next);
    action();
  }
  check_transactions();
}

void read_environment() {
  const char *value = std::getenv("DSO_HOST_ORDER"), *async = std::getenv("DSO_HOST_ASYNC");
  std::string order = value ? value : "forward";
  state.order = order == "reverse" ? Order::REVERSE : Order::FORWARD;
  if (order.rfind("random", 0) == 0) {
    state.random.seed(static_cast<unsigned>(std::atoi(order.c_str() + 7)));
    state.order = Order::RANDOM;
  }
  state.is_lazy = async && std::string(async) == "lazy";
}

// 中断过的块留下的纤程停在半路：丢掉它们的栈，下次重来。
void drop_unfinished() {
  for (Cta &cta : state.ctas)
    for (auto &fiber : cta.fibers)
      if (!fiber->done) fiber = std::make_unique<Fiber>();
}

void *aligned_shared(size_t bytes) {
  void *memory = nullptr;
  // 恰好这么大：ASan 看得见越界的一个字节。
  if (posix_memalign(&memory, 1024, bytes ? bytes : 1) != 0) std::abort();
  return memory;
}

}  // namespace

State state;

void note_failure(const char *why) {
  if (!state.failed) failure = why;
  state.failed = true;
}

int run_grid(dim3 grid, dim3 threads, size_t shared_bytes, int cluster,
             const std::function<void()> &body) {
  std::lock_guard<std::mutex> lock(one_at_a_time);
  failure.clear();
  read_environment();
  state.failed = false;
  state.hasty[2] = state.hasty[1], state.hasty[1] = state.hasty[0], state.hasty[0] = false;
  state.grid = grid, state.block = threads, state.body = &body, state.cluster = cluster;
  state.count = static_cast<int>(threads.x * threads.y * threads.z);
  auto width = static_cast<unsigned>(cluster);
  if (shared_bytes > SHARED_LIMIT || state.count > 1024 || state.count == 0 || cluster < 1 ||
      cluster > MOST_CLUSTER || grid.x % width != 0) {
    failure =
        "启动参数超出硬件的上限（动态共享内存 227 KiB、1024 个线程、整数个至多 8 块的 cluster）";
    return 719;
  }
  if (state.ctas.size() < width) state.ctas.resize(width);
  state.shared_bytes = shared_bytes;
  for (unsigned i = 0; i < width; i++) {
    Cta &cta = state.ctas[i];
    while (cta.fibers.size() < static_cast<size_t>(state.count))
      cta.fibers.push_back(std::make_unique<Fiber>());
    cta.shared = static_cast<unsigned char *>(aligned_shared(shared_bytes));
  }
  for (unsigned z = 0; z < grid.z && !state.failed; z++)
    for (unsigned y = 0; y < grid.y && !state.failed; y++)
      for (unsigned x = 0; x < grid.x && !state.failed; x += width) run_cluster(dim3(x, y, z));
  for (unsigned i = 0; i < width; i++) std::free(state.ctas[i].shared);
  drop_unfinished();
  if (state.failed) std::fprintf(stderr, "CUDA 主机模拟：%s\n", failure.c_str());
  return state.failed ? 719 : 0;
}

const char *last_failure() { return failure.c_str(); }
const dim3 &thread_index() { return state.current->index; }
const dim3 &block_index() { return state.cta->at; }
const dim3 &block_size() { return state.block; }
const dim3 &grid_size() { return state.grid; }
unsigned char *shared_memory() { return state.cta->shared; }
size_t shared_size() { return state.shared_bytes; }
bool lazy() { return state.is_lazy; }

void fail(const char *why) {
  note_failure(why);
  for (;;) pause_here();  // 调度器看见 failed 就不再回来
}

size_t shared_offset(const void *p) {
  auto at = reinterpret_cast<uintptr_t>(p), base = reinterpret_cast<uintptr_t>(state.cta->shared);
  if (at < base || at > base + state.shared_bytes) fail("地址不在动态共享内存里");
  return at - base;
}

int thread_linear() { return state.current->linear; }
void wait_until(const std::function<bool()> &ready) {
  if (ready()) return;
  state.current->ready = ready;
  pause_here();
}

void wait_grid() { state.current->waited = true; }

void release_grid() { state.hasty[0] = state.hasty[0] || !state.current->waited; }

void touch_settled() {
  if (!state.current->waited && state.hasty[1] && state.hasty[2])
    fail("grid_wait 之前读，而前两个核都在 grid_wait 之前放行");
}

void read_early() {
  if (!state.current->waited && state.hasty[1]) fail("前一个核在 grid_wait 之前放行，不能先读");
  state.current->early = true;
}

void touch_global() {
  if (!state.current->waited && !state.current->early) fail("grid_wait 之前碰了全局内存");
}

void set_registers(int count, bool increase) {
  Fiber &me = *state.current;
  int &spare = me.cta->spare_registers;
  if (increase != (count > me.registers)) fail("setmaxnreg 的方向不对");
  int more = count - me.registers;
  wait_until([&spare, more] { return spare >= more; });
  spare -= more, me.registers = count;
}

void collective(const char *name, void *record, int warps, Act act) {
  int me = state.current->linear, width = LANES * warps;
  auto &meetings = warps == 1 ? state.cta->warps : state.cta->groups;
  Meeting &meeting = meetings[static_cast<size_t>(me / width)];
  if (meeting.here == 0) meeting.name = name;
  if (std::strcmp(meeting.name, name) != 0) fail("同一个 warp 的线程走到了不同的集体操作");
  meeting.records[me % width] = record;
  if (++meeting.here == width) {
    meeting.here = 0;
    act(meeting.records, width);
    meeting.turn++;
    return;
  }
  unsigned turn = meeting.turn;
  wait_until([&meeting, turn] { return meeting.turn != turn; });
}

void named_barrier(int id, int threads, bool wait) {
  if (id < 0 || id >= NAMED) fail("没有这个具名屏障");
  Barrier &barrier = state.cta->barriers[id];
  if (barrier.want != 0 && id != 0 && barrier.want != threads) fail("具名屏障的线程数不一致");
  if (id == 0 && state.cta->alive < state.count) fail(EXITED);
  barrier.want = id == 0 ? state.count : threads;
  unsigned turn = barrier.turn;
  barrier.here++;
  release_if_complete(barrier);
  if (wait) wait_until([&barrier, turn] { return barrier.turn != turn; });
}

// ---- cluster ----

int cluster_rank() { return static_cast<int>(state.cta - state.ctas.data()); }

void cluster_arrive() {
  Fiber &me = *state.current;
  if (me.reported) fail("到了 cluster 的屏障，没有等又到一次");
  for (int i = 0; i < state.cluster; i++)
    if (state.ctas[static_cast<size_t>(i)].alive < state.count) fail(EXITED);
  me.reported = true, me.remote = false;
  me.cluster_turn = state.cluster_barrier.turn;
  state.cluster_barrier.want = state.count * state.cluster;
  state.cluster_barrier.here++;
  release_if_complete(state.cluster_barrier);
}

void cluster_wait() {
  Fiber &me = *state.current;
  if (!me.reported) fail("没有到 cluster 的屏障就等");
  wait_until([&me] { return state.cluster_barrier.turn != me.cluster_turn; });
  me.reported = false;
}

void count_conflicts(const void *const *rows, int count) {
  unsigned used = 0;  // 16 字节的 8 个库组
  for (int i = 0; i < count; i++) {
    unsigned bank = 1u << (reinterpret_cast<uintptr_t>(rows[i]) / 16 % 8);
    conflict_count += (used & bank) != 0;
    used |= bank;
  }
}

void count_box() { box_count++; }
long conflicts() { return conflict_count; }
long boxes() { return box_count; }
void reset_counts() { conflict_count = box_count = 0; }

}  // namespace cuda_host

extern "C" {
const char *dso_host_failure() { return cuda_host::last_failure(); }
long dso_host_conflicts() { return cuda_host::conflicts(); }
long dso_host_boxes() { return cuda_host::boxes(); }
void dso_host_reset_counts() { cuda_host::reset_counts(); }
}
