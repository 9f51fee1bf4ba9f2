"""An executed notebook as one HTML page that needs nothing else: pictures inside, formulas as MathML.

nbconvert's own pages fetch MathJax, RequireJS and the widgets' JavaScript from elsewhere, and without a network show
neither formulas nor widgets. Here a widget is shown by the still picture that it left, and browsers set MathML alone.
"""

from __future__ import annotations

import os
import re
from html import escape, unescape
from pathlib import Path
from urllib.parse import unquote

from companion.extras import extra
from companion.files import atomic_write
from companion.workbench.surroundings import without_grammar

# A formula, or code, in which a dollar is a dollar.
MATHS = re.compile(
    r"(?P<code>```.*?```|`[^`\n]*`)|\$\$(?P<block>.+?)\$\$|"
    r"(?<![\\$\w])\$(?P<line>[^\s$`][^$`]*?)(?<!\s)\$",
    re.DOTALL,
)
INWARD = re.compile(r'<a href="(?!#|[a-z]+:)([^"]*)"[^>]*>(.*?)</a>', re.DOTALL)  # links to files of the project
MARK = "companionmaths{}x"


def write_page(notebook: str | os.PathLike) -> Path:
    """The path of the page written beside a notebook; a page newer than its notebook stays as it is."""
    notebook = Path(notebook)
    path = notebook.with_suffix(".html")
    if not path.exists() or path.stat().st_mtime_ns < notebook.stat().st_mtime_ns:
        content = page(notebook)
        with atomic_write(path) as aside:
            aside.write_text(content, encoding="utf-8")
    return path


def page(notebook: Path) -> str:
    """The page of a notebook. Raises ValueError when it is not a notebook."""
    with extra("notebooks"), without_grammar():
        import nbformat
        from nbconvert.exporters import HTMLExporter
    from pygments.formatters import HtmlFormatter

    try:
        content = nbformat.read(notebook, as_version=4)
    except (nbformat.reader.NotJSONError, nbformat.ValidationError, AttributeError, KeyError) as error:
        raise ValueError(f"{notebook} is not a notebook: {' '.join(str(error).split())[:200]}") from None
    formulas: list[str] = []
    for cell in content.cells:
        if cell.cell_type == "markdown":
            cell.source = _marked(cell.source, formulas)
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            data.pop("application/vnd.jupyter.widget-view+json", None)
            if "text/markdown" in data:
                data["text/markdown"] = _marked("".join(data["text/markdown"]), formulas)
            _describe(output)
    content.metadata.pop("widgets", None)
    body, _ = HTMLExporter(template_name="basic", embed_images=True).from_notebook_node(content)
    body = INWARD.sub(lambda link: link[0] if _leads(notebook.parent, link[1]) else link[2], body)
    for i, formula in enumerate(formulas):
        body = body.replace(MARK.format(i), formula)
    title = next(
        (line.lstrip("# ") for c in content.cells for line in c.source.splitlines() if line[:2] == "# "), notebook.stem
    )
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{escape(title)}</title>\n'
        f"<style>{STYLE}{HtmlFormatter().get_style_defs('.highlight')}</style>\n</head>\n<body>\n"
        f"<main>\n{body}\n</main>\n<script>{LOWER}</script>\n</body>\n</html>\n"
    )


def _leads(folder: Path, href: str) -> bool:
    """Whether a link leads somewhere from here: those between the project's notebooks do not, those to runs do."""
    return (folder / unquote(unescape(href)).split("#")[0]).exists()


def mathml(formula: str, block: bool) -> str:
    """A LaTeX formula as MathML, which browsers set without help; as code, if it is beyond the converter."""
    with extra("notebooks"):
        from latex2mathml.converter import convert

    try:
        return convert(formula.strip(), display="block" if block else "inline")
    except Exception:  # a formula that cannot be read must not cost the page
        return f"<code>{escape(formula)}</code>"


def _marked(text: str, formulas: list[str]) -> str:
    """Markdown with words in place of its formulas, which would suffer from Markdown's own rules."""

    def replace(match: re.Match) -> str:
        if match["code"]:
            return match["code"]
        block = match["block"] is not None
        formulas.append(mathml(match["block"] if block else match["line"], block))
        return MARK.format(len(formulas) - 1)

    return MATHS.sub(replace, text)


def _describe(output) -> None:
    """Give a picture an alternative text, if it has none, for those who do not see it."""
    for kind in ("image/png", "image/jpeg"):
        if kind in output.get("data", {}) and not output.get("metadata", {}).get(kind, {}).get("alt"):
            text = "".join(output["data"].get("text/plain", "")).strip("<>")
            plain = "" if not text or text.startswith(("Figure", "IPython")) else f": {text[:120]}"
            output.setdefault("metadata", {}).setdefault(kind, {})["alt"] = f"picture made by the cell above{plain}"


STYLE = """
:root { color-scheme: light; }
body { margin: 0 auto; max-width: 62rem; padding: 2.5rem 1.25rem 5rem; background: #fcfcfb; color: #1d2329;
       font: 16px/1.6 system-ui, sans-serif; }
h1 { font-size: 1.9rem; line-height: 1.25; } h2 { font-size: 1.35rem; margin-top: 2.5rem; }
a { color: #1f5f8b; } a.anchor-link { display: none; }
img { max-width: 100%; height: auto; }
pre, code { font: 13px/1.5 ui-monospace, monospace; }
pre { overflow-x: auto; margin: .5rem 0; }
.input_area, .jp-InputArea-editor { background: #f4f4f1; border-radius: 6px; padding: .25rem .9rem; }
.prompt, .jp-InputPrompt, .jp-OutputPrompt { display: none; }
.output_area { overflow-x: auto; }
.output_stderr pre { color: #6b5a2b; } .output_error pre { color: #8a2b1f; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; margin: .75rem 0; }
th, td { text-align: left; padding: .3rem 1.25rem .3rem 0; border-bottom: 1px solid #dfe3e8; vertical-align: top; }
math { font-family: "Latin Modern Math", "STIX Two Math", "Cambria Math", math; font-size: 1.08em; }
math[display=block] { margin: 1rem 0; }
.no-math-font :is(msub, msubsup) > :nth-child(2) { position: relative; top: .35em; }
"""

# Without a mathematical font some browsers leave subscripts on the line.
LOWER = """
const bottoms = [...(document.querySelector("msub")?.children ?? [])].map(part => part.getBoundingClientRect().bottom);
if (bottoms.length && bottoms[1] - bottoms[0] < 1.5) document.body.classList.add("no-math-font");
"""
