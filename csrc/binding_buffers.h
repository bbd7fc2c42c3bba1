// 大块内存的回收池：见 binding_buffers.cpp。
#pragma once

#include <cstddef>
#include <cstdint>

#include "binding.h"

namespace dso {

// 至此用池，再小的用 torch 的分配器。
constexpr size_t kPooledBytes = size_t{1} << 22;

// 没有初始化的一块，至少 bytes 字节，2 MiB 对齐；分配不出时为 nullptr。
void *buffer_take(size_t bytes);
// 还给池；只接受 buffer_take 给出的指针。
void buffer_give(void *data);
// 形状为 sizes、dtype 与 like 相同的张量，没有初始化；大的从池里来，随张量释放而归还。
Tensor pooled_empty(const Tensor &like, const std::vector<int64_t> &sizes);
// 建议系统用 2 MiB 的页装 t（还没写过的部分）：权重按行读、一行半页时，页表的查找也是开销。只是提示，失败无妨。
void advise_huge_pages(Tensor t);
// 把空闲的全部还给系统，返回字节数。
int64_t buffer_release();

}  // namespace dso
