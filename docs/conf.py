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
suppress_warnings = ["myst.xref_missing", "ref.python"]
napoleon_use_ivar = True

# 文档字符串里的中文小标题 → napoleon 认识的英文小标题。
SECTIONS = {
    "参数": ("Args", "Parameters"),
    "属性": ("Attributes", "Attributes"),
    "返回": ("Returns", "Returns"),
    "返回值": ("Returns", "Returns"),
    "抛出": ("Raises", "Raises"),
    "异常": ("Raises", "Raises"),
    "产出": ("Yields", "Yields"),
    "示例": ("Example", "Examples"),
    "说明": ("Note", "Notes"),
}


def translate_sections(_app, _what, _name, _obj, _options, lines):
    """autodoc 的钩子：原地改写一个文档字符串的各行。"参数：" 与下面带横线的 "参数" 两种写法。"""
    for i, line in enumerate(lines):
        word = line.strip()
        google, numpy = SECTIONS.get(word.rstrip("：:"), ("", ""))
        below = lines[i + 1].strip() if i + 1 < len(lines) else ""
        if google and word.endswith(("：", ":")) and not word.endswith("::"):
            lines[i] = f"{google}:"
        elif google and len(below) > 2 and set(below) == {"-"}:
            lines[i], lines[i + 1] = numpy, "-" * len(numpy)


def setup(app):
    """在 napoleon 之前改写（优先级小的先运行）。"""
    app.connect("autodoc-process-docstring", translate_sections, priority=1)
