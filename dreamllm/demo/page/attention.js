// Where dream queries look: over the pictures they have read, and over the one that is drawn.

import { Composer } from "./composer.js";
import { assembled, take } from "./document.js";
import { element, image } from "./parts.js";
import { post } from "./wire.js";

// Dark to bright, perceptually even: black, violet, red, orange, pale yellow (stops of the "inferno" kind).
const STOPS = [[6, 4, 24], [66, 14, 104], [147, 38, 103], [221, 81, 58], [252, 165, 10], [250, 253, 161]];

export function startAttention(about, settings) {
  const form = document.getElementById("attention-form");
  const looks = document.getElementById("looks");
  const note = document.getElementById("attention-note");
  let work = null;
  const composer = new Composer(form, about, { numbered: true, onSubmit: () => look(), onStop: () => work.abort() });

  async function look() {
    const mine = (work = new AbortController());
    composer.busy(true);
    const said = element("p", { className: "note" }, "drawing");
    note.hidden = true;
    looks.replaceChildren(said);
    const pictures = inOrder(assembled(composer));
    try {
      const body = { prompt: assembled(composer), ...settings.drawing, ...settings.seed };
      const response = await post("/page/attention", body, mine.signal, (s) => { said.textContent = `The server is busy; trying again in ${s} s.`; });
      const found = await response.json();
      looks.replaceChildren(
        ...found.read.map((maps, i) => view(`Picture ${i + 1}, as it is read`,
          "How much each dream query looks at each patch of the picture, in the language model.", pictures[i], decode(maps), true)),
        view("The picture that is drawn", `Which dream query guides each place of the picture, in the decoder. Seed ${found.seed}.`,
          found.picture, decode(found.drawn), false),
      );
    } catch (error) {
      looks.replaceChildren(element("p", { className: mine.signal.aborted ? "note" : "wrong" }, mine.signal.aborted ? "stopped" : error.message));
    }
    work = null;
    composer.busy(false);
  }

  return (content) => { take(composer, content); form.requestSubmit(); };
}

const inOrder = (prompt) => [...prompt.matchAll(/\]\((data:[^)]*)\)/g)].map((match) => match[1]);

// Bytes of all queries -> one Float32Array per query, in true proportion.
function decode({ queries, height, width, maps, peaks, shares }) {
  const bytes = Uint8Array.from(atob(maps), (letter) => letter.charCodeAt(0));
  const each = Array.from({ length: queries }, (_, q) =>
    Float32Array.from(bytes.subarray(q * height * width, (q + 1) * height * width), (value) => (value / 255) * peaks[q]));
  return { height, width, each, shares };
}

// `reading`: all queries together are their mean; of what guides a drawing the strongest query at each place is shown.
function view(title, explanation, url, maps, reading) {
  const over = element("canvas", { width: maps.width, height: maps.height });
  const big = element("div", { className: "big" }, image(url, title), over);
  const said = element("p", { className: "said" });
  const all = mean(maps);
  const order = maps.shares.map((share, q) => q).sort((a, b) => maps.shares[b] - maps.shares[a]);
  const buttons = [];
  const choose = (q) => {
    paint(over, q === null ? all : maps.each[q], maps);
    big.classList.toggle("bare", q === null && !reading);
    buttons.forEach((button) => button.setAttribute("aria-pressed", button.dataset.query === String(q)));
    said.textContent = q === null
      ? reading ? `All ${maps.each.length} queries together; ${percent(sum(all))} of what they look at is this picture.` : "Choose a query to see where it acts."
      : reading ? `Query ${q + 1}: ${percent(sum(maps.each[q]))} of what it looks at is this picture.` : `Query ${q + 1}: ${percent(maps.shares[q])} of the guidance, over the whole picture.`;
  };
  for (const q of order) {
    const small = element("canvas", { width: maps.width, height: maps.height });
    paint(small, maps.each[q], maps);
    const button = element("button", { type: "button", title: `query ${q + 1}`, onclick: () => choose(button.getAttribute("aria-pressed") === "true" ? null : q) }, small);
    button.dataset.query = q;
    button.setAttribute("aria-label", `Query ${q + 1}`);
    buttons.push(button);
  }
  choose(null);
  return element("div", { className: "look" }, element("h2", {}, title), element("p", {}, explanation),
    element("div", { className: "views" }, element("div", {}, big, said), element("div", { className: "maps" }, ...buttons)));
}

const sum = (values) => values.reduce((total, value) => total + value, 0);
const percent = (share) => `${(100 * share).toFixed(share < 0.1 ? 1 : 0)}%`;

function mean({ each }) {
  const total = new Float32Array(each[0].length);
  for (const map of each) map.forEach((value, i) => { total[i] += value / each.length; });
  return total;
}

// Paints a map between its own least and most.
function paint(canvas, map, { height, width }) {
  const least = Math.min(...map);
  const span = Math.max(...map) - least || 1;
  const pixels = new ImageData(width, height);
  map.forEach((value, i) => pixels.data.set([...colour((value - least) / span), 255], 4 * i));
  canvas.getContext("2d").putImageData(pixels, 0, 0);
}

function colour(share) {
  const place = share * (STOPS.length - 1);
  const low = Math.min(Math.floor(place), STOPS.length - 2);
  return STOPS[low].map((value, i) => Math.round(value + (STOPS[low + 1][i] - value) * (place - low)));
}
