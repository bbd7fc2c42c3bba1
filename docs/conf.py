"""Sphinx 配置：make docs。"""

import logging
import re

import jieba  # pylint: disable=import-error  # 只在文档环境里

import deepseek_opt

jieba.setLogLevel(logging.WARNING)  # 它默认把载入词典的过程打到标准错误

project = "deepseek_opt"
author = "deepseek_opt 贡献者"
release = deepseek_opt.__version__
language = "zh_CN"
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
nb_execution_mode = "off"  # 笔记本带着输出提交；tests/test_docs.py 执行它
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"deepseek_opt {release}"
html_search_language = "zh"
html_show_sourcelink = False
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
ENGLISH = {numpy for _, numpy in SECTIONS.values()}


# "名字 : 说明" 或 "名字 :"，numpy 写法的一个条目；"、" 分隔的几个名字也算。
ENTRY = re.compile(r"[\w、 *]+ :( |$)")


def translate_sections(_app, _what, _name, _obj, _options, lines):
    """autodoc 的钩子：原地改写一个文档字符串的各行。"参数：" 与下面带横线的 "参数" 两种写法。

    横线写法的条目之后空一行、不再是条目的段落（"返回 …"、"抛出 …"）另起一节，否则会被当成条目。
    """
    found, entries = [], False
    for i, line in enumerate(lines):
        # reStructuredText 要求行内标记之后是空白或标点，“（”不算。
        line, word = line.replace("`（", "`\\ （"), line.strip()
        google, numpy = SECTIONS.get(word.rstrip("：:"), ("", ""))
        below = lines[i + 1].strip() if i + 1 < len(lines) else ""
        underlined = len(below) > 2 and set(below) == {"-"}
        if google and word.endswith(("：", ":")) and not word.endswith("::"):
            line = f"{google}:"
        elif underlined:
            line = numpy or word
            entries = numpy == "Parameters"
        elif word and set(word) == {"-"} and found and found[-1] in ENGLISH:
            line = "-" * len(found[-1])
        elif entries and word and not line.startswith(" ") and not found[-1].strip():
            entries = bool(ENTRY.match(line))
            found += [] if entries else ["Notes", "-----", ""]
        if entries and ENTRY.match(line):  # napoleon 把冒号之后的当作类型；这里写的是说明
            name, _, text = line.partition(" :")
            found += [name, "    " + text.strip()]
        else:
            found.append(line)
    lines[:] = found


def setup(app):
    """在 napoleon 之前改写（优先级小的先运行）。"""
    app.connect("autodoc-process-docstring", translate_sections, priority=1)
