"""Answers -> content, and content -> turns again."""

from dreamllm.documents import Document, Picture, Text, chat_template
from dreamllm.server import Limits
from dreamllm.server.prompts import chat_document, load_pictures, pictures_of, read_turns
from dreamllm.server.replies import Composer, content_of
from dreamllm.server.schemas import ChatRequest, parse
from tests.server.support import chat, image_part, text_part
from tests.tiny import random_picture

PLAIN = chat_template("plain")


def test_pictures_stand_between_their_texts():
    content = content_of(answer("One:", random_picture(1), "Two.", random_picture(2)))
    assert content.startswith("One:\n\n![picture 1](data:image/png;base64,")
    assert ")\n\nTwo.\n\n![picture 2](" in content


def test_pieces_make_the_same_content_as_the_whole():
    composer = Composer()
    picture = random_picture(1)
    pieces = [
        composer.text("On"),
        composer.text("e"),
        composer.picture(picture),
        composer.text("Tw"),
        composer.text("o"),
    ]
    assert "".join(pieces) == content_of(answer("One", picture, "Two"))


def answer(*pieces):
    return Document(tuple(Text(p) if isinstance(p, str) else Picture(p, creation=True) for p in pieces))


def document_of(*messages, system=None):
    request = chat(*messages)
    if system is not None:
        request["messages"].insert(0, {"role": "system", "content": system})
    system, turns = read_turns(parse(ChatRequest, request).messages, Limits())
    return chat_document(system, turns, load_pictures(pictures_of(turns), {}, Limits()), PLAIN)


def shown(document):
    return [part.text if isinstance(part, Text) else type(part).__name__ for part in document.parts]


def test_an_answer_sent_back_is_what_it_was():
    pictures = [random_picture(seed) for seed in (1, 2)]
    content = content_of(answer(pictures[0], "One", pictures[1], "Two\nthree"))
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
