"""GPU 基准的各项：一个文件一组，与算子同名；每个 ``cases(env)`` 给出这组要跑的 :class:`~.runner.Case`。"""
