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
// Hopper 路径：wgmma 的一维固定是 64，键放在上面；一级 72 KiB（r = 512），至多两级，r 小时四级已经盖住延迟。
// 8 行起，行少时不必补齐。
constexpr int DECODE_KEYS_SM90 = 64;
constexpr int DECODE_STAGES_SM90 = 4;
constexpr int DECODE_ROWS_SM90[] = {8, 16, 32, 64};
// 64 行时每个调度器上两个消费者 warp、一个生产者 warp，共 512 个寄存器。
constexpr int DECODE_PRODUCER_REGISTERS = 40, DECODE_CONSUMER_REGISTERS = 232;
constexpr int SHARED_SM90 = 227 << 10;
// 一个 span 有几组查询时，几路 CTA 同时读同一段键（后读的在 L2 里）；2 的幂，4 路已把显存的读降到四分之一。
constexpr int DECODE_LANES = 4;
// 通用路径（fp32、奇数维度）：一次 8 行，累加在寄存器里；键数由共享内存决定，至多 32（一个 warp 一行得分）。
constexpr int GENERAL_ROWS = 8;
constexpr int GENERAL_KEYS = 32;
constexpr int GENERAL_THREADS = 256;
constexpr int COMBINE_THREADS = 128;

}  // namespace dso
