"""How Sphinx builds the site: `nox -s docs`."""

import inspect
import re

from docutils import nodes
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
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]
exclude_patterns = ["_build"]  # It holds a copy of the notebook, with outputs.
html_theme = "furo"
html_title = f"{project} {release}"
html_static_path = ["static"]
html_css_files = ["pages.css"]
myst_enable_extensions = ["substitution"]
myst_heading_anchors = 3
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


def enlarge_on_click(app, doctree):
    """Sphinx links an image to its file if it has a scale, which no Markdown gives."""
    for image in doctree.findall(nodes.image):
        image["scale"] = 100


def check_all_is_documented(app, env):
    """Warns, which fails the build, of public names without docstring or entry."""
    public = {f"keras_normopt.{name}" for name in keras_normopt.__all__}
    for module in MODULES:
        names = getattr(keras_normopt, module).__all__
        public |= {f"keras_normopt.{module}.{name}" for name in names}
    objects = env.domains.python_domain.objects
    entries = {id(_resolved(name)) for name in objects}
    for name in sorted(public):
        found = _resolved(name)
        if not inspect.getdoc(found):
            logging.getLogger(__name__).warning("%s has no docstring", name)
        if id(found) not in entries:
            logging.getLogger(__name__).warning("%s is not in the reference", name)


def _resolved(name):
    found = keras_normopt
    for part in name.split(".")[1:]:
        found = getattr(found, part, None)
    return found


def setup(app):
    app.connect("autodoc-process-docstring", translate)
    app.connect("autodoc-process-docstring", shorten)
    app.connect("doctree-read", enlarge_on_click)
    app.connect("env-check-consistency", check_all_is_documented)
