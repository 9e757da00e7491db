// A document that the model writes on: words and pictures, in the order in which it wants them.

import { Composer } from "./composer.js";
import { Written, element, markdown, split, written } from "./parts.js";
import { events, post } from "./wire.js";

export function startDocument(about, settings) {
  const form = document.getElementById("document-form");
  const article = document.getElementById("article");
  let work = null;
  const composer = new Composer(form, about, { numbered: true, onSubmit: () => write(), onStop: () => work.abort() });

  async function write() {
    const mine = (work = new AbortController());
    const prompt = assembled(composer);
    const made = new Written(about.size);
    const beginning = element("div", { className: "beginning" }, written(prompt, about.size));
    const below = element("div", { className: "below" });
    article.replaceChildren(beginning, made.node, below);
    composer.busy(true);
    let why = "";
    let chance = "";
    try {
      const body = { model: about.model, prompt, stream: true, preview_every: settings.previewEvery, ...settings.writing };
      const response = await post("/v1/completions", body, mine.signal, (s) => { below.textContent = `The server is busy; trying again in ${s} s.`; });
      below.textContent = "";
      for await (const { choices: [choice], seed } of events(response)) {
        if (choice.preview) made.preview(choice.preview);
        if (choice.text) made.text(choice.text);
        if (choice.finish_reason === "length") why = "cut off: the most tokens were reached, or the context is full";
        chance = `seed ${seed}`;
      }
    } catch (error) {
      if (mine.signal.aborted) why = "stopped";
      else article.insertBefore(element("p", { className: "wrong" }, error.message), below);
    }
    made.done();
    below.append(...[why, chance].filter(Boolean).map((text) => element("span", {}, text)));
    work = null;
    composer.busy(false);
  }

  return (content) => { take(composer, content); form.requestSubmit(); };
}

// The text with its pictures in their places; those that it does not name come first.
export function assembled(composer) {
  const named = new Set();
  const text = composer.text.trim().replace(/\[picture (\d+)\]/g, (all, number) => {
    const url = composer.pictures[number - 1];
    named.add(Number(number));
    return url ? markdown(url) : all;
  });
  return composer.pictures.filter((_, i) => !named.has(i + 1)).map(markdown).join("") + text;
}

// Puts an example into a form.
export function take(composer, content) {
  const pictures = [];
  const text = split(content).map((part) => (part.url ? `[picture ${pictures.push(part.url)}]` : part)).join("");
  composer.set(text, pictures);
}
