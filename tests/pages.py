"""Runs the programs that the pages of the documentation show."""

import functools
import pathlib
import unittest

from sybil.document import Document
from sybil.parsers.markdown import PythonCodeBlockParser, SkipParser

ROOT = pathlib.Path(__file__).parents[1]


@functools.cache
def evaluate(page):
    """Runs the code of a page, and returns the names that it defined."""
    document = Document.parse(str(page), PythonCodeBlockParser(), SkipParser())
    skipped = 0
    for example in document.examples():
        try:
            example.evaluate()
        except unittest.SkipTest:  # A block for another backend.
            skipped += 1
    assert skipped == 2 * page.read_text().count("<!--- skip") / 3
    return document.namespace
