// CUDA 的主机模拟：线程块、纤程、屏障、异步拷贝的调度。只用来在没有 GPU 的机器上检查核的算术与同步。
//
// 每个 CUDA 线程一个纤程，线程块（一个 cluster 的几块一起）逐个运行。同一个 warp 一直运行到它的全部线程都停在跨 warp
// 的同步上，才轮到下一个 warp，CTA 也是：互相错开得最远，漏掉的屏障最容易露出来。环境变量（每次启动时读）：
//   DSO_HOST_ORDER  forward（默认）、reverse 或 random:<种子>：warp 与线程的次序；
//   DSO_HOST_ASYNC  eager（默认，发出时就完成）或 lazy（拖到必须完成时）：cp.async、TMA、wgmma。
// 正确的核在任何次序下给出逐位相同的结果。动态共享内存在块开始时填满 0xff（NaN）：没写就读看得出来。
// 静态的 __shared__ 只有一份，所以 cluster 的核不许用。
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned a = 1, unsigned b = 1, unsigned c = 1) : x(a), y(b), z(c) {}
};

namespace cuda_host {

constexpr int LANES = 32;

// 运行一个网格，x 一维上每 cluster 块是一个 cluster；出错（死锁、不一致的集体操作、超出共享内存上限）时返回 719，
// 原因在 last_failure()。
int run_grid(dim3 grid, dim3 threads, size_t shared_bytes, int cluster,
             const std::function<void()> &body);
const char *last_failure();

// 当前线程的坐标。
const dim3 &thread_index();
const dim3 &block_index();
const dim3 &block_size();
const dim3 &grid_size();

unsigned char *shared_memory();  // 当前 CTA 的
size_t shared_size();
size_t shared_offset(const void *p);  // 越出动态共享内存就失败

bool lazy();
[[noreturn]] void fail(const char *why);

// 一个 warp（或连续 4 个 warp）的集体操作：每个线程交出一条记录，最后到的线程对全部记录执行 act。
// 记录在各线程自己的栈上，act 可以读写；name 不一致说明线程走到了不同的指令。
using Act = void (*)(void **records, int count);
void collective(const char *name, void *record, int warps, Act act);

// 具名屏障（0 即 __syncthreads）：threads 个线程都到了才放行；wait 为 false 时只报到。
void named_barrier(int id, int threads, bool wait);

// 推迟的动作：eager 时立即执行。按组提交，等待时执行；cp.async 的属于线程，wgmma 的属于 warp（由集体操作的
// act 调用，一个 warp 一次）。
enum Queue { COPY_QUEUE, MMA_QUEUE };
void postpone(Queue queue, std::function<void()> action);
template <class Action>
void defer(Queue queue, const Action &action) {
  if (lazy()) return postpone(queue, action);
  action();  // 不必存起来：不分配内存
}
void commit(Queue queue);
void wait_groups(Queue queue, int left);  // 至多留下 left 组没完成
// 不属于任何线程的（TMA）：lazy 时所有线程都停住才执行一个，次序也打乱。defer_at 的在 cluster 的第 rank 个 CTA
// 里执行（shared_memory() 是它的），那时它已经退出就是失败。
void defer_global(std::function<void()> action);
void defer_at(int rank, std::function<void()> action);

// cluster 里的第几个 CTA；全部线程的屏障（退出的线程不算到达：一律不许）。动过别的 CTA 的线程要再过一次屏障才许退出。
int cluster_rank();
void cluster_arrive();
void cluster_wait();

// 普通的通道写了（TMA 写了）这 16 字节；正在运行的线程的 fence.proxy.async；正在运行的 warp 里最早的一次；wgmma 读，
// fence 是它发出时的后者：中间没有隔着就失败。
void wrote(size_t offset, int thread);
void wrote_async(size_t offset);
void fence_proxy();
uint64_t fence_of_warp();
void read_async(size_t offset, uint64_t fence);
int thread_linear();  // 正在运行的线程在块里的编号

// 当前 warp 执行过 wgmma.fence 没有（之后的 wgmma.wait 把它清掉）；set 为真时记下。
bool wgmma_fenced(bool set);

// setmaxnreg：一个 CTA 的寄存器就是启动时分到的那些，增加的要等别的 warp 组让出来；不够就一直等（死锁）。
void set_registers(int count, bool increase);

// mbarrier：count 次到达、预告的字节都写完，一相才结束；字节数对不上是失败或死锁。
void mbarrier_init(void *barrier, int count);
void mbarrier_arrive(void *barrier, int64_t expected_bytes);
void mbarrier_arrive_at(int rank, void *barrier);  // 第 rank 个 CTA 里同样偏移的那个
// 当前线程此前的 cp.async 都写完时到达；从此与 TMA 一样由 defer_global 安排，wait_groups 不再等它们。
void mbarrier_arrive_copies(void *barrier);
void mbarrier_complete(void *barrier, int64_t bytes);  // 由 TMA 调用，不在任何线程里
void mbarrier_wait(void *barrier, int parity);

// 提前启动的规矩（cuda/launch.cuh）：每个线程结束之前都要 wait_grid；拷贝、TMA 等看得见的全局访存（touch_global）
// 也要在它之后。普通的读写看不见。touch_settled 可以在它之前，但前两个核里要有一个不在 grid_wait 之前放行；read_early
// 之后的 touch_global 也可以，但前一个核不能在 grid_wait 之前放行。
void wait_grid();
void release_grid();
void touch_global();
void touch_settled();
void read_early();

// 停到 ready() 为真。
void wait_until(const std::function<bool()> &ready);

// 测试用的计数：各种访存的共享内存库冲突次数（ldmatrix、stmatrix 的每 8 行），TMA 读了几个框（写到几处都算一次）。
void count_conflicts(const void *const *rows, int count);
void count_box();
long conflicts();
long boxes();
void reset_counts();

}  // namespace cuda_host
