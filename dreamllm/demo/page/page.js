// Tabs, settings, examples and the server's state; each tab is a module of its own.

import { startAttention } from "./attention.js";
import { startChat } from "./chat.js";
import { startDocument } from "./document.js";
import { startPictures } from "./pictures.js";
import { element, image, split, withoutPictures } from "./parts.js";
import { Settings } from "./settings.js";
import { getJson } from "./wire.js";

const LOAD_EVERY = 3000;

function startTabs(settings) {
  const tabs = [...document.querySelectorAll("[role=tab]")];
  const choose = (tab) => {
    for (const one of tabs) {
      const chosen = one === tab;
      one.setAttribute("aria-selected", chosen);
      one.tabIndex = chosen ? 0 : -1;
      document.getElementById(one.getAttribute("aria-controls")).hidden = !chosen;
    }
    const name = tab.getAttribute("aria-controls");
    settings.showFor(name);
    history.replaceState(null, "", `#${name}`);
    document.querySelector(`#${name} textarea`).focus();
  };
  tabs.forEach((tab, i) => {
    tab.addEventListener("click", () => choose(tab));
    tab.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (step) { const next = tabs[(i + step + tabs.length) % tabs.length]; choose(next); next.focus(); }
    });
  });
  choose(tabs.find((tab) => `#${tab.getAttribute("aria-controls")}` === location.hash) ?? tabs[0]);
}

function showExamples(examples, take) {
  for (const place of document.querySelectorAll("[data-examples]")) {
    const name = place.dataset.examples;
    place.replaceChildren(...(examples[name] ?? []).map((content) => element(
      "button", { type: "button", onclick: () => take[name](content) },
      ...split(content).filter((part) => part.url).map((part) => image(part.url, "")),
      withoutPictures(content),
    )));
  }
}

async function watchLoad() {
  const place = document.getElementById("load");
  for (;;) {
    if (!document.hidden) {
      try {
        const { waiting, running } = await getJson("/page/load");
        place.className = running + waiting ? "load busy" : "load";
        const words = running === 1 ? "1 answer" : `${running} answers`;
        place.textContent = !(running + waiting) ? "ready" : words + " in the making" + (waiting ? `, ${waiting} waiting` : "");
      } catch {
        place.className = "load gone";
        place.textContent = "the server does not answer";
      }
    }
    await new Promise((resolve) => setTimeout(resolve, LOAD_EVERY));
  }
}

async function start() {
  const about = await getJson("/page/about");
  document.getElementById("model").textContent = about.model;
  document.title = `DreamLLM · ${about.model}`;
  const settings = new Settings(about);
  const take = {
    chat: startChat(about, settings), pictures: startPictures(about, settings),
    document: startDocument(about, settings), attention: startAttention(about, settings),
  };
  showExamples(about.examples, take);
  startTabs(settings);
  document.getElementById("shown").addEventListener("click", (event) => {
    if (event.target.tagName !== "A") event.currentTarget.close();
  });
  document.body.dataset.ready = "yes";
  watchLoad();
}

start();
