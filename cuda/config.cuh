// 各个核的分块与切分：每个数字只在这里，附上理由。共享内存按 sm_86/89 的 99 KiB、sm_80 的 163 KiB、
// sm_90 的 227 KiB 三档考虑；元素宽 2 字节，r = 512、dr = 64 时一个键占 1152 字节。
#pragma once

namespace dso {

// ---- mla_decode ----

// 一块键：32 个 36 KiB，两级流水加 16 行查询共 91 KiB，任何一档都放得下。
constexpr int DECODE_KEYS = 32;
// 一个 CTA 至少连续处理这么多块：再少则部分结果（16 行 x 512 x 4 字节）的写读超过省下的时间。
constexpr int DECODE_MIN_UNITS = 2;
// 一组查询（词元 x 头）的行数只取 16、32、64：少了浪费不大（受限于带宽），多了寄存器放不下 O。
constexpr int DECODE_ROWS[] = {16, 32, 64};
// 通用路径（fp32、奇数维度）：一次 8 行，累加在寄存器里；键数由共享内存决定，至多 32（一个 warp 一行得分）。
constexpr int GENERAL_ROWS = 8;
constexpr int GENERAL_KEYS = 32;
constexpr int GENERAL_THREADS = 256;
constexpr int COMBINE_THREADS = 128;

}  // namespace dso
