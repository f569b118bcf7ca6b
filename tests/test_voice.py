"""The words of this project are the field's: docstrings, messages and prose, as far as a test can tell."""

import ast
import io
import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = [
    path
    for folder in ("lit_tokenformer", "callbacks", "benchmarks", "examples")
    for path in sorted((ROOT / folder).rglob("*.py"))
]
PROSE = [
    path
    for pattern in ("*.md", "docs/**/*.md", "benchmarks/**/*.md", "configs/*.yaml", "notebooks/*.ipynb")
    for path in sorted(ROOT.glob(pattern))
    if path.name != "CHANGELOG.md"
]

OPENERS = {
    "what",
    "how",
    "which",
    "who",
    "whose",
    "where",
    "when",
    "whether",
    "makes",
    "gives",
    "tells",
    "lets",
    "does",
    "is",
    "are",
    "has",
}
"""Words that begin no docstring."""

THIRD_PERSON = re.compile(
    r"(adds?|appends?|applies|asks?|averages?|begins?|brings?|builds?|calls?|carries|changes?|checks?|chooses?|clears?|"
    r"collects?|compares?|computes?|continues|copies|counts?|creates?|decides?|decodes?|divides?|draws?|drops?|ends?|"
    r"fills?|finds?|forgets?|frees?|goes|grows?|guesses|holds?|inserts?|keeps?|leaves?|loads?|looks?|maps?|measures?|"
    r"moves?|names?|opens?|prints?|puts?|raises?|reads?|refuses?|rejects?|removes?|repeats?|replaces?|reports?|resumes?|"
    r"returns?|runs?|samples?|saves?|scales?|sees?|seeds?|sets?|shards?|shows?|skips?|sorts?|splits?|starts?|stops?|"
    r"stores?|swaps?|takes?|trains?|tries|turns?|updates?|waits?|warns?|wraps?|writes?|yields?)"
)
"""Verbs whose third person ("Returns ...") is not the imperative ("Return ...")."""

NOT_USED = {
    r"\btold\b": "reported",
    r"\btells?\b": "reports, shows",
    r"\banew\b": "again, from scratch",
    r"\bgo(es|ing)? on\b": "continue",
    r"\bwent on\b": "continued",
    r"\bbeside\b": "next to, compared with",
    r"\b(is|are|was|were) no\b": "is not a, non-",
    r"\bborn\b": "initialized",
    r"\bat birth\b": "initially",
    r"\bstands?\b": "is",
    r"\bso many\b": "this many",
    r"\b(come|came|comes) to\b": "reach, result",
    r"\bput together\b": "combined",
    r"\b(take|taken|takes) apart\b": "split",
    r"\bin vain\b": "without effect",
    r"\blies\b|\blie\b": "is",
    r"\broom\b": "space, memory",
    r"\bthe field knows\b": "",
    r"\blearned numbers\b": "trainable parameters",
    r"\bfor ever\b": "forever",
}
"""Words that have a term of the field in their place."""

BRITISH = re.compile(
    r"\w*(normalis|initialis|tokenis|penalis|optimis|organis|recognis|generalis|quantis|vectoris|serialis|synchronis|"
    r"parallelis(?!m)|summaris|regularis|utilis|visualis|specialis|minimis|maximis|colour|behaviour|modell(ing|ed)|"
    r"label(ling|led)|favour|neighbour|centre\b|analys(e|ed|ing)\b|licence\b|catalogue)\w*",
    re.IGNORECASE,
)


def documented(path):
    """Docstrings of modules, classes and functions, with the line that each begins at."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield getattr(node, "lineno", 1), ast.get_docstring(node) or "-"


def written(path):
    """Comments and strings of a source, with their lines; names of options and keys are no prose and have no spaces."""
    for token in tokenize.generate_tokens(io.StringIO(path.read_text(encoding="utf-8")).readline):
        if token.type == tokenize.COMMENT or (token.type == tokenize.STRING and " " in token.string):
            for number, line in enumerate(token.string.splitlines()):
                yield token.start[0] + number, line


def where(path, line, text):
    return f"{path.relative_to(ROOT)}:{line}: {text}"


def test_docstrings_begin_with_an_imperative_or_a_noun_phrase():
    wrong = []
    for path in SOURCES:
        for line, text in documented(path):
            first = re.match(r"\W*([\w-]+)", text)
            word = first[1].lower() if first else ""
            verb = THIRD_PERSON.fullmatch(word)
            if word in OPENERS or (verb and word.endswith("s") and not word.endswith("ss")):
                wrong.append(where(path, line, text.splitlines()[0]))
    assert not wrong, f"{len(wrong)} docstrings:\n" + "\n".join(wrong)


@pytest.mark.parametrize("pattern", NOT_USED)
def test_words_that_have_a_term_are_not_used(pattern):
    found = []
    for path in SOURCES:
        found += [where(path, n, line.strip()) for n, line in written(path) if re.search(pattern, line, re.IGNORECASE)]
    for path in PROSE:
        lines = enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        found += [where(path, n, line.strip()[:160]) for n, line in lines if re.search(pattern, line, re.IGNORECASE)]
    assert not found, f"write {NOT_USED[pattern]!r}; {len(found)} lines:\n" + "\n".join(found)


def test_spelling_is_american():
    found = []
    for path in [*SOURCES, *PROSE]:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            found += [where(path, number, word[0]) for word in BRITISH.finditer(line)]
    assert not found, f"{len(found)} words:\n" + "\n".join(found)
