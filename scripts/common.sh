# 各脚本共用：在仓库根目录里 source。
venv=${VENV:-.venv}
python=$venv/bin/python
say() { printf '\033[1m==> %s\033[0m\n' "$*"; }
find_nvcc() { [ -x "${CUDA_HOME:-/nonexistent}/bin/nvcc" ] || command -v nvcc >/dev/null; }
# 两个 pytest 进程；各自的 OpenMP 线程等待时让出核，不空转。
parallel=(-n 2 --dist worksteal)
export OMP_WAIT_POLICY=PASSIVE
