// The dialogue: kept here and sent whole with every message, as OpenAI's interface has it.

import { Composer } from "./composer.js";
import { Frame, Written, element, split, withoutPictures } from "./parts.js";
import { events, post } from "./wire.js";

export function startChat(about, settings) {
  const talk = document.getElementById("talk");
  const welcome = document.getElementById("chat-welcome");
  const anew = document.getElementById("anew");
  let messages = [];
  let work = null;
  const composer = new Composer(document.getElementById("chat-form"), about, {
    onSubmit: () => send(composer.text, composer.pictures),
    onStop: () => work.abort(),
  });

  anew.addEventListener("click", () => {
    work?.abort();
    messages = [];
    talk.replaceChildren(welcome);
    anew.hidden = true;
    composer.area.focus();
  });

  function send(text, pictures) {
    const content = [
      ...pictures.map((url) => ({ type: "image_url", image_url: { url } })),
      ...(text.trim() ? [{ type: "text", text: text.trim() }] : []),
    ];
    composer.set("");
    messages.push({ role: "user", content });
    const asked = element("div", { className: "from-user" }, element("div", { className: "written" }));
    if (pictures.length) asked.firstChild.append(element("div", { className: "flow" }, ...pictures.map(given)));
    if (text.trim()) asked.firstChild.append(element("p", {}, text.trim()));
    welcome.remove();
    anew.hidden = false;
    talk.append(asked);
    answer();
  }

  async function answer() {
    const mine = (work = new AbortController());
    const dialogue = messages;
    const made = new Written(about.size);
    const below = element("div", { className: "below" });
    const node = element("div", { className: "from-model" }, made.node, below);
    talk.append(node);
    toEnd();
    composer.busy(true);
    let why = "";
    try {
      const body = { model: about.model, messages: dialogue, stream: true, preview_every: settings.previewEvery, ...settings.writing };
      const response = await post("/v1/chat/completions", body, mine.signal, (s) => { below.textContent = `The server is busy; trying again in ${s} s.`; });
      below.textContent = "";
      for await (const { choices: [choice], seed } of events(response)) {
        const following = isAtEnd();
        if (choice.delta.preview) made.preview(choice.delta.preview);
        if (choice.delta.content) made.text(choice.delta.content);
        if (choice.finish_reason === "length") why = "cut off: the most tokens were reached, or the context is full";
        below.dataset.seed = seed;
        if (following) toEnd();
      }
    } catch (error) {
      if (mine.signal.aborted) why = "stopped";
      else node.insertBefore(element("p", { className: "wrong" }, error.message), below);
    }
    made.done();
    if (work === mine) { work = null; composer.busy(false); }
    if (dialogue !== messages) return;
    dialogue.push({ role: "assistant", content: made.content });
    below.append(...[
      why && element("span", {}, why),
      below.dataset.seed && element("span", {}, `seed ${below.dataset.seed}`),
      element("button", { type: "button", onclick: () => again(node) }, "Answer again"),
    ].filter(Boolean));
    for (const button of talk.querySelectorAll(".from-model:not(:last-child) .below button")) button.remove();
    if (isAtEnd()) toEnd();
  }

  function again(node) {
    if (work) return;
    messages.pop();
    node.remove();
    answer();
  }

  const main = document.querySelector("main");
  const toEnd = () => { main.scrollTop = main.scrollHeight; };
  const isAtEnd = () => main.scrollHeight - main.scrollTop - main.clientHeight < 160;

  return (content) => send(withoutPictures(content), split(content).filter((part) => part.url).map((part) => part.url));
}

export function given(url) {
  const frame = new Frame(128);
  frame.picture(url, "A picture you gave");
  return frame.node;
}
