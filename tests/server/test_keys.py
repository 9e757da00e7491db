"""Who may use the server."""

import pytest

from dreamllm.server.keys import ApiKeys
from tests.server.support import CHAT, Scripted, chat, hello, serving

GOOD, OTHER = "sk-0123456789abcdef", "sk-fedcba9876543210"


@pytest.fixture(scope="module")
def locked():
    with serving(Scripted(hello), keys=ApiKeys([OTHER, GOOD])) as address:
        yield address


@pytest.mark.parametrize("key", [GOOD, OTHER])
def test_every_key_opens(locked, key):
    assert locked.post(CHAT, chat(), authorization=f"Bearer {key}").status == 200
    assert locked.get("/metrics", authorization=f"bearer {key}").status == 200


@pytest.mark.parametrize(
    "header", ["", GOOD, "Bearer", "Bearer ", f"Bearer {GOOD[:-1]}", f"Bearer {GOOD}x", f"Basic {GOOD}", "Bearer \xe9"]
)
@pytest.mark.parametrize("path", ["/v1/models", "/metrics", "/nowhere"])
def test_nothing_else_does(locked, header, path):
    reply = locked.request("GET", path, headers={"authorization": header} if header else {})
    assert reply.status == 401
    assert reply.error["code"] == "invalid_api_key"
    assert reply.headers["www-authenticate"] == "Bearer"
    assert GOOD not in reply.body.decode()


def test_health_needs_no_key(locked):
    assert locked.get("/health").status == 200


def test_a_file_of_keys(tmp_path):
    path = tmp_path / "keys"
    path.write_text(f"# ours\n{GOOD}\n\n  {OTHER}  \n")
    keys = ApiKeys.read(path)
    assert keys.accept(f"Bearer {GOOD}")
    assert keys.accept(f"Bearer {OTHER}")
    assert not keys.accept("Bearer # ours")


@pytest.mark.parametrize(
    ("text", "message"), [("", "no API key"), ("short\n", "at least 16"), ("has a blank inside it\n", "visible")]
)
def test_files_that_are_refused(tmp_path, text, message):
    path = tmp_path / "keys"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        ApiKeys.read(path)
