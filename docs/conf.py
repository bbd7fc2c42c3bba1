"""Sphinx 配置：make docs。"""

import deepseek_opt

project = "deepseek_opt"
author = "deepseek_opt 贡献者"
release = deepseek_opt.__version__
language = "zh_CN"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"deepseek_opt {release}"
html_search_language = "zh"
autodoc_member_order = "bysource"
autodoc_typehints = "description"
napoleon_google_docstring = True
# 指向仓库里其他文件的相对链接在网页上不存在，不算错。
suppress_warnings = ["myst.xref_missing"]
