"""Tokens of captions, against the Java program of the published evaluation where it is installed."""

import random
import shutil
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dreamllm.evaluation.metrics import bleu, cider_d, ptb_tokens, rouge_l, tokenised
from dreamllm.evaluation.metrics.ptb import PUNCTUATION

# Tokens as the Java program prints them, punctuation dropped.
RECORDED = {
    "A man's dog, on the beach.": "a man 's dog on the beach",
    "Don't can't won't ain't I'm you're they've we'd she'll cannot gonna": (
        "do n't ca n't wo n't ai n't i 'm you 're they 've we 'd she 'll can not gon na"
    ),
    "a (small) [box] {curly} \"quoted text\" 'single'": (
        "a -lrb- small -rrb- -lsb- box -rsb- -lcb- curly -rcb- quoted text single"
    ),
    "It costs $5.00 or £3, €4 50% #1 & AT&T": "it costs $ 5.00 or # 3 $ 4 50 % # 1 & at&t",
    "Mr. Smith met Dr. Jones at 5 p.m. on Jan. 5th in the U.S. and U.S.A.": (
        "mr. smith met dr. jones at 5 p.m. on jan. 5th in the u.s. and u.s.a."
    ),
    "well-known black-and-white T-shirt 10-year-old 3-4": "well-known black-and-white t-shirt 10-year-old 3-4",
    "one/two and/or 1/2 3 1/2 10/12/2010 12:30 1,000,000 3.14 1990s '90s": (
        "one/two and/or 1/2 3\u00a01/2 10/12/2010 12:30 1,000,000 3.14 1990s '90s"
    ),
    "wait... what.... ok?! !!! -- --- a--b a - b \u2013 \u2014 a\u2014b": "wait what ok ?! !!! a b a b a b",
    "naïve café 日本語 привет \U0001f600 ½ …": "naïve café 日本語 привет 1/2",
    "dogs' tails and the boys' 'hello'": "dogs tails and the boys hello",
    "a cat.a dog,and a bird;a fish": "a cat.a dog and a bird a fish",
    "the clock reads 4:30pm. 8.8MB v2.10": "the clock reads 4:30 pm 8.8 mb v2 .10",
    "http://www.example.com/a?b=1 foo@bar.com @user #hashtag": (
        "http://www.example.com/a?b=1 foo@bar.com @user #hashtag"
    ),
    "a b\tc   d": "a b c d",
    "": "",
    '.,;: -- "': "",
}


@pytest.mark.parametrize("text", RECORDED)
def test_tokens_are_those_of_the_published_program(text):
    assert ptb_tokens(text) == RECORDED[text]


def test_recorded_tokens_are_what_the_program_prints():
    pytest.importorskip("pycocoevalcap")
    if shutil.which("java") is None:
        pytest.skip("the published tokenizer needs Java")
    # One character of the recorded set is outside the Basic Multilingual Plane; the program warns and goes on.
    assert tokenised(list(RECORDED), "stanford") == [" ".join(t.split(" ")) for t in RECORDED.values()]


def test_scores_of_real_captions_are_those_of_the_whole_published_program():
    """Names of Unicode's pictographs as captions: every metric within 1e-6, tokens by Java there and by us here."""
    pytest.importorskip("pycocoevalcap")
    if shutil.which("java") is None:
        pytest.skip("the published tokenizer needs Java")
    names = [unicodedata.name(chr(code), "").lower() for code in range(0x1F300, 0x1FAFF)]
    rng = random.Random(0)
    texts = [
        f"A picture of {name}, {rng.choice(WORDS)} {rng.choice(names)}{rng.choice(ENDS)}" for name in names if name
    ]
    candidates = [f"A {' '.join(text.split()[2:-1])} {rng.choice(WORDS)}{rng.choice(ENDS)}" for text in texts]
    scores = []
    for tokenizer in ("own", "stanford"):
        given = tokenised(candidates, tokenizer)
        references = [[text] for text in tokenised(texts, tokenizer)]
        scores.append(
            [m.corpus for m in (cider_d(given, references), rouge_l(given, references), *bleu(given, references))]
        )
    assert len(texts) > 1500
    assert scores[0] == pytest.approx(scores[1], abs=1e-6)


WORDS = (
    "a man's dog",
    "don't walk",
    "it's 10-year-old",
    "U.S. flag (red)",
    "Mr. Smith",
    "3/4 of it",
    'the "stop" sign',
)
ENDS = (".", "", "!", " ...", "?!")


@given(st.text())
def test_any_text_has_tokens_without_punctuation_and_spaces(text):
    tokens = ptb_tokens(text).split(" ")
    assert not PUNCTUATION & set(tokens)
    assert all(tokens) or tokens == [""]


@given(st.lists(st.sampled_from(["a", "dog", "on", "the", "red", "frisbees"])))
def test_plain_words_stay(words):
    assert ptb_tokens(" ".join(words)) == " ".join(words)


def test_the_java_tokenizer_is_asked_for_by_name(monkeypatch):
    monkeypatch.setattr("dreamllm.evaluation.metrics.captions.PTBTokenizer", None)
    with pytest.raises(ImportError, match="comes with pycocoevalcap; install it, or use the tokenizer 'own'"):
        tokenised(["a"], "stanford")
