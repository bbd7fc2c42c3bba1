// 主机模拟的状态：线程（纤程）、线程块、cluster。只有 sim.cpp、async.cpp 引入。
#pragma once

#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <vector>

#include "context.h"
#include "sim.h"

namespace cuda_host {

constexpr size_t STACK_BYTES = 256 << 10;   // ASan 的栈帧大
constexpr size_t SHARED_LIMIT = 227 << 10;  // Hopper 每块的上限
constexpr int NAMED = 16, GROUP_WARPS = 4, MOST_CLUSTER = 8;
constexpr int REGISTERS = 65536;  // 一个 SM 的

using Actions = std::vector<std::function<void()>>;

struct AsyncQueue {
  Actions open;
  std::deque<Actions> committed;
};

struct Cta;

struct Fiber {
  Cta *cta = nullptr;
  Context context;
  std::unique_ptr<char[]> stack{new char[STACK_BYTES]};
  bool started = false, done = true;
  dim3 index;
  int linear = 0, registers = 0;
  unsigned cluster_turn = 0;
  bool reported = false;        // 到了 cluster 的屏障，还没有等
  bool remote = false;          // 最近一次到那里之后，动过别的 CTA 的共享内存
  bool waited = false;          // 走到过 grid_wait
  bool early = false;           // 声明过在它之前读
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

// 两个通道的先后：普通的写（看得见的：cp.async、stmatrix）要经过写的线程或读的 warp 的 fence.proxy.async，wgmma 才
// 看得见。16 字节一格。
struct Proxy {
  struct Written {
    uint64_t when = 0;  // 0：没有写过，或是 TMA 写的
    int thread = 0;
  };
  std::vector<Written> written;
  std::vector<uint64_t> fenced;  // 各线程最近一次
  uint64_t clock = 0;

  void reset(size_t bytes, int threads) {
    written.assign(bytes / 16 + 1, Written{});
    fenced.assign(static_cast<size_t>(threads), 0);
    clock = 0;
  }
  void write(size_t offset, int thread) { written[offset / 16] = {++clock, thread}; }
  void write_async(size_t offset) { written[offset / 16] = {}; }
  void fence(int thread) { fenced[static_cast<size_t>(thread)] = ++clock; }
  bool sees(size_t offset, uint64_t reader) const {
    const Written &w = written[offset / 16];
    return w.when <= reader || w.when < fenced[static_cast<size_t>(w.thread)];
  }
};

struct Cta {
  Proxy proxy;
  std::vector<std::unique_ptr<Fiber>> fibers;  // 反复使用，各有自己的栈
  std::vector<Meeting> warps, groups;
  std::vector<WarpState> warp_states;
  std::map<size_t, Transaction> transactions;  // 键是共享内存里的偏移
  Barrier barriers[NAMED];
  int alive = 0, spare_registers = 0;
  dim3 at;
  unsigned char *shared = nullptr;
};

enum class Order { FORWARD, REVERSE, RANDOM };

struct State {
  std::vector<Cta> ctas;  // 一个 cluster 的，同时运行；其中前 cluster 个
  Cta *cta = nullptr;     // 正在运行的线程（或推迟的动作）所在的
  Barrier cluster_barrier;
  Context scheduler;
  Fiber *current = nullptr;
  int count = 0, cluster = 1;
  dim3 grid, block;
  size_t shared_bytes = 0;
  const std::function<void()> *body = nullptr;
  std::deque<std::function<void()>> pending;
  bool is_lazy = false, failed = false;
  bool hasty[3] = {};  // 这个核与前两个核里，有没有线程在 grid_wait 之前放行
  Order order = Order::FORWARD;
  std::mt19937 random;
};

extern State state;

// 记下第一个原因；调度器看见 failed 就停下。
void note_failure(const char *why);

}  // namespace cuda_host
