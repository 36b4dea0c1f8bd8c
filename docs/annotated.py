"""The annotated source: pages made of the files of the package, text on the left, code on the right.

Text is what the files say themselves: docstrings, and comments that stand on lines of their own. Nothing is
written here, so nothing here can be out of date.
"""
import ast
import html
import re
from pathlib import Path

from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer

ROOT  = Path(__file__).resolve().parents[1]
FILES = ("noise_schedule", "denoiser", "guidance", "schedulers/euler", "schedulers/heun",
         "schedulers/multistep", "schedulers/dpm", "models/layers", "models/unet", "models/vae", "text",
         "sizes", "noise", "sampling", "run", "inpainting", "training")


def write_pages(app) -> None:
    """Writes docs/generated/source/*.md, before Sphinx reads its sources."""
    folder = Path(app.srcdir) / "generated" / "source"
    folder.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        source = (ROOT / "ldm" / f"{name}.py").read_text("utf-8")
        rows   = "".join(f'<div class="text">{text_to_html(text)}</div>'
                         f'<div class="code">{code_to_html(code)}</div>' for text, code in pieces(source))
        page = f'# ldm/{name}.py\n\n```{{raw}} html\n<div class="annotated">{rows}</div>\n```\n'
        path = folder / f"{name.replace('/', '_')}.md"
        if not path.exists() or path.read_text("utf-8") != page:       # an unchanged page is not built again
            path.write_text(page, "utf-8")


def pieces(source: str) -> list[tuple[str, str]]:
    """Pairs of a text and the code that follows it; all the code, joined, is the file without its text."""
    lines = source.splitlines()
    owner = {}                                      # line → the text that begins there, and where it ends
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node):
            text = node.body[0]
            owner[text.lineno] = ast.get_docstring(node), text.end_lineno
    found: list[tuple[str, list[str]]] = [("", [])]
    number = 1
    while number <= len(lines):
        line = lines[number - 1]
        if number in owner:
            text, number = owner[number]
            head = _heading(found[-1][1])                     # the def or class stands with its docstring
            found.append((text, head))
        elif re.fullmatch(r" {0,4}# [^-].*", line) and found[-1][1][-1:] != ["\\"]:
            comment = []
            while number <= len(lines) and re.fullmatch(r" *# .*", lines[number - 1]):
                comment.append(lines[number - 1].strip().removeprefix("# "))
                number += 1
            number -= 1
            found.append((" ".join(comment), []))
        else:
            before = found[-1][1]
            if before and re.match(r"(def|class|@)", line) and not before[-1].startswith("@"):
                found.append(("", []))
            found[-1][1].append(line)
        number += 1
    return [(text, "\n".join(code).strip("\n")) for text, code in found if text or "".join(code).strip()]


def _heading(code: list[str]) -> list[str]:
    """Takes the lines of the last def or class, with its decorators, off the end of the code."""
    first = len(code)
    while first and not re.match(r" *(def|class) ", code[first - 1]):
        first -= 1
    first -= 1
    while first > 0 and re.match(r" *@", code[first - 1]):
        first -= 1
    head = code[max(first, 0):] if code else []
    del code[max(first, 0):]
    return head


def code_to_html(code: str) -> str:
    return highlight(code, PythonLexer(), HtmlFormatter(nowrap=False)) if code.strip() else ""


ITEM = re.compile(r" *(?:- |([\w.σ]+(?:, [\w.]+)*):\s+)(\S.*)")              # "- text", or "name: text"


def text_to_html(text: str) -> str:
    """Paragraphs, lists of "name: text" or "- text", `code`, and indented blocks as they are."""
    out = []
    for block in re.split(r"\n\s*\n", text.strip("\n")):
        rows = block.split("\n")
        if all(row.startswith("    ") for row in rows):
            out.append(f"<pre>{html.escape(block)}</pre>")
            continue
        if re.fullmatch(r"\w+:", rows[0]) and len(rows) > 1:                             # Args:, Raises: …
            out.append(f"<p><b>{rows.pop(0)}</b></p>")
        if ITEM.match(rows[0]) and len(rows[0]) - len(rows[0].lstrip()) < 5:
            out.append(f"<ul>{''.join(f'<li>{item}</li>' for item in _items(rows))}</ul>")
        else:
            out.append(f"<p>{_inline(block)}</p>")
    return "".join(out)


def _items(rows: list[str]) -> list[str]:
    indent, items = len(rows[0]) - len(rows[0].lstrip()), []
    for row in rows:
        match = ITEM.match(row)
        if match and len(row) - len(row.lstrip()) <= indent:
            items.append(f"<code>{match[1]}</code>: {_inline(match[2])}" if match[1] else _inline(match[2]))
        else:
            items[-1] += " " + _inline(row.strip())
    return items


def _inline(text: str) -> str:
    return re.sub(r"`+([^`]+)`+", r"<code>\1</code>", html.escape(text))
