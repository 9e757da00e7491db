"""Events -> content, stop strings, and content -> turns again."""

from hypothesis import given
from hypothesis import strategies as st

from dreamllm.documents import Picture, Text, chat_template
from dreamllm.server import Finished, Limits, PictureDrawn, TextPiece
from dreamllm.server.prompts import chat_document, load_pictures, read_turns
from dreamllm.server.replies import Composer, StopFilter, finish_reason
from dreamllm.server.schemas import ChatRequest, parse
from tests.server.support import chat, image_part, text_part
from tests.tiny import random_picture

PLAIN = chat_template("plain")
letters = st.text("abc", max_size=12)


@given(pieces=st.lists(letters, max_size=6), stops=st.lists(st.text("abc", min_size=1, max_size=3), max_size=3))
def test_stop_strings_do_not_depend_on_how_text_is_cut_into_pieces(pieces, stops):
    filtered = StopFilter(stops)
    shown = ""
    for piece in pieces:
        shown += filtered.feed(piece)
        if filtered.stopped:
            break
    else:
        shown += filtered.flush()
    whole = "".join(pieces)
    # The first stop string to be complete ends the text; of those complete at once, the one that begins first.
    ends = [end for end in range(len(whole) + 1) if any(whole[:end].endswith(stop) for stop in stops)]
    if not ends:
        assert shown == whole
        assert not filtered.stopped
    else:
        assert filtered.stopped
        assert whole.startswith(shown)
        assert not any(stop in shown for stop in stops)
        assert any(whole.startswith(stop, len(shown)) for stop in stops)


def test_no_more_is_held_back_than_may_begin_a_stop_string():
    filtered = StopFilter(["###"])
    assert filtered.feed("one #") == "one "
    assert filtered.feed("# two") == "## two"


def compose(*events, stops=()):
    composer = Composer(stops)
    return "".join([composer.feed(event) for event in events]), composer


def test_pictures_stand_between_their_texts():
    content, _ = compose(TextPiece("One:"), PictureDrawn(random_picture(1)), TextPiece("Two."), Finished("end"))
    assert content.startswith("One:\n\n![picture 1](data:image/png;base64,")
    assert content.endswith(")\n\nTwo.")


def test_nothing_is_shown_after_a_stop_string():
    events = [TextPiece("a STOP b"), PictureDrawn(random_picture(1)), TextPiece("c"), Finished("length")]
    content, composer = compose(*events, stops=["STOP"])
    assert content == "a "
    assert finish_reason(Finished("length"), composer) == "stop"


def test_a_stop_string_does_not_reach_over_a_picture():
    content, composer = compose(TextPiece("ST"), PictureDrawn(random_picture(1)), TextPiece("OP"), stops=["STOP"])
    assert not composer.stopped
    assert content.startswith("ST\n\n![")
    assert content.endswith("\n\nOP")


def document_of(*messages, system=None):
    request = chat(*messages)
    if system is not None:
        request["messages"].insert(0, {"role": "system", "content": system})
    system, turns = read_turns(parse(ChatRequest, request).messages, Limits())
    return chat_document(system, turns, load_pictures(turns, {}, Limits()), PLAIN)


def shown(document):
    return [part.text if isinstance(part, Text) else type(part).__name__ for part in document.parts]


def test_an_answer_sent_back_is_what_it_was():
    pictures = [random_picture(seed) for seed in (1, 2)]
    content, _ = compose(
        PictureDrawn(pictures[0]), TextPiece("One"), PictureDrawn(pictures[1]), TextPiece("Two\nthree"), Finished("end")
    )
    document = document_of("Count", content, "More")
    assert shown(document) == [
        "USER: Count ASSISTANT:",
        "Picture",
        "One",
        "Picture",
        "Two\nthree",
        "End",
        "USER: More ASSISTANT:",
    ]
    drawn = document.pictures()
    assert [picture.source.tobytes() for picture in drawn] == [picture.tobytes() for picture in pictures]
    assert all(picture.creation and picture.comprehension for picture in drawn)


def test_parts_of_a_message_keep_their_order():
    document = document_of([text_part("a"), text_part("b"), image_part(random_picture(1)), text_part("c")])
    assert shown(document) == ["USER: a\nb", "Picture", "c ASSISTANT:"]
    assert document.pictures() == tuple(p for p in document.parts if isinstance(p, Picture) and not p.creation)


def test_markers_in_a_message_stay_text():
    assert shown(document_of("<image> and <dream>")) == ["USER: <image> and <dream> ASSISTANT:"]
    assert shown(document_of("![x](data:image/png;base64,AAAA)")) == [
        "USER: ![x](data:image/png;base64,AAAA) ASSISTANT:"
    ]


def test_a_system_message_takes_the_place_of_the_template_s():
    assert shown(document_of("Hi", system="Be brief.")) == ["Be brief. USER: Hi ASSISTANT:"]
