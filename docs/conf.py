"""Configuration of Sphinx. Notebooks keep their stored outputs, formulas become MathML, and no page loads anything from another server."""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from latex2mathml.converter import convert
from pages import repository, settings

project, release, author = (settings()[key] for key in ("lib_name", "version", "author"))
copyright = author
language = "en"
root_doc = "index"
extensions = ["myst_nb"]

nb_execution_mode = "off"
nb_render_markdown_format = "myst"
nb_ipywidgets_js = {}
nb_merge_streams = True
myst_enable_extensions = ["dollarmath", "amsmath"]
myst_update_mathjax = False
myst_heading_anchors = 3

html_theme = "furo"
html_title = f"{project} {release}"
html_static_path = [str(Path(__file__).parent / "static")]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sourcelink = False
html_show_sphinx = False
html_math_renderer = "mathml"
if repository(): html_theme_options = {"source_repository": repository(), "source_branch": "main", "top_of_page_buttons": []}


def mathml(display):
    "A renderer of formulas: browsers draw MathML themselves, and screen readers read it"
    def visit(writer, node):
        from docutils import nodes
        formula = convert(node.astext(), display=display)
        writer.body.append(f'<div class="math">{formula}</div>' if display == "block" else formula)
        raise nodes.SkipNode
    return visit, None


def setup(app):
    app.add_html_math_renderer("mathml", mathml("inline"), mathml("block"))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
