// 主机模拟的上下文切换：x86-64 自己写（swapcontext 每次要两个系统调用），别处用 ucontext。
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(DSO_HOST_ASAN)
#include <sanitizer/common_interface_defs.h>
#endif
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace cuda_host {

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

inline void switch_context(Context &from, Context &to) {
#if defined(DSO_HOST_ASAN)
  __sanitizer_start_switch_fiber(&from.fake_stack, to.bottom, to.size);
#endif
#if defined(__x86_64__)
  dso_host_switch(&from.stack_pointer, to.stack_pointer);
#else
  swapcontext(&from.context, &to.context);
#endif
#if defined(DSO_HOST_ASAN)
  __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#endif
}

// 在这个栈上从 entry 开始；entry 不返回。
inline void start_context(Context &context, char *stack, size_t bytes, void (*entry)()) {
  context.bottom = stack, context.size = bytes;
#if defined(__x86_64__)
  auto top = reinterpret_cast<uintptr_t>(stack + bytes) & ~uintptr_t{15};
  auto *frame = reinterpret_cast<void **>(top) - 8;  // 6 个寄存器、返回地址、对齐
  std::memset(frame, 0, 8 * sizeof(void *));
  frame[6] = reinterpret_cast<void *>(entry);
  context.stack_pointer = frame;
#else
  getcontext(&context.context);
  context.context.uc_stack.ss_sp = stack;
  context.context.uc_stack.ss_size = bytes;
  makecontext(&context.context, entry, 0);
#endif
}

}  // namespace cuda_host
