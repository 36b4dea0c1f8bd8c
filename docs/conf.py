"""Sphinx: Markdown pages, and a reference made of the docstrings. Build: sphinx-build -W docs docs/_build"""
import re
import sys
from pathlib import Path

import ldm

project   = "ldm"
author    = "the ldm authors"
copyright = author
release   = ldm.__version__

sys.path.insert(0, str(Path(__file__).parent))
import annotated

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.viewcode", "sphinx.ext.mathjax",
              "sphinx-mathjax-offline", "sphinx_copybutton"]
exclude_patterns     = ["_build", "generated/*.md"]
myst_enable_extensions = ["dollarmath"]
autodoc_member_order = "bysource"
myst_heading_anchors = 3

html_theme = "furo"
html_title = f"ldm {ldm.__version__}"
html_static_path = ["_static"]
html_css_files   = ["wide.css"]


ITEM = re.compile(r"( *)(?:- |([\w.]+(?:, [\w.]+)*):\s+)(\S.*)")       # "- text", or "name: text"


def plain_docstring(app, what, name, obj, options, lines):
    """Our docstrings are text for the reader of the code, not reStructuredText: show them as they are.

    An indented block keeps its layout, as it is a drawing, a formula or code. Everything else is a paragraph,
    perhaps with a list after it, in which `backticks` mark code and no other character means anything.
    """
    blocks = re.split(r"\n\s*\n", "\n".join(lines).strip("\n"))
    lines.clear()
    for block in blocks:
        rows = block.split("\n")
        if all(row.startswith("    ") for row in rows):
            lines += ["::", "", *rows, ""]
            continue
        head: list[str] = []
        items: list[str] = []
        indent = ""                                             # of the items; what is deeper continues one
        for row in rows:
            match = ITEM.match(row)
            if match and (match[1] <= indent if items else not head or match[1] or not match[2]):
                items.append(f"- **{match[2]}**: {inline(match[3])}" if match[2] else f"- {inline(match[3])}")
                indent = match[1]
            elif items:
                items[-1] += " " + inline(row.strip())
            else:
                head.append(inline(row.strip()))
        if len(items) == 1 and not head:                      # a sentence with a colon, not a list
            items[0] = items[0].removeprefix("- ")
        lines += [*head, "", *items, ""]


def inline(row):
    """Code stays code, the other special characters of reStructuredText are escaped."""
    parts = re.split(r"`+([^`]+)`+", row)
    return "".join(f"``{part}``" if i % 2 else re.sub(r"([\\*|_])", r"\\\1", part)
                   for i, part in enumerate(parts))


def front_page(app, docname, source):
    """The front page is README.md. Links to pages of docs/ go there, those to other files are plain text."""
    if docname != "index":
        return
    path   = Path(app.confdir).parent / "README.md"
    readme = path.read_text("utf-8")
    readme = re.sub(r"(?<!!)\[([^]]+)\]\((?!\w+:|#|docs/[^)]*\.md)[^)]*\)", r"\1", readme)
    readme = readme.replace("](docs/", "](")
    app.env.note_dependency(path)
    source[0] = readme + source[0]


def setup(app):
    app.connect("builder-inited", annotated.write_pages)
    app.connect("source-read", front_page)
    app.connect("autodoc-process-docstring", plain_docstring)
