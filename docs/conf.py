"""How Sphinx builds the site: `nox -s docs`."""

import inspect
import os
import pathlib
import pydoc
import re

from docutils import nodes
from sphinx import addnodes
from sphinx.errors import ExtensionError
from sphinx.util import logging

import keras_normopt
from keras_normopt.optimizers import CLIPPED, NORMALIZED, ORTHOGONAL

project = "keras_normopt"
version = release = keras_normopt.__version__
author = "The keras_normopt developers"
copyright = f"2026, {author}"

extensions = [
    "matplotlib.sphinxext.plot_directive",
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinxext.opengraph",
]
# The first holds a copy of the notebook, with outputs. The second is part of a page.
exclude_patterns = ["_build", "results/map.md"]
html_theme = "furo"
html_title = f"{project} {release}"
html_static_path = ["static"]
html_css_files = ["pages.css"]
html_favicon = "static/icon.svg"
# The address of the site, which previews need. Without it, links are relative.
html_baseurl = os.environ.get("READTHEDOCS_CANONICAL_URL", "")
ogp_site_url = html_baseurl
ogp_site_name = project
ogp_image = "_images/demo.png"
ogp_image_alt = "Accuracy of five optimizers on 30 layers: OrthogonalSGD is best."
ogp_social_cards = {"enable": False}
ogp_custom_meta_tags = ['<meta name="twitter:card" content="summary_large_image" />']
myst_enable_extensions = ["dollarmath", "substitution"]
# A price or a variable of a shell is no formula.
myst_dmath_allow_digits = myst_dmath_allow_space = False
myst_heading_anchors = 3
# Formulas wrap on a phone.
mathjax4_config = {"output": {"displayOverflow": "linebreak"}}
# The notebook is kept without outputs; the site shows those of this build.
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 600
nb_output_stderr = "remove"  # Progress.
plot_formats = [("png", 160)]
plot_html_show_formats = plot_html_show_source_link = False

# Docstrings are Markdown, as Keras's are: code between single backticks.
default_role = "code"
autodoc_typehints = "none"  # They are in the text.
napoleon_use_ivar = True  # A list of attributes, rather than an entry for each.


def table(aliases):
    """Ready-made optimizers, in Markdown."""
    rows = ["| class | string | base |", "|---|---|---|"]
    for alias, cls in aliases.items():
        link = f"{{py:class}}`~keras_normopt.optimizers.{cls.__name__}`"
        base, _ = cls._made_from
        rows.append(f'| {link} | `"{alias}"` | `{base.__name__}` |')
    return "\n".join(rows)


myst_substitutions = {
    "normalized": table(NORMALIZED),
    "orthogonal": table(ORTHOGONAL),
    "clipped": table(CLIPPED),
}

MODULES = ("callbacks", "directions", "experiments", "norms", "optimizers")
MODULES += ("step_sizes", "testing")


def translate(app, what, name, obj, options, lines):
    """Turns links and indented code of Markdown into those of reStructuredText."""
    text = "\n".join(lines)
    text = re.sub(
        r"\[([^]]+)\]\((https?:[^)]+)\)",
        lambda m: f"`{' '.join(m[1].split())} <{m[2]}>`__",
        text,
    )
    text = re.sub(r"^(?![:.])(\S.*)\n\n(?=    \S)", r"\1\n\n::\n\n", text, flags=re.M)
    lines[:] = text.split("\n")


def shorten(app, what, name, obj, options, lines):
    """Leaves the summary, where a class differs from the first in its base only."""
    for first, *others in (NORMALIZED.values(), CLIPPED.values()):
        if obj in others:
            base, _ = obj._made_from
            lines[1:] = [
                "",
                f"Takes the arguments of `keras.optimizers.{base.__name__}`, and the "
                f"keyword-only ones of :py:class:`{first.__name__}`.",
            ]


def prepare_figures(app, doctree):
    """Links each figure to its file, and lets all but the maps scroll on a phone."""
    for image in doctree.findall(nodes.image):
        image["scale"] = 100  # Sphinx links images that have a scale.
        is_block = isinstance(image.parent, nodes.paragraph | nodes.figure)
        if is_block and "/map-" not in image["uri"]:
            image.parent["classes"].append("wide-figure")


def show_formulas(app, doctree):
    """Sets blocks of update rules, such as `g ← g / norm(g)`, as formulas."""
    for block in list(doctree.findall(nodes.literal_block)):
        lines = block.astext().strip().splitlines() or [""]
        if all("←" in line for line in lines):
            source = " \\\\\n".join(latex(line) for line in lines)
            if len(lines) == 1:
                source = source.replace("&", "")  # There is nothing to align.
            block.replace_self(
                nodes.math_block(source, source, number=None, label=None)
            )


def latex(formula):
    """Translates a formula of the docstrings."""
    signs = {
        "←": r"&\leftarrow",
        "·": r"\cdot",
        "−": "-",
        "‖": r"\Vert ",
        "ᵀ": r"^\top",
    }
    signs |= {"²": "^2", "₂": "_2"}
    formula = "".join(signs.get(sign, sign) for sign in formula)

    def name(found):
        word = found[0].replace("_", r"\_")
        if word in ("where", "then", "with", "for each"):
            return rf"\quad \text{{{word} }}"
        return rf"\operatorname{{{word}}}" if found[1] else rf"\mathit{{{word}}}"

    # Names, but no commands of LaTeX, and no letter with an index.
    word = r"(?<![\\\w{])(?:for each|[a-z][a-z]+(?:_[a-z]+)*)(?=( ?[(|])?)(?![\w}])"
    return re.sub(word, name, formula)


def write_llms_txt(app, error):
    """Writes `llms.txt`, a list of all pages for language models (llmstxt.org).

    Raises:
        ExtensionError: If a page is neither in the sidebar nor an orphan.
    """
    if error or app.builder.format != "html":
        return
    env, root = app.env, app.config.root_doc
    lines = [f"# {project}", "", f"> {summary(env.get_doctree(root))}"]
    listed = set()
    for tree in env.get_doctree(root).findall(addnodes.toctree):
        lines += ["", f"## {tree['caption']}", ""]
        for title, page in tree["entries"]:
            page = root if page == "self" else page
            listed.add(page)
            link = html_baseurl + app.builder.get_target_uri(page)
            lines.append(f"- [{title}]({link}): {summary(env.get_doctree(page))}")
    # Pages that others link to, instead of the sidebar, say so.
    others = sorted(page for page in env.metadata if "orphan" in env.metadata[page])
    lines += ["", "## Optional", ""]
    for page in others:
        link = html_baseurl + app.builder.get_target_uri(page)
        lines.append(f"- [{env.titles[page].astext()}]({link})")
    if missing := env.found_docs - listed - set(others):
        raise ExtensionError(f"Not in the sidebar, and so not in llms.txt: {missing}")
    pathlib.Path(app.outdir, "llms.txt").write_text("\n".join(lines) + "\n")


def summary(doctree):
    """Returns the first two sentences of a page."""
    for paragraph in doctree.findall(nodes.paragraph):
        text = " ".join(paragraph.astext().split())
        if text:
            return " ".join(re.split(r"(?<=[.?!])\s+(?=[A-Z`])", text)[:2])
    return ""


def check_all_is_documented(app, env):
    """Warns, which fails the build, of public names without docstring or entry."""
    public = {f"keras_normopt.{name}" for name in keras_normopt.__all__}
    for module in MODULES:
        names = getattr(keras_normopt, module).__all__
        public |= {f"keras_normopt.{module}.{name}" for name in names}
    objects = env.domains.python_domain.objects
    entries = {id(pydoc.locate(name)) for name in objects}
    for name in sorted(public):
        found = pydoc.locate(name)
        if not inspect.getdoc(found):
            logging.getLogger(__name__).warning("%s has no docstring", name)
        if id(found) not in entries:
            logging.getLogger(__name__).warning("%s is not in the reference", name)


def setup(app):
    app.connect("autodoc-process-docstring", translate)
    app.connect("autodoc-process-docstring", shorten)
    app.connect("doctree-read", prepare_figures)
    app.connect("doctree-read", show_formulas)
    app.connect("env-check-consistency", check_all_is_documented)
    app.connect("build-finished", write_llms_txt)
