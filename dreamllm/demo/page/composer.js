// A form with a text and pictures: chosen, pasted or dropped.

import { element, image } from "./parts.js";

const icon = (name) => document.getElementById(`icon-${name}`).content.cloneNode(true);

export class Composer {
  // `numbered`: pictures stand in the text as [picture 1]; otherwise before it.
  constructor(form, about, { numbered = false, onSubmit, onStop }) {
    this.form = form;
    this.area = form.elements.text;
    this.pictures = [];
    this._numbered = numbered;
    this._limits = about.limits;
    this._given = form.querySelector(".given");
    this._go = form.querySelector(".go");
    this._word = this._go.classList.contains("word") ? this._go.textContent : null;
    this.busy(false);
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      if (this._busy) onStop();
      else if (this.area.value.trim() || this.pictures.length) onSubmit();
    });
    this.area.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing || this.area.rows > 2) return;
      event.preventDefault();
      if (!this._busy) form.requestSubmit();
    });
    this.area.addEventListener("input", () => this._grow());
    if (this._given) this._takePictures();
  }

  get text() { return this.area.value; }

  set(text, pictures = []) {
    this.area.value = text;
    this.pictures = [...pictures];
    this._show();
    this._grow();
  }

  busy(on) {
    this._busy = on;
    this._go.setAttribute("aria-label", on ? "Stop" : this._word ?? "Send");
    if (this._word) this._go.textContent = on ? "Stop" : this._word;
    else this._go.replaceChildren(icon(on ? "stop" : "send"));
  }

  _grow() {
    this.area.style.height = "auto";
    this.area.style.height = `${this.area.scrollHeight}px`;
  }

  _takePictures() {
    const button = this.form.querySelector(".attach");
    const input = this.form.querySelector("input[type=file]");
    button.append(icon("attach"));
    button.addEventListener("click", () => input.click());
    input.addEventListener("change", () => { this._add(input.files); input.value = ""; });
    this.area.addEventListener("paste", (event) => {
      if (event.clipboardData.files.length) { event.preventDefault(); this._add(event.clipboardData.files); }
    });
    this.form.addEventListener("dragover", (event) => { event.preventDefault(); this.form.classList.add("over"); });
    this.form.addEventListener("dragleave", () => this.form.classList.remove("over"));
    this.form.addEventListener("drop", (event) => {
      event.preventDefault();
      this.form.classList.remove("over");
      this._add(event.dataTransfer.files);
    });
  }

  async _add(list) {
    for (const file of [...list]) {  // a form's own list empties with it
      if (!file.type.startsWith("image/")) { this._say(`${file.name} is not a picture.`); continue; }
      if (file.size > this._limits.picture_bytes) { this._say(`${file.name} is larger than this server takes.`); continue; }
      if (this.pictures.length >= this._limits.pictures_in) { this._say(`At most ${this._limits.pictures_in} pictures.`); break; }
      this.pictures.push(await dataUrl(file));
      if (this._numbered) this.area.setRangeText(`[picture ${this.pictures.length}]`, this.area.selectionStart, this.area.selectionEnd, "end");
    }
    this._show();
  }

  _say(text) { this.area.setCustomValidity(text); this.area.reportValidity(); setTimeout(() => this.area.setCustomValidity(""), 3000); }

  _show() {
    if (!this._given) return;
    this._given.hidden = !this.pictures.length;
    this._given.replaceChildren(...this.pictures.map((url, i) => element("figure", {},
      image(url, `Picture ${i + 1}`),
      ...(this._numbered ? [element("figcaption", {}, `picture ${i + 1}`)] : []),
      element("button", { type: "button", title: "Remove", onclick: () => this._remove(i) }, "×"))));
  }

  _remove(index) {
    this.pictures.splice(index, 1);
    if (this._numbered) {
      this.area.value = this.area.value.replace(/\[picture (\d+)\]/g, (all, n) =>
        Number(n) === index + 1 ? "" : `[picture ${Number(n) > index + 1 ? n - 1 : n}]`);
    }
    this._show();
  }
}

function dataUrl(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(file);
  });
}
