"""The embedded corpus is the text that its provenance describes, and is clean."""

import hashlib
import re
from collections import Counter

import pytest

from disco import corpus


@pytest.fixture(scope="module")
def documents():
    return list(corpus.documents())


@pytest.fixture(scope="module")
def provenance():
    return corpus.PATH.with_name("PROVENANCE.md").read_text()


def test_text_and_file_are_those_of_the_provenance(provenance):
    text = corpus.text()
    assert f"{len(text):,} bytes" in provenance
    assert hashlib.sha256(text).hexdigest() in provenance
    assert hashlib.sha256(corpus.PATH.read_bytes()).hexdigest() in provenance


def test_documents_are_those_of_the_provenance(documents, provenance):
    names = [name for name, _ in documents]
    assert names == sorted(set(names))
    sizes = Counter()
    for name, text in documents:
        sizes[name.split("/")[0]] += len(text.encode())
    counts = Counter(name.split("/")[0] for name in names)
    table = re.findall(r"^\| `(\w+)/\*`, (\d+) \| ([\d,]+) \|", provenance, re.MULTILINE)
    assert {author: (int(count), int(size.replace(",", ""))) for author, count, size in table} == {
        author: (counts[author], sizes[author]) for author in ("austen", "bible", "milton", "shakespeare")
    }


def test_text_is_the_documents_each_followed_by_a_blank_line(documents):
    assert corpus.text().decode() == "".join(f"{text}\n\n" for _, text in documents)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("austen/pride_and_prejudice", "It is a truth universally acknowledged, that a single man in possession\nof a"),
        ("bible/01-genesis", "Genesis 1\n\nIn the beginning God created the heaven and the earth.\nAnd the earth"),
        ("bible/43-john", "\nJesus wept.\n"),
        ("milton/paradise_lost", "Of Mans First Disobedience, and the Fruit\nOf that Forbidden Tree"),
        ("milton/paradise_regained", "and brought'st him thence\nBy proof"),  # a line number stood here
        ("shakespeare/hamlet", "To be, or not to be,--that is the question:--"),
    ],
)
def test_known_sentences(documents, name, sentence):
    assert sentence in dict(documents)[name]


def test_bible_is_complete_and_has_no_verse_numbers(documents):
    books = [text for name, text in documents if name.startswith("bible/")]
    lines = [line for book in books for line in book.split("\n") if line]
    headings = [line for line in lines if re.fullmatch(r"[\w ]+ \d+", line)]
    assert (len(books), len(headings), len(lines) - len(headings)) == (66, 1189, 31102)
    assert not any(re.match(r"\d+ ", line) for line in lines if line not in headings)


def test_text_is_clean(documents):
    for name, text in documents:
        assert text == text.strip(), name
        assert not any(space in text for space in ("  ", " \n", "\n ", "\n\n\n", "\t", "\r")), f"{name}: white space"
        assert {c for c in text if not (" " <= c <= "~") and not c.isalpha()} <= {"\n", "£"}, f"{name}: odd characters"
        assert not set("_@") & set(text), f"{name}: markup"
        lower = text.lower()
        assert not any(word in lower for word in ("gutenberg", "http", "copyright", "ebook", "this edition")), name
