"""How Sphinx builds the site: `nox -s docs`."""

import inspect
import re

from sphinx.util import logging

import keras_normopt
import keras_normopt.experiments  # Not imported by the package itself.

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
html_theme = "furo"
html_title = "keras_normopt"
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

MODULES = ("callbacks", "experiments", "norms", "optimizers", "step_sizes", "testing")


def translate_links(app, what, name, obj, options, lines):
    """Turns links of Markdown into those of reStructuredText."""
    text = "\n".join(lines)
    text = re.sub(
        r"\[([^]]+)\]\((https?:[^)]+)\)",
        lambda m: f"`{' '.join(m[1].split())} <{m[2]}>`__",
        text,
    )
    lines[:] = text.split("\n")


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
    app.connect("autodoc-process-docstring", translate_links)
    app.connect("env-check-consistency", check_all_is_documented)
