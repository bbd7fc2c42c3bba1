// 启动核与查询设备。主机模拟（tests/cuda/host）有同名的一份，所以用 <launch.cuh> 引入。
#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <cstdlib>

namespace dso {

// ---- 提前启动（programmatic dependent launch） ----
//
// 解码的一步是几十个几微秒的核，核与核之间的空隙占去一半的时间。sm_90 起，带这个属性的核在前一个核的各块都退出
// （或都走到 grid_release）时就启动，启动、分配块、各块的准备与前一个核的末尾重叠，停在 grid_wait，等前一个核结束。
//
// 为什么对：每个线程都先 grid_wait 才碰全局内存，也才结束。所以核 n 结束时，它的 grid_wait 已等到核 n - 1 结束；依次
// 类推，过了 grid_wait 就是流里前面的全部结束了，与普通的启动无异：
//   - 读到的都是写完的；写也在其后，所以 torch 的分配器按流的次序把一块内存交给后面的核，前面的读者不会还在读；
//   - 权重也算：训练时它刚由优化器的核写过；
//   - 别人的核（cuBLAS、torch）没有这个属性，要等我们的核整个结束；我们在它之后的，同样由 grid_wait 等它整个结束。
// grid_wait 之前可以算地址、初始化共享内存与 mbarrier、请 L2 先取权重（prefetch_l2 不读进来，写了也不会读到旧的）。
// 核前的主机操作（memset、拷贝）之后是普通的依赖，所以两个核之间尽量不放。
//
// grid_release 放在短的、受限于延迟的核的开头：它们占的位置少，后一个核的块挤得进来。占满整张卡的（矩阵乘、注意力、
// 专家）不放：末尾时各 SM 陆续空出来，后一个核的块会挤在先空的几个 SM 上，受限于带宽的核因此更慢。行极少的投影后面多是短核，
// 也放。词元少的专家也放，在 grid_wait 之后：于是紧跟着的那个核启动时，更早的核都已结束，它可以先读权重、下标，再 grid_wait
// 等这一个（moe_small.cu 算 o 的一步）。
//
// 一般地，前两个核里有一个不在 grid_wait 之前放行（没有 grid_release 的也是）：核 n 启动时，核 n - 1 的各块都已启动，核
// n - 2 的都已放行或退出，所以更早的都结束了。这两个核都不写的，可以在 grid_wait 之前读（cp_async_16_early；mla_heads.cu
// 的 W_UV）；主机模拟核对前一半。
//
// 更进一步，前一个核若在 grid_wait 之后才放行（或不放行），核 n 启动时更早的核都已结束：只要不是前一个核写的，都可以先读。解码
// （mla_decode_sm90.cu）前面是吸收，只写 q_abs：缓存与 spans 不必等它。这样的线程先 read_early() 声明；普通的读要绕过 L1
// （load_l2）。

// 代码里有没有 sm_90 的：没有就没有 grid_wait，不能提前启动。更新的卡用的也是这一份（build_native.py 只留它的 PTX）。
constexpr bool has_grid_wait() {
  for (int arch : {__CUDA_ARCH_LIST__})
    if (arch >= 900) return true;
  return false;
}

// 当前设备能不能提前启动；录进 CUDA graph 要 12.3 起的驱动与运行库。每张卡问一次：几个线程同时问，答案也相同。
inline bool starts_early() {
  constexpr int MOST = 64;
  static std::atomic<signed char> known[MOST];  // 0 还没问过
  int index = 0, major = 0, driver = 0, runtime = 0;
  if (!has_grid_wait() || cudaGetDevice(&index) != cudaSuccess || index >= MOST) return false;
  signed char answer = known[index].load(std::memory_order_relaxed);
  if (answer != 0) return answer > 0;
  if (cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index) != cudaSuccess ||
      cudaDriverGetVersion(&driver) != cudaSuccess ||
      cudaRuntimeGetVersion(&runtime) != cudaSuccess)
    return false;
  bool can = major >= 9 && driver >= 12030 && runtime >= 12030;
  known[index].store(can ? 1 : -1, std::memory_order_relaxed);
  return can;
}

// DEEPSEEK_OPT_CUDA_PDL=0 关掉（比较快慢、查错时）；当作较早的卡（DEEPSEEK_OPT_CUDA_MAJOR）时也关掉。
inline bool wants_early() {
  const char *wanted = std::getenv("DEEPSEEK_OPT_CUDA_PDL");
  const char *forced = std::getenv("DEEPSEEK_OPT_CUDA_MAJOR");
  return !(wanted && std::atoi(wanted) == 0) && !(forced && std::atoi(forced) < 9);
}

// 动态共享内存超过 48 KiB 时先放开这个核的上限。
template <class... P>
cudaError_t allow_shared(void (*kernel)(P...), size_t bytes) {
  if (bytes <= (48 << 10)) return cudaSuccess;
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                              static_cast<int>(bytes));
}

// 片上的存储全部当作共享内存：两个核要同在一个 SM 上，合起来才放得下。
template <class... P>
cudaError_t prefer_shared(void (*kernel)(P...)) {
  return cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                              cudaSharedmemCarveoutMaxShared);
}

// 排进 stream 后立即返回；x 一维上相邻的 cluster 块是一个 cluster（1：没有），grid.x 是它的倍数。核都要 grid_wait。
template <class... P, class... A>
cudaError_t launch_cluster(void (*kernel)(P...), int cluster, dim3 grid, dim3 block,
                           size_t shared_bytes, cudaStream_t stream, A... args) {
  cudaError_t error = allow_shared(kernel, shared_bytes);
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute attributes[2] = {};
  unsigned count = 0;
  if (wants_early() && starts_early()) {
    attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[count++].val.programmaticStreamSerializationAllowed = 1;
  }
  if (cluster > 1) {
    attributes[count].id = cudaLaunchAttributeClusterDimension;
    attributes[count++].val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = grid, config.blockDim = block, config.dynamicSmemBytes = shared_bytes;
  config.stream = stream, config.attrs = attributes, config.numAttrs = count;
  error = cudaLaunchKernelEx(&config, kernel, args...);
  cudaError_t sticky = cudaGetLastError();
  return error != cudaSuccess ? error : sticky;
}

template <class... P, class... A>
cudaError_t launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes,
                   cudaStream_t stream, A... args) {
  return launch_cluster(kernel, 1, grid, block, shared_bytes, stream, args...);
}

// 当前设备：SM 数、每块共享内存的上限（字节）、计算能力的主版本（DEEPSEEK_OPT_CUDA_MAJOR 可以当作较早的：测试与
// 比较 sm_80 的路径）。
struct Device {
  int sms, shared_limit, major;
};

inline cudaError_t device_of(Device *device) {
  int index = 0;
  cudaError_t error = cudaGetDevice(&index);
  const cudaDeviceAttr wanted[] = {cudaDevAttrMultiProcessorCount,
                                   cudaDevAttrMaxSharedMemoryPerBlockOptin,
                                   cudaDevAttrComputeCapabilityMajor};
  int *found[] = {&device->sms, &device->shared_limit, &device->major};
  for (int i = 0; i < 3 && error == cudaSuccess; i++)
    error = cudaDeviceGetAttribute(found[i], wanted[i], index);
  const char *forced = std::getenv("DEEPSEEK_OPT_CUDA_MAJOR");
  if (forced && std::atoi(forced) < device->major) device->major = std::atoi(forced);
  return error;
}

}  // namespace dso
