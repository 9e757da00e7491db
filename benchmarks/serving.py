"""How a server holds up under many clients at once: `python -m benchmarks.serving --model DIR`.

Starts `dreamllm serve` and lets clients send a random mix of requests: text, text about a picture, streams, pictures,
answers with a picture, and documents; every thirtieth leaves in the middle of its answer. Every answer but 200 and 429
is an error; after a 429 a client waits as it is told. Latencies are those of whole answers. Memory is the server's
resident set, sampled every second; its growth is that of the median of the last fifth of the samples over the median of
the second fifth, when everything has been loaded. In the end the server is told to stop while all clients go on asking:
what it had accepted must be answered (200), the rest be refused (429, 503, or no connection).
"""

from __future__ import annotations

import argparse
import base64
import http.client
import io
import json
import random
import select
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

from PIL import Image
from rich.console import Console
from rich.table import Table

CHAT, COMPLETIONS, IMAGES = "/v1/chat/completions", "/v1/completions", "/v1/images/generations"
PATIENCE_SECONDS = 120
LEAVES_EVERY = 30
LEFT = "left"
GONE = ("ConnectionRefusedError", "ConnectionResetError", "RemoteDisconnected", "BrokenPipeError")
"""No connection: what a client may meet once the server was told to stop."""


def picture(rng: random.Random) -> dict[str, Any]:
    side = rng.choice([16, 64, 224])
    buffer = io.BytesIO()
    Image.frombytes("RGB", (side, side), rng.randbytes(3 * side * side)).save(buffer, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}


def any_request(rng: random.Random, model: str, steps: int) -> tuple[str, str, dict[str, Any]]:
    """A kind, a path and a body."""
    kind = rng.choice(("text", "stream", "about a picture", "pictures", "with a picture", "document"))
    if kind == "pictures":
        return kind, IMAGES, {"prompt": "a seven", "n": rng.randint(1, 2), "steps": steps}
    content: Any = "Write something."
    if kind == "about a picture":
        content = [picture(rng), {"type": "text", "text": "What is this?"}]
    body = {"model": model, "messages": [{"role": "user", "content": content}], "max_tokens": rng.randint(1, 24)}
    body |= {"stream": kind == "stream", "temperature": 1.0, "pictures": "forbid", "drawing": {"steps": steps}}
    if kind == "with a picture":
        body |= {"pictures": "force", "max_pictures": 1}
    if kind == "document":
        del body["messages"]
        return kind, COMPLETIONS, body | {"prompt": "two", "pictures": "allow", "max_pictures": 1, "stream": True}
    return kind, CHAT, body


class Clients:
    """Clients that ask until told to stop; `seconds` of every answer by kind, `statuses` of all, and of those that came
    after `ending` was set."""

    def __init__(self, port: int, model: str, steps: int) -> None:
        self.seconds: dict[str, list[float]] = {}
        self.statuses: Counter[str] = Counter()
        self.statuses_ending: Counter[str] = Counter()
        self.ending = False
        self._port, self._model, self._steps = port, model, steps
        self._stop, self._lock = threading.Event(), threading.Lock()
        self._threads: list[threading.Thread] = []

    def start(self, count: int) -> None:
        self._threads = [threading.Thread(target=self._ask, args=(number,)) for number in range(count)]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _ask(self, number: int) -> None:
        rng = random.Random(number)
        while not self._stop.is_set():
            kind, path, body = any_request(rng, self._model, self._steps)
            leaves = rng.randrange(LEAVES_EVERY) == 0
            start = time.perf_counter()
            status, pause = self._send(path, body, rng.random() if leaves else None)
            with self._lock:
                (self.statuses_ending if self.ending else self.statuses)[status] += 1
                if status == "200":
                    self.seconds.setdefault(kind, []).append(time.perf_counter() - start)
            if self.ending and status in GONE:
                return
            self._stop.wait(pause)

    def _send(self, path: str, body: dict[str, Any], leaves_after: float | None) -> tuple[str, float]:
        """The status, or the name of what went wrong, and how long to wait before the next request.

        `leaves_after`: seconds after which the client leaves, if it has no answer yet; a stream it leaves when that
        has begun.
        """
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=PATIENCE_SECONDS)
        try:
            connection.request("POST", path, json.dumps(body), {"content-type": "application/json"})
            if leaves_after is not None and not select.select([connection.sock], [], [], leaves_after)[0]:
                return LEFT, 0.0
            response = connection.getresponse()
            if leaves_after is not None and body.get("stream") and response.status == 200:
                response.read1(64)
                return LEFT, 0.0
            data = response.read()
            if response.status == 200 and body.get("stream") and not data.endswith(b"data: [DONE]\n\n"):
                return "unfinished stream", 0.0
            return str(response.status), float(response.headers.get("retry-after", 0))
        except (OSError, http.client.HTTPException) as error:
            return type(error).__name__, 0.0
        finally:
            connection.close()


class Memory:
    """Samples of a process's resident set, in bytes, once a second until `stop`."""

    def __init__(self, pid: int) -> None:
        self.samples: list[int] = []
        self._pid, self._ended = pid, threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def _watch(self) -> None:
        while not self._ended.wait(1.0):
            lines = Path(f"/proc/{self._pid}/status").read_text().splitlines()
            self.samples.append(next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS")))

    def stop(self) -> float | None:
        """Ends the sampling; returns the growth as a share, None of fewer than ten samples."""
        self._ended.set()
        self._thread.join()
        if len(self.samples) < 10:
            return None
        fifth = len(self.samples) // 5
        return statistics.median(self.samples[-fifth:]) / statistics.median(self.samples[fifth : 2 * fifth]) - 1.0


def start(model: Path, max_queue: int) -> tuple[subprocess.Popen[str], int, str]:
    """A server's process, its port and the model's name."""
    command = [sys.executable, "-m", "dreamllm", "serve", "--model", str(model), "--port", "0"]
    server = subprocess.Popen([*command, "--max-queue", str(max_queue)], stderr=subprocess.PIPE, text=True)
    assert server.stderr is not None
    for line in server.stderr:
        if '"ready"' in line:
            ready = json.loads(line)
            threading.Thread(target=server.stderr.read, daemon=True).start()  # or the pipe fills
            return server, int(ready["url"].rpartition(":")[2]), ready["model"]
        print(line, end="", file=sys.stderr)
    raise RuntimeError(f"the server ended with status {server.wait()}")


def measure(model: Path, clients: int, seconds: float, max_queue: int, steps: int) -> dict[str, Any]:
    server, port, name = start(model, max_queue)
    asking = Clients(port, name, steps)
    try:
        memory = Memory(server.pid)
        asking.start(clients)
        time.sleep(seconds)
        growth = memory.stop()
    finally:
        asking.ending = True
        server.send_signal(signal.SIGTERM)
        status = server.wait(PATIENCE_SECONDS)
        asking.stop()
    good, ending = {"200", "429", LEFT}, {"200", "429", "503", LEFT, *GONE}
    errors = sum(count for key, count in asking.statuses.items() if key not in good)
    errors += sum(count for key, count in asking.statuses_ending.items() if key not in ending)
    everything = [value for values in asking.seconds.values() for value in values]
    return {
        "clients": clients,
        "seconds": seconds,
        "statuses": dict(asking.statuses),
        "statuses_ending": dict(asking.statuses_ending),
        "errors": errors,
        "answers_per_second": len(everything) / seconds,
        "latencies": {
            kind: percentiles(values) for kind, values in sorted({**asking.seconds, "all": everything}.items())
        },
        "memory_bytes": {"first": memory.samples[0], "last": memory.samples[-1], "most": max(memory.samples)},
        "memory_growth": growth,
        "memory_mib_every_ten_seconds": [sample >> 20 for sample in memory.samples[::10]],
        "exit_status": status,
    }


def percentiles(values: list[float]) -> dict[str, float]:
    """In seconds."""
    ordered = sorted(values)
    at = {"p50": 0.5, "p90": 0.9, "p99": 0.99}
    found = {key: ordered[min(len(ordered) - 1, int(len(ordered) * share))] for key, share in at.items()}
    return {"count": len(ordered), **found, "most": ordered[-1]}


def show(result: dict[str, Any]) -> None:
    table = Table("answers", "count", "p50 s", "p90 s", "p99 s", "most s")
    for kind, values in result["latencies"].items():
        table.add_row(kind, str(values["count"]), *(f"{values[key]:.2f}" for key in ("p50", "p90", "p99", "most")))
    console = Console()
    console.print(table)
    memory = result["memory_bytes"]
    refused = {**result["statuses_ending"], "no connection": 0}
    for name in GONE:
        refused["no connection"] += refused.pop(name, 0)
    console.print(f"statuses {result['statuses']}, after SIGTERM {refused}")
    console.print(f"errors {result['errors']}, exit status {result['exit_status']}")
    growth = "not measured" if result["memory_growth"] is None else f"{100 * result['memory_growth']:+.1f}%"
    console.print(
        f"{result['answers_per_second']:.1f} answers a second; memory {memory['last'] / 2**20:.0f} MiB at the end, "
        f"at most {memory['most'] / 2**20:.0f}; growth {growth}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving", description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="a model folder")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--max-queue", type=int, default=32, help="of the server; fewer than the clients, to see 429")
    parser.add_argument("--steps", type=int, default=4, help="denoising steps of each picture")
    parser.add_argument("--out", type=Path, help="where to write the result as JSON")
    options = parser.parse_args()
    result = measure(options.model, options.clients, options.minutes * 60, options.max_queue, options.steps)
    show(result)
    if options.out is not None:
        options.out.write_text(json.dumps(result, indent=2) + "\n")
    return 1 if result["errors"] or result["exit_status"] else 0


if __name__ == "__main__":
    sys.exit(main())
