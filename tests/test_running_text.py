"""lab/running_text.py: splitting into sentences, and pairs with the next sentence."""

import json
import lzma

import numpy as np
import pytest
from conftest import ROOT

from data import Tokenizer
from engine.errors import UserError
from engine.tokens import TokenizedSentences
from lab.running_text import read_running_text, read_with_next, split_sentences


@pytest.mark.parametrize(
    "paragraph, sentences",
    [
        ("One. Two! Three? Four", ["One.", "Two!", "Three?", "Four"]),
        ('He said "Go." Then "(Stop.)" 5 left.', ['He said "Go."', 'Then "(Stop.)"', "5 left."]),
        ("“So?” ‘No.’ (Yes.) Ünal came.", ["“So?”", "‘No.’", "(Yes.)", "Ünal came."]),
        ("Dr. No met Mr. J. R. R. Smith, Jr. Jones and the U.S. Senate in Feb. 1990.", None),
        ("See vol. 3, No. 5, pp. 7 and fig. 2, e.g. Berlin, cf. Paris et al. 1999, c. 1880.", None),
        ("Is it No. No. It is in 1990. It was.", ["Is it No.", "No.", "It is in 1990.", "It was."]),
        ("In CA. The rest. it was late... or so", ["In CA.", "The rest. it was late... or so"]),
        ("Really?! Yes...  Well.\u00a0Good", ["Really?!", "Yes...", "Well.", "Good"]),
        ("", []),
        ("   ", []),
        ("No end", None),
    ],
)
def test_paragraphs_are_cut_after_sentences_and_not_after_abbreviations(paragraph, sentences):
    assert split_sentences(paragraph) == ([paragraph] if sentences is None else sentences)


def test_the_splitter_is_the_one_whose_errors_were_counted():
    counted = json.loads((ROOT / "results" / "splitter.json").read_text())
    for place in counted["places"]:
        *cut, _ = split_sentences(f"{place['before']} {place['after']}")
        is_cut = any(place["before"].endswith(sentence) for sentence in cut)
        assert is_cut == place["cut"], place
    wrong = [place["cut"] for place in counted["places"] if not place["right"]]
    assert len(counted["places"]) == counted["cut"] + counted["kept"] == 400
    assert [counted["cut wrongly"], counted["kept wrongly"]] == [sum(wrong), wrong.count(False)]


def test_sentences_with_the_next_one_of_their_document(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    content = b"A one. B two.\nC three.\r\n\n\n  \nAlone.\n\nD four.  E five. \n"
    (path := tmp_path / "Text.TXT.xz").write_bytes(lzma.compress(content))
    pairs = [("A one.", "B two."), ("B two.", "C three."), ("D four.", "E five.")]
    assert list(read_with_next(path)) == pairs
    assert list(read_running_text(path)) == [(first,) for first, _ in pairs]
    tokenizer = Tokenizer(ROOT / "assets" / "small-bert")
    alone = TokenizedSentences(path, tokenizer, 16, reader=read_running_text)
    both = TokenizedSentences(path, tokenizer, 16, reader=read_with_next, views=4)
    assert len(alone) == len(both) == 3 and (alone.views, both.views) == (2, 4)
    assert len(list((tmp_path / "cache" / "diffcse").iterdir())) == 2  # an entry for each reader
    for sentences, repeated in ((alone, 1), (both, 2)):
        x, mask = sentences.rows(np.array([2, 0]))
        views = [text for pair in (pairs[2], pairs[0]) for _ in "12" for text in pair[:repeated]]
        assert [row[m].tolist() for row, m in zip(x, mask)] == tokenizer(views, 16)


@pytest.mark.parametrize("name", ["text.tsv", "text.csv.gz", "text", "text.xz", "txt"])
def test_running_text_must_be_a_txt_file(tmp_path, name):
    with pytest.raises(UserError, match="running text must be a .txt file"):
        next(read_running_text(tmp_path / name))
