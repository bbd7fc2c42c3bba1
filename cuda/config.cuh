// 各个核的分块与切分：每个数字只在这里，附上理由。共享内存按 sm_86/89 的 99 KiB、sm_80 的 163 KiB、
// sm_90 的 227 KiB 三档考虑；元素宽 2 字节，r = 512、dr = 64 时一个键占 1152 字节。
#pragma once

namespace dso {

// ---- mla_decode ----

// 一块键：32 个 36 KiB，两级流水加 16 行查询共 91 KiB，任何一档都放得下。
constexpr int DECODE_KEYS = 32;
// 一个 CTA 至少连续处理这么多块：再少则部分结果（16 行 x 512 x 4 字节）的写读超过省下的时间。
// Hopper 的一块是 64 个键，读进来就要 72 KiB 除以一个 SM 每周期 64 字节：一块也值得分出去。
constexpr int DECODE_MIN_UNITS = 2, DECODE_MIN_UNITS_SM90 = 1;
// 各 span 的块数相同时，每个 CTA 多做不到 1 / 32 就能与 span 的边界对齐的，就多做：128 行 128 个头时几乎每组都要分成
// 两段，写、读 35 MB 部分结果。省下的约 20 微秒与长短无关，多做的一个单位 2～3 微秒：多得多了就不值得。
constexpr int DECODE_ALIGN_SHARE = 32, DECODE_ALIGN_UNITS = 8;
// 一组查询（词元 x 头）的行数只取 16、32、64：少了浪费不大（受限于带宽），多了寄存器放不下 O。
constexpr int DECODE_ROWS[] = {16, 32, 64}, DECODE_MOST_ROWS = 64;
// Hopper 路径：wgmma 的一维固定是 64，键放在上面；一级 72 KiB（r = 512），至多两级，r 小时四级已经盖住延迟。
// 8 行起，行少时不必补齐。
constexpr int DECODE_KEYS_SM90 = 64;
constexpr int DECODE_STAGES_SM90 = 4;
// 行多而只有两级时，一级放行到要用不过一千多个周期，盖不住显存的延迟（约一微秒）：提前几块（一对的倍数）读进 L2。
// 行少时没有：受限于显存，预读进 L2 的有一成多在用到之前又被换出去（H100 上慢 13～22 %）。
constexpr int DECODE_AHEAD_SM90 = 2;
constexpr int DECODE_ROWS_SM90[] = {8, 16, 32, 64};
// 两组 64 行合用一份键的 cluster：一块 72 KiB 算 2368 个周期，各读各的在 600 TFLOP/s 时要从 L2 读 5 TB/s，
// 接近上限；TMA 一次写到两个 CTA，减半。r 小于一档的少见，不值得多编译几个核。
constexpr int DECODE_CLUSTER_SM90 = 2, DECODE_CLUSTER_RANK = 256;
// 64 行时每个调度器上两个消费者 warp、一个生产者 warp：启动时一个线程 168 个寄存器，合计不能超过它的三倍。
constexpr int DECODE_PRODUCER_REGISTERS = 72, DECODE_CONSUMER_REGISTERS = 216;
constexpr int SHARED_SM90 = 227 << 10;
// 一个 span 有几组查询时，几路 CTA 同时读同一段键（后读的在 L2 里）；2 的幂，4 路已把显存的读降到四分之一。
constexpr int DECODE_TRACKS = 4;
// 通用路径（fp32、奇数维度）：一次 8 行，累加在寄存器里；键数由共享内存决定，至多 32（一个 warp 一行得分）。
constexpr int GENERAL_ROWS = 8;
constexpr int GENERAL_KEYS = 32;
constexpr int GENERAL_THREADS = 256;
// 合并：16 个线程（每线程 16 字节）管一行里的 64 列，一次把 8 段的读都发出去；段多时一行由几组线程分着加（一行分成 130 段、
// 逐段加时几乎全是等 L2）。行很多时改成一组一次 256 列、2 段，每组同样 8 次读，别的开销少。
// 一次至多启动 384 块（每个 SM 两三块，都在运行），再多的轮着做；登记表一块看 256 项，一个线程一项。
constexpr int COMBINE_THREADS = 256;
constexpr int COMBINE_LANES = 16;
constexpr int COMBINE_BATCH = 8;
constexpr int COMBINE_WIDE = 4;
constexpr int COMBINE_CTAS = 384;

// ---- 采样与 MTP ----

// 一行词表按 4096 个切开，每块 256 个线程：fp32 正好 16 KiB 共享内存，8 行 5 个位置、词表 32 000 已有 320 块。
constexpr int VOCAB_CHUNK = 4096;
constexpr int VOCAB_THREADS = 256;
// top-k、top-p 的细找一行一块：先用每 64 个分数的最大值略过大半，余下的少，线程多只为藏住延迟。
constexpr int SELECT_BLOCK = 64;
constexpr int SELECT_THREADS = 1024;
constexpr int SELECT_BINS = 1 << 11;  // 直方图 24 KiB；键 32 位分三遍
// 草稿的输出头：一块 32 个候选（两个 m16 的片段，x 的片段读一次用两次），8 个 warp 分 K；
// 词表只剩 2048 个时还有 64 块。x 一次 8 行（解码）或 32 行。
constexpr int HEAD_TOKENS = 32;
constexpr int HEAD_WARPS = 8;
constexpr int HEAD_ROWS = 8, HEAD_MANY_ROWS = 32;

// ---- 行极少的 linear、swiglu_mlp ----

// 不多于 8 行（mma 的 n）时用自己的核：8 个 warp 分 K，一次发出 4 步（每线程 8 次 16 字节）的读。K = 2048 时一块的
// 64 KiB 权重分两次就读完，一个 SM 两块，同时在路上的 64 KiB 足够盖住显存的延迟（约 40 KiB）。
constexpr int LINEAR_ROWS = 8, LINEAR_WARPS = 8, LINEAR_UNROLL = 4;
// 提前启动、等前一个核时请 L2 先取一行的这么多字节：一个 SM 三块、一块 16 行，整张卡 26 MB，L2（50 MB）放得下。
constexpr int LINEAR_PREFETCH = 4096;

// ---- mla_decode 前后各头的矩阵乘（吸收、W_UV） ----

// 至多几行用普通的 fp32 乘加（mla_absorb.cu）：H200 上 16 个头，1 行 3.4 微秒，8 行 6.3；用 mma 的（mla_heads.cu）不论几行都是
// 4.1。寄存器少，解码的块也挤得进来。
constexpr int ABSORB_ROWS = 2;

// 一块 64 列、32 或 64 行：权重读 M / 64 遍，x 读 N / 64 遍，都来自 L2（每周期一个 SM 约 27 字节）。dn、dv = 128，r = 512 时一个
// （词元，头）一步约读 4 KiB：16 个头、128 个词元 8 MB。H200 上两个核共 10.2 微秒，与 cuBLAS 的两个一样，省下的是前后的空隙；
// 128 个头、64 个词元（8192 个）33 微秒，cuBLAS 17.5：多了就交给它。
constexpr int HEADS_PRODUCTS = 2048, HEADS_COLUMNS = 64;
// 一段几个 k、几段：W_UV（k = r）四段正好 512，32 行时共 97.5 KiB，任何一档都放得下；吸收（k = dn）两段 128，27 KiB。
constexpr int HEADS_VALUE_DEPTH = 128, HEADS_VALUE_STAGES = 4;
constexpr int HEADS_ABSORB_DEPTH = 64, HEADS_ABSORB_STAGES = 2;

// ---- mla_prefill 与其反向 ----

// 前向一块 128 个查询（8 个 warp 各 16 行），一次 64 个键：192/128 维时 Q 50 KiB、K 与 V 42 KiB，
// 99 KiB 的卡上单级，163 KiB 起两级流水。
constexpr int PREFILL_ROWS = 128;
constexpr int PREFILL_KEYS = 64;
// Hopper 的前向一次 128 个键：Q 48 KiB，两级 K、V 160 KiB。消费者每线程 64 个 O、64 个得分、32 个 P；
// 三组共 504 个寄存器（上限 512）。
constexpr int PREFILL_KEYS_SM90 = 128;
constexpr int PREFILL_PRODUCER_REGISTERS = 40, PREFILL_CONSUMER_REGISTERS = 232;
// 反向的两个核都以 64 x 64 的得分块计算：dK、dV（或 dQ）的累加器 8 个 warp 每线程至多 128 个。
constexpr int BACKWARD_TILE = 64;
// Hopper 的反向，192/128 维、每个 SM 每周期 2048 次乘加、共享内存每周期 128 字节：
// dkv 一块 128 个键（两组各 64），一次 64 个查询：K、V 80 KiB，三级 Q、dO 120 KiB。每线程 dK 96、dV 64 个累加器，
// S（dP）32，P、dS 各 16，共 224，所以查询不能再多。一组一步的 wgmma 占 1280 周期（S 384、dP 256、dV 256、dK 384），
// 从共享内存读 960 周期，两组加上搬入共 2240 / 2560。
constexpr int BACKWARD_KEYS_SM90 = 128, BACKWARD_QUERIES_SM90 = 64, BACKWARD_STAGES_SM90 = 3;
// dq 一块 128 个查询，一次 128 个键：Q、dO 80 KiB，两级 K 96 KiB，一级 V 32 KiB（V 用完得早：两次使用之间隔着
// 四分之三步）。每线程 dQ 96 个累加器，S（dP）64，P、dS 各 32，共 224。一组一步 2048 周期（S 768、dP 512、
// dQ 768），共享内存两组加上搬入 3328 / 4096；64 个键时是 1984 / 2048。
constexpr int BACKWARD_DQ_ROWS = 128, BACKWARD_DQ_KEYS = 128, BACKWARD_DQ_STAGES = 2;
// 三组共 504 个寄存器（上限 512）。
constexpr int BACKWARD_DKV_PRODUCER = 24, BACKWARD_DKV_CONSUMER = 240;
// 按头分组展开 K、V：一组的 K、V 不超过这么多字节（至少一个头）。大于 L2 才有足够多的块占满卡，
// 又不随头数增长。
constexpr long long EXPAND_BYTES = 64LL << 20;

// ---- MoE ----

// 路由：一个 warp 一个词元，一块 8 个。
constexpr int MOE_ROUTE_WARPS = 8;
// 词元不多于这么多时 logits 用自己的核（受限于读权重），再多交给 cuBLAS；16 位的同一种类型用 mma，可以更多。
constexpr int MOE_LOGITS_TOKENS = 32, MOE_LOGITS_MMA_TOKENS = 64;
// 用 mma 的一块 32 个专家、至多 16 份里的一份 K、8 个 warp：256 个专家、K = 7168 时 14 份共 112 块，一块读 32 KiB 权重与（64 个
// 词元时）64 KiB 的 x，每个 SM 每周期 24 到 30 字节约 3500 个周期；部分和共 0.9 MB。份数再多，合并时读的超过省下的。
constexpr int MOE_LOGITS_WARPS = 8, MOE_LOGITS_PARTS = 16;

// 排序：一个 CTA 一段 4096 个 slot（8 个 warp 各 512 个）；解码时只有一段，一个核做完。
constexpr int MOE_SORT_SLOTS = 4096;
// 分组的矩阵乘：128 x 256 的块、一级 64 个 k（48 KiB）、8 个 warp 各 64 x 64：每线程 128 个累加器，一个 SM 一块。
// 一级 2^21 次乘加，mma 在 A100 上 2048 个周期、Hopper 上约 1650 个；共享内存 128 字节一周期，读 1024 个周期、拷入 384 个；
// L2 每周期 24 到 30 字节，都是整条 128 字节。99 KiB 的卡 2 级，其余 3 级（144 KiB）。
constexpr int MOE_ROWS = 128, MOE_COLUMNS = 256, MOE_DEPTH = 64;
constexpr int MOE_STAGES = 3, MOE_LEAST_STAGES = 2;
// 相邻 16 块行（每个专家约 2048 行时就是一个专家）一起做：它们的 x 与这个专家的权重都放得进 L2。
constexpr int MOE_GROUP = 16;
// 词元少的路径：一块至多 32 个词元（更多则寄存器不够；8 个时另有省寄存器的一份），多的几块从 L2 里再读权重。
// 不多于 64 个词元，或平均一个专家不到 16 行时用它。
constexpr int MOE_SMALL_ROWS = 32, MOE_SMALL_TOKENS = 64, MOE_SMALL_AVERAGE = 16;
// 平均一个专家至多 4 行时一块 8 行：随机的路由下只有百分之二的专家多于 8 行。
constexpr int MOE_SMALL_NARROW = 4;
// 一个 warp 至少读 12 KiB 权重（不到就少分 K），起头与收尾的几百条指令、等第一次读的一两微秒才摊得开；但全卡至少 2048
// 个 warp（H200 每个 SM 16 个）：再少在途的读不够。
constexpr int MOE_SMALL_WARP_BYTES = 12 << 10, MOE_SMALL_WARPS = 2048;
// 至多 4 个词元时不排序，每个 slot 自己一块：选中同一个专家的少，重复的读也在 L2 里，省下排序与求和两个核。
constexpr int MOE_DIRECT_TOKENS = 4;
// Hopper 上 int4、一块至多 8 行（moe_codes_sm90.cu）：8 个 warp 各有自己的几级，一级 16 行 x 128 字节（256 个 k）连同尺度
// 2.25 KiB。K = 2048 的 h、K = 768 的 o 各 4 级：除去正在用的，一个 SM 在途 54 KiB，4.8 TB/s（每个 SM 每微秒 36 KiB）乘显存的
// 延迟（一微秒多）够用。两步的上限合起来不到 226 KiB：算 o 的核在 h 的核结束之前就与它同在一个 SM 上，先读满自己的各级。x（8 行、
// 整个 K）占得多，不足 MOE_CODES_LEAST 级的，就独占一个 SM。都没有在设备上量过。
constexpr int MOE_CODES_WARPS = 8, MOE_CODES_STAGES = 6, MOE_CODES_LEAST = 3;
constexpr int MOE_CODES_HIDDEN_BYTES = 127 << 10, MOE_CODES_OUTPUT_BYTES = 98 << 10;
// 一份（16 行、整个 K）至多分成几段：最后不够各 warp 一份的平分，多少差不过一段。
constexpr int MOE_CODES_PIECES = 4;
// Hopper 的反向：128 x 256 的块、一级 64 个 k（48 KiB）、4 级，加写出的 32 KiB。两边都用 cp.async，生产者的地址多，
// 所以它的寄存器比只发 TMA 的多；三组共 504 个（上限 504）。
constexpr int MOE_BACKWARD_COLUMNS_SM90 = 256, MOE_BACKWARD_STAGES_SM90 = 4;
constexpr int MOE_BACKWARD_PRODUCER_REGISTERS = 56, MOE_BACKWARD_CONSUMER_REGISTERS = 224;
// Hopper 的分组矩阵乘：128 行 x 256 列权重、一级 64 个 k（48 KiB）、4 级，加写出的 32 KiB 共 224 KiB。一级算 1024 个
// 周期，每周期读 48 字节：列再少就受限于 L2。两个消费者组各 128 个累加器；三组共 504 个寄存器（上限 504）。
constexpr int MOE_COLUMNS_SM90 = 256, MOE_STAGES_SM90 = 4;
constexpr int MOE_PRODUCER_REGISTERS = 40, MOE_CONSUMER_REGISTERS = 232;
// 通用路径（fp32、奇数维度、混合类型）：64 x 64 的块，256 个线程各 4 x 4；每 16 个 k 另起一个部分和，误差不随 K 增长。
constexpr int MOE_GENERAL_ROWS = 64;
constexpr int MOE_GENERAL_DEPTH = 16;

}  // namespace dso
