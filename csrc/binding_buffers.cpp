// 大块内存的回收池：梯度（几百 MiB 到几 GiB）与算子的暂存每一步大小都相同，却每步向系统要一次、还一次；
// 首次写入的缺页与清零曾占训练一步的四分之一。这里留下来给下一步用，像 torch 在 GPU 上做的那样。
//
// 占用不会因此变大：在用的与空闲的合计不超过在用的历史最大值的
// 一又四分之一（前向与反向的暂存大小不同，要都留得下）；空闲的块已交代给系统（MADV_FREE），内存紧张时
// 系统可以直接取走；buffer_release 立即全部归还。
#include "binding_buffers.h"

#include <algorithm>
#include <map>
#include <mutex>
#include <unordered_map>

#ifdef __linux__
#include <sys/mman.h>
#endif

// 带删除函数的版本是 torch 2.11 加的；2.10 上没有，弱符号为空，就用 torch 的分配器。
extern "C" __attribute__((weak, visibility("default"))) AOTITorchError
torch_from_blob(void *data, int64_t ndim, const int64_t *sizes, const int64_t *strides,
                int64_t storage_offset, int32_t dtype, int32_t device_type, int32_t device_index,
                AtenTensorHandle *out, int32_t layout, const uint8_t *metadata,
                int64_t metadata_size, void (*deleter)(void *data, void *context), void *context);

namespace dso {
namespace {

constexpr size_t kPage = size_t{2} << 20;  // 透明大页

#if defined(__linux__) && defined(MADV_HUGEPAGE) && defined(MADV_FREE)
// 多要一页再裁去两端，得到 2 MiB 对齐的一段。
void *map_pages(size_t bytes) {
  void *raw =
      mmap(nullptr, bytes + kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (raw == MAP_FAILED) return nullptr;
  const auto begin = reinterpret_cast<uintptr_t>(raw);
  const uintptr_t aligned = (begin + kPage - 1) / kPage * kPage;
  if (aligned > begin) munmap(raw, aligned - begin);
  const uintptr_t end = begin + bytes + kPage, used = aligned + bytes;
  if (end > used) munmap(reinterpret_cast<void *>(used), end - used);
  auto *data = reinterpret_cast<void *>(aligned);
  madvise(data, bytes, MADV_HUGEPAGE);
  return data;
}
void unmap_pages(void *data, size_t bytes) { munmap(data, bytes); }
void make_reclaimable(void *data, size_t bytes) { madvise(data, bytes, MADV_FREE); }
void use_large_pages(uintptr_t begin, uintptr_t end) {
  constexpr uintptr_t small = 4096;
  begin = (begin + small - 1) / small * small, end = end / small * small;
  if (begin < end) madvise(reinterpret_cast<void *>(begin), end - begin, MADV_HUGEPAGE);
}
#else
void *map_pages(size_t) { return nullptr; }  // 别的系统：调用者改用 torch 的分配器
void unmap_pages(void *, size_t) {}
void make_reclaimable(void *, size_t) {}
void use_large_pages(uintptr_t, uintptr_t) {}
#endif

class Pool {
 public:
  void *take(size_t bytes) {
    const size_t want = (bytes + kPage - 1) / kPage * kPage;
    std::lock_guard<std::mutex> guard(lock_);
    void *data = reuse(want);
    if (data == nullptr) {
      trim(want);
      data = map_pages(want);
      if (data == nullptr) return nullptr;
      live_[data] = want;
      live_bytes_ += want;
    }
    most_ = std::max(most_, live_bytes_);
    return data;
  }

  void give(void *data) {
    std::lock_guard<std::mutex> guard(lock_);
    const auto found = live_.find(data);
    const size_t bytes = found->second;
    live_.erase(found);
    live_bytes_ -= bytes;
    make_reclaimable(data, bytes);
    idle_.emplace(bytes, data);
    idle_bytes_ += bytes;
  }

  int64_t release() {
    std::lock_guard<std::mutex> guard(lock_);
    const size_t bytes = idle_bytes_;
    while (!idle_.empty()) drop(idle_.begin());
    most_ = live_bytes_;
    return static_cast<int64_t>(bytes);
  }

 private:
  using Idle = std::multimap<size_t, void *>;

  // 最合适的空闲块；大出八分之一以上的不用，免得小的占住大的。
  void *reuse(size_t want) {
    const auto found = idle_.lower_bound(want);
    if (found == idle_.end() || found->first > want + want / 8) return nullptr;
    void *data = found->second;
    live_[data] = found->first;
    live_bytes_ += found->first;
    idle_bytes_ -= found->first;
    idle_.erase(found);
    return data;
  }

  // 为新分配的 want 让位：合计不超过上限，先放小的（容易再要到）。
  void trim(size_t want) {
    const size_t after = live_bytes_ + want, limit = std::max(most_ + most_ / 4, after);
    while (!idle_.empty() && idle_bytes_ + after > limit) drop(idle_.begin());
  }

  void drop(Idle::iterator block) {
    unmap_pages(block->second, block->first);
    idle_bytes_ -= block->first;
    idle_.erase(block);
  }

  std::mutex lock_;
  Idle idle_;
  std::unordered_map<void *, size_t> live_;
  size_t live_bytes_ = 0, idle_bytes_ = 0, most_ = 0;
};

// 不析构：进程退出时可能还有张量活着。
Pool &pool() {
  static Pool *const instance = new Pool;
  return *instance;
}

}  // namespace

void *buffer_take(size_t bytes) { return pool().take(bytes); }
void buffer_give(void *data) { pool().give(data); }
int64_t buffer_release() { return pool().release(); }

void advise_huge_pages(Tensor t) {
  const auto begin = reinterpret_cast<uintptr_t>(t.mutable_data_ptr());
  use_large_pages(begin, begin + static_cast<uintptr_t>(t.numel() * t.element_size()));
}

Tensor pooled_empty(const Tensor &like, const std::vector<int64_t> &sizes) {
  size_t bytes = static_cast<size_t>(like.element_size());
  for (const int64_t size : sizes) bytes *= static_cast<size_t>(size);
  void *data = bytes >= kPooledBytes && torch_from_blob ? buffer_take(bytes) : nullptr;
  if (data == nullptr) return torch::stable::new_empty(like, sizes);
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t i = sizes.size() - 1; i > 0; i--) strides[i - 1] = strides[i] * sizes[i];
  AtenTensorHandle out = nullptr;
  int32_t type = 0;
  aoti_torch_get_dtype(like.get(), &type);
  const auto give = [](void *at, void *) { buffer_give(at); };
  const auto failed = torch_from_blob(data, static_cast<int64_t>(sizes.size()), sizes.data(),
                                      strides.data(), 0, type, aoti_torch_device_type_cpu(), -1,
                                      &out, aoti_torch_layout_strided(), nullptr, 0, give, nullptr);
  if (failed == AOTI_TORCH_SUCCESS) return Tensor(out);
  buffer_give(data);
  return torch::stable::new_empty(like, sizes);
}

}  // namespace dso
