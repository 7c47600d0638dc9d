"""Runs the programs in the pages of the documentation."""

import functools
import importlib.util
import pathlib
import re
import unittest

from sybil.document import Document
from sybil.parsers.markdown import PythonCodeBlockParser, SkipParser

ROOT = pathlib.Path(__file__).parents[2]


def installed(package):
    return importlib.util.find_spec(package) is not None


@functools.cache
def evaluate(page):
    """Runs the code of a page and returns the names that it defines."""
    document = Document.parse(str(page), PythonCodeBlockParser(), SkipParser())
    document.namespace["installed"] = installed  # Skip conditions call it.
    skipped = 0
    for example in document.examples():
        try:
            example.evaluate()
        except unittest.SkipTest:
            skipped += 1
    text = page.read_text()
    other_backends = 2 * text.count("skip: next if(keras.backend") / 3
    packages = re.findall(r"skip: next if\(not installed\(\"(\w+)\"", text)
    assert skipped == other_backends + sum(not installed(p) for p in packages)
    return document.namespace
