"""要手动运行的基准：``benchmarks/gpu.py``；CPU 的在 ``deepseek-opt bench``。"""
