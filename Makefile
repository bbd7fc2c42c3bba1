# 每个目标都可以是克隆之后的第一条命令：需要时自动建立 .venv、安装依赖、编译。
#   make demo      在随包的小模型上跑一遍主要功能，生成报告
#   make test      C 测试（ASan、UBSan）+ pytest（覆盖率 >= 90 %）+ C 覆盖率 + CUDA 编译
#   make lint      clang-format、C 警告、flake8、pylint、ruff format
#   make bench     注意力与模型的基准
#   make docs      文档
#   make coverage  覆盖率的 HTML 报告
#   make build     只重新编译本地库
#   make clean     删除产物（保留 .venv；make distclean 连 .venv 一起删）
# 变量：VENV=目录（默认 .venv）、PYTHON=解释器、BENCH=基准名、PYTEST_ARGS=附加参数
VENV ?= .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.deepseek-opt-dev
DOCS_STAMP := $(VENV)/.deepseek-opt-docs
BENCH ?= mla
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help setup build demo test lint bench docs coverage format clean distclean

help:
	@sed -n '2,11s/^# \{0,1\}//p' Makefile

$(STAMP): pyproject.toml setup.py scripts/bootstrap.sh
	@scripts/bootstrap.sh $(VENV) dev
	@touch $@

$(DOCS_STAMP): $(STAMP)
	@$(PY) -m pip --disable-pip-version-check install -e '.[docs]' --no-build-isolation
	@touch $@

setup: $(STAMP)
	@echo "开发环境在 $(VENV)。"

build: $(STAMP)
	@$(PY) build_native.py

demo: build
	@$(VENV)/bin/deepseek-opt demo

test: build
	@VENV=$(VENV) scripts/test.sh $(PYTEST_ARGS)

lint: $(STAMP)
	@VENV=$(VENV) scripts/lint.sh

format: $(STAMP)
	@VENV=$(VENV) scripts/lint.sh --fix

bench: build
	@$(VENV)/bin/deepseek-opt bench $(BENCH)

docs: $(DOCS_STAMP) build
	@$(PY) -m sphinx -q -b html docs docs/_build/html
	@echo "文档：docs/_build/html/index.html"

coverage: build
	@VENV=$(VENV) scripts/coverage.sh --html

clean:
	@rm -rf build dist docs/_build *.egg-info .coverage htmlcov .pytest_cache .ruff_cache
	@find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
	@rm -f deepseek_opt/*.so $(STAMP) $(DOCS_STAMP)
	@if [ -f tests/c/Makefile ]; then $(MAKE) -s -C tests/c clean; fi
	@echo "已删除编译产物；虚拟环境 $(VENV) 还在（make distclean 一并删除）。"

distclean: clean
	@rm -rf .venv
