// 主机模拟的调度器；约定见 sim.h。
#include "sim.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace cuda_host {
namespace {

constexpr size_t STACK_BYTES = 256 << 10;   // ASan 的栈帧大
constexpr size_t SHARED_LIMIT = 227 << 10;  // Hopper 每块的上限
constexpr int NAMED = 16, GROUP_WARPS = 4;
constexpr int REGISTERS = 65536;  // 一个 SM 的

// ---- 上下文切换：x86-64 自己写（swapcontext 每次要两个系统调用），别处用 ucontext ----

struct Context {
#if defined(__x86_64__)
  void *stack_pointer = nullptr;
#else
  ucontext_t context;
#endif
  // ASan 要知道每个栈在哪里。
  void *fake_stack = nullptr;
  const void *bottom = nullptr;
  size_t size = 0;
};

#if defined(__x86_64__)
extern "C" void dso_host_switch(void **from, void *to);
asm(R"(
.text
.type dso_host_switch, @function
dso_host_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size dso_host_switch, .-dso_host_switch
)");
#endif

void switch_context(Context &from, Context &to) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&from.fake_stack, to.bottom, to.size);
#endif
#if defined(__x86_64__)
  dso_host_switch(&from.stack_pointer, to.stack_pointer);
#else
  swapcontext(&from.context, &to.context);
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#endif
}

using Actions = std::vector<std::function<void()>>;

struct AsyncQueue {
  Actions open;
  std::deque<Actions> committed;
};

struct Fiber {
  Context context;
  std::unique_ptr<char[]> stack{new char[STACK_BYTES]};
  bool started = false, done = true, waited = false;  // waited：走到过 grid_wait
  dim3 index;
  int linear = 0, registers = 0;
  std::function<bool()> ready;  // 空的：可以运行
  AsyncQueue copies;
};

struct Meeting {  // 一个 warp 或 4 个 warp 的集体操作
  void *records[LANES * GROUP_WARPS] = {};
  int here = 0;
  unsigned turn = 0;
  const char *name = nullptr;
};

struct Barrier {
  int here = 0, want = 0;
  unsigned turn = 0;
};

struct Transaction {  // mbarrier 的一相
  int count = 0, pending = 0;
  int64_t bytes = 0;
  unsigned phase = 0;
};

struct WarpState {
  AsyncQueue products;
  bool fenced = false;
};

struct State {
  std::vector<std::unique_ptr<Fiber>> fibers;  // 反复使用，各有自己的栈
  std::vector<Meeting> warps, groups;
  std::vector<WarpState> warp_states;
  std::map<size_t, Transaction> transactions;  // 键是共享内存里的偏移
  Barrier barriers[NAMED];
  Context scheduler;
  Fiber *current = nullptr;
  int count = 0, alive = 0, spare_registers = 0;
  dim3 grid, block, block_at;
  unsigned char *shared = nullptr;
  size_t shared_bytes = 0;
  const std::function<void()> *body = nullptr;
  std::deque<std::function<void()>> pending;
  bool is_lazy = false, failed = false;
  std::string order = "forward";
  std::mt19937 random;
};

State state;
std::mutex one_at_a_time;
std::string failure;
long conflict_count = 0;

void fiber_loop() {
#if defined(__SANITIZE_ADDRESS__)
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

void start(Fiber &fiber) {
  fiber.context.bottom = fiber.stack.get(), fiber.context.size = STACK_BYTES;
#if defined(__x86_64__)
  auto top = reinterpret_cast<uintptr_t>(fiber.stack.get() + STACK_BYTES) & ~uintptr_t{15};
  auto *frame = reinterpret_cast<void **>(top) - 8;  // 6 个寄存器、返回地址、对齐
  std::memset(frame, 0, 8 * sizeof(void *));
  frame[6] = reinterpret_cast<void *>(fiber_loop);
  fiber.context.stack_pointer = frame;
#else
  getcontext(&fiber.context.context);
  fiber.context.context.uc_stack.ss_sp = fiber.stack.get();
  fiber.context.context.uc_stack.ss_size = STACK_BYTES;
  makecontext(&fiber.context.context, fiber_loop, 0);
#endif
  fiber.started = true;
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
const char *const EXITED = "死锁：有的线程已经退出，别的还停在 __syncthreads";

void note_failure(const char *why) {
  if (!state.failed) failure = why;
  state.failed = true;
}

void release_if_complete(Barrier &barrier) {
  if (barrier.want == 0 || barrier.here < barrier.want) return;
  barrier.here = 0, barrier.want = 0;
  barrier.turn++;
}

void run_fiber(Fiber &fiber) {
  state.current = &fiber;
  if (!fiber.started) start(fiber);
  switch_context(state.scheduler, fiber.context);
  state.current = nullptr;
  if (!fiber.done) return;
  state.alive--;
  if (!fiber.waited) note_failure("有线程没有走到 grid_wait 就结束了");
  if (state.barriers[0].here > 0) note_failure(EXITED);
}

std::vector<int> ordering(int count) {
  std::vector<int> order(static_cast<size_t>(count));
  for (int i = 0; i < count; i++) order[static_cast<size_t>(i)] = i;
  if (state.order == "reverse") std::reverse(order.begin(), order.end());
  if (state.order == "random") std::shuffle(order.begin(), order.end(), state.random);
  return order;
}

// 一个 warp 一直运行到谁都不能继续；有进展返回 true。
bool run_warp(int warp) {
  int first = warp * LANES, count = std::min(LANES, state.count - first);
  bool any = false;
  for (bool moved = true; moved && !state.failed;) {
    moved = false;
    for (int lane : ordering(count)) {
      Fiber &fiber = *state.fibers[static_cast<size_t>(first + lane)];
      if (state.failed || !runnable(fiber)) continue;
      run_fiber(fiber);
      moved = any = true;
    }
  }
  return any;
}

void describe_deadlock() {
  int waiting = 0, barrier = 0;
  for (int i = 0; i < state.count; i++) waiting += !state.fibers[static_cast<size_t>(i)]->done;
  for (const Barrier &b : state.barriers) barrier += b.here;
  char text[200];
  std::snprintf(text, sizeof text, "死锁：块 (%u, %u, %u) 还有 %d 个线程停着（%d 个在屏障上）",
                state.block_at.x, state.block_at.y, state.block_at.z, waiting, barrier);
  failure = text;
  state.failed = true;
}

// 块结束时不许还有没写完的 TMA。
void check_transactions() {
  if (!state.pending.empty()) note_failure("块结束时还有 TMA 没有写完");
  for (const auto &entry : state.transactions)
    if (entry.second.bytes != 0) note_failure("块结束时 mbarrier 的字节数对不上");
}

void run_block() {
  int warps = (state.count + LANES - 1) / LANES;
  state.warps.assign(static_cast<size_t>(warps), Meeting{});
  state.groups.assign(static_cast<size_t>((warps + GROUP_WARPS - 1) / GROUP_WARPS), Meeting{});
  state.warp_states.assign(static_cast<size_t>(warps), WarpState{});
  state.transactions.clear();
  for (Barrier &barrier : state.barriers) barrier = Barrier{};
  state.alive = state.count;
  state.spare_registers = 0;
  state.pending.clear();
  std::memset(state.shared, 0xff, state.shared_bytes);
  for (int i = 0; i < state.count; i++) {
    Fiber &fiber = *state.fibers[static_cast<size_t>(i)];
    fiber.done = fiber.waited = false, fiber.ready = nullptr, fiber.linear = i;
    fiber.registers = REGISTERS / state.count / 8 * 8;  // 编译器至多给这么多（launch_bounds）
    fiber.copies = AsyncQueue{};
    auto n = static_cast<unsigned>(i);
    fiber.index = dim3(n % state.block.x, n / state.block.x % state.block.y,
                       n / (state.block.x * state.block.y));
  }
  while (state.alive > 0 && !state.failed) {
    bool any = false;
    for (int warp : ordering(warps)) any = run_warp(warp) || any;
    if (any || state.failed) continue;
    if (state.pending.empty()) {
      describe_deadlock();
      return;
    }
    auto next = state.pending.begin() + ordering(static_cast<int>(state.pending.size()))[0];
    auto action = std::move(*next);
    state.pending.erase(next);
    action();
  }
  check_transactions();
}

void read_environment() {
  const char *order = std::getenv("DSO_HOST_ORDER"), *async = std::getenv("DSO_HOST_ASYNC");
  state.order = order ? order : "forward";
  if (state.order.rfind("random", 0) == 0) {
    state.random.seed(static_cast<unsigned>(std::atoi(state.order.c_str() + 7)));
    state.order = "random";
  }
  state.is_lazy = async && std::string(async) == "lazy";
}

// 中断过的块留下的纤程停在半路：丢掉它们的栈，下次重来。
void drop_unfinished() {
  for (auto &fiber : state.fibers)
    if (!fiber->done) fiber = std::make_unique<Fiber>();
}

WarpState &current_warp() {
  return state.warp_states[static_cast<size_t>(state.current->linear / LANES)];
}

AsyncQueue &queue_of(Queue queue) {
  return queue == COPY_QUEUE ? state.current->copies : current_warp().products;
}

constexpr uint64_t BARRIER_MARK = 0x6d62617272696572;  // 写在 mbarrier 的 8 个字节里：看得出被覆盖

// 找不到（没有初始化、被覆盖）时返回空。
Transaction *transaction_of(void *barrier) {
  auto base = reinterpret_cast<uintptr_t>(state.shared);
  auto found = state.transactions.find(reinterpret_cast<uintptr_t>(barrier) - base);
  if (found == state.transactions.end()) return nullptr;
  return std::memcmp(barrier, &BARRIER_MARK, sizeof BARRIER_MARK) == 0 ? &found->second : nullptr;
}

const char *const NO_BARRIER = "mbarrier 没有初始化，或者被覆盖了";

void end_phase_if_complete(Transaction &t) {
  if (t.pending == 0 && t.bytes < 0) note_failure("mbarrier 收到的字节比预告的多");
  if (t.pending != 0 || t.bytes != 0) return;
  t.pending = t.count;
  t.phase++;
}

void *aligned_shared(size_t bytes) {
  void *memory = nullptr;
  // 恰好这么大：ASan 看得见越界的一个字节。
  if (posix_memalign(&memory, 1024, bytes ? bytes : 1) != 0) std::abort();
  return memory;
}

}  // namespace

int run_grid(dim3 grid, dim3 threads, size_t shared_bytes, const std::function<void()> &body) {
  std::lock_guard<std::mutex> lock(one_at_a_time);
  failure.clear();
  read_environment();
  state.failed = false;
  state.grid = grid, state.block = threads, state.body = &body;
  state.count = static_cast<int>(threads.x * threads.y * threads.z);
  if (shared_bytes > SHARED_LIMIT || state.count > 1024 || state.count == 0) {
    failure = "启动参数超出硬件的上限（动态共享内存 227 KiB、1024 个线程）";
    return 719;
  }
  while (state.fibers.size() < static_cast<size_t>(state.count))
    state.fibers.push_back(std::make_unique<Fiber>());
  state.shared_bytes = shared_bytes;
  state.shared = static_cast<unsigned char *>(aligned_shared(shared_bytes));
  for (unsigned z = 0; z < grid.z && !state.failed; z++)
    for (unsigned y = 0; y < grid.y && !state.failed; y++)
      for (unsigned x = 0; x < grid.x && !state.failed; x++) {
        state.block_at = dim3(x, y, z);
        run_block();
      }
  std::free(state.shared);
  drop_unfinished();
  if (state.failed) std::fprintf(stderr, "CUDA 主机模拟：%s\n", failure.c_str());
  return state.failed ? 719 : 0;
}

const char *last_failure() { return failure.c_str(); }
const dim3 &thread_index() { return state.current->index; }
const dim3 &block_index() { return state.block_at; }
const dim3 &block_size() { return state.block; }
const dim3 &grid_size() { return state.grid; }
unsigned char *shared_memory() { return state.shared; }
size_t shared_size() { return state.shared_bytes; }
bool lazy() { return state.is_lazy; }

void fail(const char *why) {
  note_failure(why);
  for (;;) pause_here();  // 调度器看见 failed 就不再回来
}

size_t shared_offset(const void *p) {
  auto at = reinterpret_cast<uintptr_t>(p), base = reinterpret_cast<uintptr_t>(state.shared);
  if (at < base || at > base + state.shared_bytes) fail("地址不在动态共享内存里");
  return at - base;
}

void wait_until(const std::function<bool()> &ready) {
  if (ready()) return;
  state.current->ready = ready;
  pause_here();
}

void wait_grid() { state.current->waited = true; }

void touch_global() {
  if (!state.current->waited) fail("grid_wait 之前碰了全局内存");
}

void set_registers(int count, bool increase) {
  Fiber &me = *state.current;
  if (increase != (count > me.registers)) fail("setmaxnreg 的方向不对");
  int more = count - me.registers;
  wait_until([more] { return state.spare_registers >= more; });
  state.spare_registers -= more, me.registers = count;
}

void collective(const char *name, void *record, int warps, Act act) {
  int me = state.current->linear, width = LANES * warps;
  auto &meetings = warps == 1 ? state.warps : state.groups;
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
  Barrier &barrier = state.barriers[id];
  if (barrier.want != 0 && id != 0 && barrier.want != threads) fail("具名屏障的线程数不一致");
  if (id == 0 && state.alive < state.count) fail(EXITED);
  barrier.want = id == 0 ? state.count : threads;
  unsigned turn = barrier.turn;
  barrier.here++;
  release_if_complete(barrier);
  if (wait) wait_until([&barrier, turn] { return barrier.turn != turn; });
}

void defer(Queue queue, std::function<void()> action) {
  if (!state.is_lazy) return action();
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

void defer_global(std::function<void()> action) {
  if (!state.is_lazy) return action();
  state.pending.push_back(std::move(action));
}

bool wgmma_fenced(bool set) {
  WarpState &warp = current_warp();
  warp.fenced = warp.fenced || set;
  return warp.fenced;
}

void mbarrier_init(void *barrier, int count) {
  size_t at = shared_offset(barrier);
  if (at % 8 != 0 || at + 8 > state.shared_bytes)
    fail("mbarrier 没有对齐到 8 字节，或越出共享内存");
  std::memcpy(barrier, &BARRIER_MARK, sizeof BARRIER_MARK);
  state.transactions[at] = Transaction{count, count, 0, 0};
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

void count_conflicts(const void *const *rows, int count) {
  unsigned used = 0;  // 16 字节的 8 个库组
  for (int i = 0; i < count; i++) {
    unsigned bank = 1u << (reinterpret_cast<uintptr_t>(rows[i]) / 16 % 8);
    conflict_count += (used & bank) != 0;
    used |= bank;
  }
}

long conflicts() { return conflict_count; }
void reset_conflicts() { conflict_count = 0; }

}  // namespace cuda_host

extern "C" {
const char *dso_host_failure() { return cuda_host::last_failure(); }
long dso_host_conflicts() { return cuda_host::conflicts(); }
void dso_host_reset_conflicts() { cuda_host::reset_conflicts(); }
}
