// Pictures for a description: candidates side by side, seen from the first noise on.

import { Composer } from "./composer.js";
import { Frame, element } from "./parts.js";
import { events, post } from "./wire.js";

const PARTIAL_IMAGES = 8;

export function startPictures(about, settings) {
  const form = document.getElementById("pictures-form");
  const gallery = document.getElementById("gallery");
  form.elements.candidates.max = about.limits.pictures;
  let work = null;
  const composer = new Composer(form, about, { onSubmit: () => draw(), onStop: () => work.abort() });

  async function draw() {
    const mine = (work = new AbortController());
    const prompt = composer.text.trim();
    const count = Math.max(1, Math.min(Number(form.elements.candidates.value) || 1, about.limits.pictures));
    const frames = Array.from({ length: count }, () => new Frame(about.size, true));
    const below = element("div", { className: "below" }, "drawing");
    const round = element("div", { className: "round" }, element("h2", {}, prompt), below,
      element("div", { className: "grid" }, ...frames.map((frame) => frame.node)));
    gallery.prepend(round);
    composer.busy(true);
    const drawing = settings.drawing;
    try {
      const body = { prompt, n: count, stream: true, partial_images: PARTIAL_IMAGES, ...drawing, ...settings.seed };
      const response = await post("/v1/images/generations", body, mine.signal, (s) => { below.textContent = `The server is busy; trying again in ${s} s.`; });
      for await (const event of events(response)) {
        const url = `data:image/png;base64,${event.b64_json}`;
        if (event.type === "image_generation.completed") {
          frames[event.index].picture(url, `${prompt} (${event.index + 1} of ${count})`, `${prompt} · candidate ${event.index + 1} of seed ${event.seed}`);
        } else {
          frames[event.index].preview({ image: url, step: event.step, steps: event.steps });
        }
        below.textContent = summary(drawing, event.seed);
      }
    } catch (error) {
      below.replaceChildren(mine.signal.aborted ? "stopped" : element("span", { className: "wrong" }, error.message));
      frames.forEach((frame) => { if (frame.node.className !== "drawn") frame.node.remove(); });
    }
    work = null;
    composer.busy(false);
  }

  const summary = (drawing, seed) => [
    `seed ${seed}`, `${drawing.steps} steps`, `guidance ${drawing.guidance_scale}`, drawing.scheduler,
    drawing.negative_prompt && `without ${drawing.negative_prompt}`,
  ].filter(Boolean).join(" · ");

  return (content) => { composer.set(content); form.requestSubmit(); };
}
