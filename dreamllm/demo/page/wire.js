// Requests to the server: JSON, streams of events, and waiting when it is busy.

export async function getJson(path) {
  const response = await fetch(path);
  if (!response.ok) throw new Error(`the server answered ${response.status}`);
  return response.json();
}

// Posts until the server has a place; `onBusy(seconds)` is told of every pause. Throws the server's own message.
export async function post(path, body, signal, onBusy = () => {}) {
  for (;;) {
    const response = await fetch(path, {
      method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(body), signal,
    });
    if (response.ok) return response;
    const seconds = Number(response.headers.get("retry-after") || 1);
    if (response.status !== 429) throw new Error(await messageOf(response));
    onBusy(seconds);
    await pause(seconds, signal);
  }
}

async function messageOf(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `the server answered ${response.status}`;
  }
}

function pause(seconds, signal) {
  return new Promise((resolve, reject) => {
    const timer = setTimeout(resolve, seconds * 1000);
    signal?.addEventListener("abort", () => { clearTimeout(timer); reject(signal.reason); }, { once: true });
  });
}

// The JSON values of a stream of server-sent events. Throws the message of an error among them.
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let pieces = [];
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new Error("the connection was lost in the middle of the answer");
    pieces.push(value);
    if (!value.includes("\n")) continue;  // a picture comes in many pieces: joined once
    const messages = pieces.join("").split("\n\n");
    pieces = [messages.pop()];
    for (const message of messages) {
      const data = message.slice("data: ".length);
      if (data === "[DONE]") return;
      const parsed = JSON.parse(data);
      if (parsed.error) throw new Error(parsed.error.message);
      yield parsed;
    }
  }
}
