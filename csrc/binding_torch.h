// torch 的调用失败时：说明是哪一个、为什么。稳定 ABI 只返回错误码，torch 头文件里的宏抛出的是调用的原文（英文，没有
// 原因），内存不足也认不出来；那些头文件用的都是这一个宏，所以先换掉它。
#pragma once

#include <torch/headeronly/util/shim_utils.h>

#include <stdexcept>
#include <string>

// torch 2.13 加的：本线程最近一次失败的原因。更早的没有，弱符号为空。
extern "C" __attribute__((weak, visibility("default"))) const char *
torch_exception_get_what_without_backtrace();

namespace dso {

// call：算子的名字，或调用的原文（其中引号里的是算子的名字）。Python 一侧（device_memory.py）看这句话认出内存不足。
[[noreturn]] inline void torch_failed(const char *call) {
  std::string name(call);
  const size_t begin = name.find('"');
  if (begin == std::string::npos)
    name = name.substr(0, name.find('('));
  else
    name = name.substr(begin + 1, name.find('"', begin + 1) - begin - 1);
  const char *why = torch_exception_get_what_without_backtrace
                        ? torch_exception_get_what_without_backtrace()
                        : nullptr;
  throw std::runtime_error("deepseek_opt：torch 的 " + name + " 失败：" +
                           (why && *why ? why : "原因不明"));
}

}  // namespace dso

#undef TORCH_ERROR_CODE_CHECK
#define TORCH_ERROR_CODE_CHECK(call) \
  if ((call) != TORCH_SUCCESS) {     \
    ::dso::torch_failed(#call);      \
  }
