"""`dreamllm serve` as a process: its log, its options, and its end."""

import json
import os
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest
from openai import OpenAI

from dreamllm.cli import main
from tests.server.support import CHAT, PATIENCE, Address, chat

ROOT = Path(__file__).parents[2]
KEY = "sk-0123456789abcdef"


class Process:
    """A server's process and the lines of its log."""

    def __init__(self, *arguments):
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "dreamllm", "serve", *map(str, arguments), "--port", "0"]
        self.popen = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
        self.lines = []
        self.ready = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self):
        for line in self.popen.stderr:
            self.lines.append(line)
            if '"ready"' in line:
                self.ready.set()
        self.ready.set()

    def address(self):
        assert self.ready.wait(120)
        return Address(int(self.log()[0]["url"].rpartition(":")[2]))

    def log(self):
        return [json.loads(line) for line in self.lines]

    def end(self):
        code = self.popen.wait(PATIENCE)
        self._reader.join(PATIENCE)
        return code


@contextmanager
def process(*arguments):
    running = Process(*arguments)
    try:
        yield running
    finally:
        running.popen.kill()
        running.end()


def test_a_process_serves_and_its_log_tells_nothing_of_what_was_said(model_folder, tmp_path):
    keys = tmp_path / "keys"
    keys.write_text(f"{KEY}\n")
    with process(
        "--model", model_folder, "--api-keys", keys, "--name", "mine", "--limits.max-new-tokens", "9"
    ) as running:
        address = running.address()
        with OpenAI(base_url=f"{address.url}/v1", api_key=KEY, max_retries=0) as client:
            asked = [{"role": "user", "content": "my secret"}]
            answer = client.chat.completions.create(model="mine", messages=asked, extra_body={"pictures": "forbid"})
            assert answer.usage.completion_tokens <= 9
        assert address.post(CHAT, chat("my secret")).status == 401
        running.popen.send_signal(signal.SIGTERM)
        assert running.end() == 0
        text = "".join(running.lines)
        assert "secret" not in text
        assert KEY not in text
        assert answer.choices[0].message.content not in text
        requests = [line for line in running.log() if line["message"] == "request"]
        assert [line["status"] for line in requests] == [200, 401]
        assert requests[0]["id"] == answer._request_id
        assert requests[0]["completion_tokens"] == answer.usage.completion_tokens
        assert running.log()[-1]["message"] == "stopped"


def test_sigterm_under_load_loses_no_answer(model_folder):
    with process("--model", model_folder, "--max-batch", 2, "--max-queue", 30) as running:
        address = running.address()
        statuses, lock, some = [], threading.Lock(), threading.Event()

        def ask():
            while True:
                try:
                    reply = address.post(CHAT, chat("Write", model="tiny", max_tokens=30, pictures="forbid"))
                except OSError:  # the server has gone
                    return
                with lock:
                    statuses.append((reply.status, len(reply.body)))
                    some.set()
                if reply.status != 200:
                    return

        clients = [threading.Thread(target=ask, daemon=True) for _ in range(8)]
        for client in clients:
            client.start()
        assert some.wait(PATIENCE)
        running.popen.send_signal(signal.SIGTERM)
        assert running.end() == 0
        for client in clients:
            client.join(PATIENCE)
        assert {status for status, _ in statuses} <= {200, 503}
        logged = [line["status"] for line in running.log() if line["message"] == "request"]
        assert logged.count(200) == sum(status == 200 for status, _ in statuses)
        assert "Traceback" not in "".join(running.lines)


def test_mistakes_end_with_one_line(model_folder, tmp_path, capsys):
    (tmp_path / "keys").write_text("short\n")
    mistakes = {
        "model folder nowhere does not exist": ["--model", "nowhere"],
        "at least 16": ["--model", str(model_folder), "--api-keys", str(tmp_path / "keys")],
        "cannot listen on 192.0.2.1:80": ["--model", str(model_folder), "--host", "192.0.2.1", "--port", "80"],
        "max_queue must be at least 0": ["--model", str(model_folder), "--max-queue", "-1", "--port", "0"],
        "max_steps must be at least 1": ["--model", str(model_folder), "--limits.max-steps", "0"],
    }
    for message, arguments in mistakes.items():
        with pytest.raises(SystemExit) as ended:
            main(["serve", *arguments])
        assert ended.value.code == 2
        assert message in capsys.readouterr().err


def test_without_its_packages_the_command_names_the_extra(model_folder, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.delitem(sys.modules, "dreamllm.server.running", raising=False)
    with pytest.raises(SystemExit):
        main(["serve", "--model", str(model_folder)])
    assert "the package uvicorn is not installed" in capsys.readouterr().err
