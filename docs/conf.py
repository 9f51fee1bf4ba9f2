"""Sphinx' settings. `make docs` builds the site from a staged copy of these pages, see tools/docs.py."""

import os
import re
from pathlib import Path

from docutils import nodes
from sphinx.domains.python import PythonDomain

from companion.workbench.pages import LOWER, mathml

HERE = Path(__file__).parent
# Where the repository is published, as in https://github.com/OWNER/NAME. Without it links to files of the repository
# are plain text, and the Colab and Binder badges are left out.
REPOSITORY = os.environ.get("COMPANION_REPOSITORY", "")

project = "companion"
author = copyright = "The companion authors"
release = version = re.search(r'__version__ = "(.*?)"', (HERE / "version.txt").read_text())[1]

extensions = ["myst_nb", "sphinx_design", "sphinx_copybutton", "sphinxcontrib.bibtex"]
root_doc = "index"
exclude_patterns = ["conf.py"]
suppress_warnings = ["myst.header", "mystnb.unknown_mime_type"]
nb_execution_mode = "off"
nb_ipywidgets_js = {}  # a widget is shown by the still picture that it left
myst_enable_extensions = ["dollarmath", "colon_fence", "deflist"]
myst_heading_anchors = 4
bibtex_bibfiles = ["references.bib"]
bibtex_reference_style = "author_year"
add_module_names = False
python_use_unqualified_type_names = True
maximum_signature_line_length = 90
toc_object_entries_show_parents = "hide"
copybutton_selector = ".highlight-python pre, .highlight-ipython3 pre, .highlight-sh pre, .highlight-bash pre"

html_theme = "pydata_sphinx_theme"
html_title = f"companion {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_favicon = "_static/icon.svg"
html_math_renderer = "mathml"
html_show_sourcelink = False
html_copy_source = False
html_theme_options = {
    "logo": {"text": "companion"},
    "navbar_align": "left",
    "navigation_with_keys": False,
    "secondary_sidebar_items": ["page-toc"],
    "footer_start": ["copyright"],
    "footer_end": [],
    "show_prev_next": True,
    "header_links_before_dropdown": 7,
    **({"github_url": REPOSITORY} if "github.com" in REPOSITORY else {}),
}
html_sidebars = {"index": [], "reference/*": [], "changelog": []}


def visit_math(translator, node):
    translator.body.append(mathml(node.astext(), block=False))
    raise nodes.SkipNode


def visit_displaymath(translator, node):
    translator.body.append(f'<div class="math">{mathml(node.astext(), block=True)}</div>')
    raise nodes.SkipNode


class ExactNames(PythonDomain):
    """Every reference here is by its full name: no search among all names, which is slow and guesses."""

    def find_obj(self, env, modname, classname, name, type, searchmode=0):
        return super().find_obj(env, modname, classname, name, type, 0)


def setup(app):
    app.add_domain(ExactNames, override=True)
    # Browsers set MathML by themselves: no MathJax, which would have to be fetched or shipped.
    app.add_html_math_renderer("mathml", (visit_math, None), (visit_displaymath, None))
    app.add_js_file(None, body=f'addEventListener("load", () => {{{LOWER}}});')
