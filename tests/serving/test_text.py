"""Tokens to text: nothing is split, nothing is lost, and no stop string shows a part of itself."""

from hypothesis import given
from hypothesis import strategies as st

from serving.text import Detokenizer, StopMatcher, TextStream
from tests import tiny

TOKENIZER = tiny.tokenizer()


@given(st.text(max_size=40))
def test_streamed_text_is_the_whole_text(text: str) -> None:
    ids = TOKENIZER.encode(text).ids
    decoder = Detokenizer(TOKENIZER)
    parts = [decoder.feed(i) for i in ids]
    assert "".join(parts) + decoder.flush() == TOKENIZER.decode(ids)
    assert not any("\ufffd" in part for part in parts if "\ufffd" not in text)


@given(st.lists(st.integers(0, 299), max_size=60))
def test_any_tokens_come_out_as_the_tokenizer_decodes_them(ids: list[int]) -> None:
    """Also bytes that are no UTF-8."""
    decoder = Detokenizer(TOKENIZER)
    assert "".join(decoder.feed(i) for i in ids) + decoder.flush() == TOKENIZER.decode(ids)


@given(
    st.text("abc", max_size=30),
    st.lists(st.text("abc", min_size=1, max_size=5), min_size=1, max_size=3),
    st.lists(st.integers(1, 4), min_size=30, max_size=30),
)
def test_text_ends_before_the_first_stop_string(text: str, stops: list[str], cuts: list[int]) -> None:
    matcher = StopMatcher(stops)
    out, at = "", 0
    for cut in cuts:
        out += matcher.feed(text[at : at + cut])
        at += cut
        first = min((i for s in stops if (i := text.find(s)) >= 0), default=len(text))
        assert text[:first].startswith(out), "a part of a stop string leaked"
    out += matcher.flush()
    ends = [i + len(s) for s in stops if (i := text.find(s)) >= 0]
    if matcher.matched is None:
        assert out == text and not ends
    else:
        assert out + matcher.matched in text


def test_tokens_after_the_stop_do_not_count_and_an_ending_is_not_text() -> None:
    ids = TOKENIZER.encode("def f(x):").ids
    stream = TextStream(TOKENIZER, ["f("], frozenset())
    parts, rest = stream.feed(ids, last=False)
    assert stream.stopped and "".join(parts) + rest == "def " and len(parts) < len(ids)
    ended = TextStream(TOKENIZER, [], frozenset({5}))
    parts, rest = ended.feed([*ids, 5], last=True)
    assert "".join(parts) + rest == "def f(x):" and len(parts) == len(ids) + 1
