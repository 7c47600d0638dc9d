"""Checks that sentences are short: at most 25 words, in docstrings, comments and pages.

`python tests/plain_english.py PATH...` prints each longer sentence, and fails if there
is one. In pages, it also checks that lines have at most 120 characters.
"""

import ast
import io
import pathlib
import re
import sys
import tokenize

WORDS, LINE = 25, 120
# Abbreviations whose dot does not end a sentence.
ABBREVIATION = re.compile(r"\b(e\.g|i\.e|etc|cf|vs|et al|Fig|Eq)\.")
# Lines that start a new paragraph: an item, a heading, a row, an entry of `Args`.
NEW = re.compile(
    r"\s*([-*+]|\d+\.)\s|\s*\||\s*#|\s*>>>|\s*\.\. |\s*\w[\w, *`.]*:(\s|$)"
)


def long_sentences(text):
    """Yields the sentences of a text that have too many words."""
    for paragraph in paragraphs(text):
        for sentence in sentences(paragraph):
            if len(words(sentence)) > WORDS:
                yield sentence


def paragraphs(text):
    """Splits a text at empty lines and before each item, row or entry."""
    lines: list[str] = []
    for line in [*text.splitlines(), ""]:
        if (not line.strip() or NEW.match(line)) and lines:
            yield " ".join(lines)
            lines = []
        if line.strip():
            lines.append(line.strip())


def sentences(paragraph):
    """Splits a paragraph after dots, colons, question marks and table cells."""
    text = ABBREVIATION.sub(lambda match: match[0][:-1], paragraph)
    return re.split(r"(?<=[.:;?!])[)*\"”]*\s+|\s*\|\s*", text)


def words(sentence):
    """Returns the words of a sentence. Code, formulas and links count as one word."""
    text = re.sub(r"!?\[([^]]*)\]\([^)]*\)", r"\1", sentence)
    text = re.sub(r"``.*?``|`[^`]*`", "code", text)
    text = re.sub(r"\([^()\s]*\)", "", text)
    return re.findall(r"[^\W\d_][\w'’-]*", text)


def of_page(text):
    """Yields the line number and text of each problem in a Markdown page."""
    prose = re.sub(
        r"^( *)(```|~~~).*?^\1\2 *$",
        lambda match: "\n" * match[0].count("\n"),
        text,
        flags=re.S | re.M,
    )
    for number, line in enumerate(prose.splitlines(), 1):
        if len(line) > LINE and not line.lstrip().startswith(("|", "![")):
            yield number, f"{len(line)} characters: {line.strip()[:60]}…"
    for sentence in long_sentences(prose):
        start = sentence.split()[:3]
        match = re.search(r"\s+".join(map(re.escape, start)), prose)
        number = prose.count("\n", 0, match.start()) + 1 if match else 1
        yield number, f"{len(words(sentence))} words: {sentence}"


def of_module(source):
    """Yields the line number and text of each problem in docstrings and comments."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(
            node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
        ):
            text = ast.get_docstring(node)
            for sentence in long_sentences(without_code(text or "")):
                line = getattr(node, "lineno", 1)
                yield line, f"{len(words(sentence))} words: {sentence}"
    for line, text in comments(source):
        for sentence in long_sentences(text):
            yield line, f"{len(words(sentence))} words: {sentence}"


def without_code(docstring):
    """Removes examples and formulas from a docstring."""
    lines = docstring.splitlines()
    kept = [
        "" if re.match(r"\s*(>>>|\.\.\. |\.\.\.$)", line) or "←" in line else line
        for line in lines
    ]
    return "\n".join(kept)


def comments(source):
    """Yields line numbers and texts of comments. Joins comments on adjacent lines."""
    texts: list[str] = []
    start = last = column = 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT:
            continue
        row, place = token.start
        text = token.string.lstrip("#: ")
        if texts and row == last + 1 and place == column:
            texts.append(text)
        else:
            if texts:
                yield start, "\n".join(texts)
            texts, start, column = [text], row, place
        last = row
    if texts:
        yield start, "\n".join(texts)


def main(paths):
    """Prints the problems of all files, and returns their number."""
    count = 0
    for path in paths:
        files = sorted(path.rglob("*.py")) if path.is_dir() else [path]
        for file in files:
            check = of_page if file.suffix == ".md" else of_module
            for line, problem in sorted(check(file.read_text())):
                count += 1
                print(f"{file}:{line}: {problem}")
    return count


if __name__ == "__main__":
    sys.exit(min(main(map(pathlib.Path, sys.argv[1:])), 1))
