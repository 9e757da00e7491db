// Text with pictures in it: as the server writes it (Markdown with data URLs), and as a reader sees it.

const PICTURE = /!\[[^\]\n]{0,64}\]\((data:image\/[a-zA-Z0-9.+-]{1,32};base64,[A-Za-z0-9+/=]*)\)/;
const TINY = 64;        // pictures whose longer side has at most so many pixels are enlarged with hard edges
const TINY_SHOWN = 128;
const SHORT_TEXT = 48;  // such a text stands on one line with the tiny picture after it

export function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else if (key in made && key !== "list") made[key] = value;
    else made.setAttribute(key, value);
  }
  made.append(...children);
  return made;
}

// "One ![](data:...) two" -> ["One ", {url}, " two"]
export function split(content) {
  const pieces = content.split(new RegExp(PICTURE, "g"));
  return pieces.map((piece, i) => (i % 2 ? { url: piece } : piece)).filter((piece) => piece !== "");
}

export const markdown = (url) => `![picture](${url})`;

export function withoutPictures(content) {
  return split(content).filter((piece) => typeof piece === "string").join(" ").trim();
}

// An <img> that is enlarged if it is tiny; `shown` is told its size when that is known.
export function image(url, alt, shown = () => {}) {
  const img = element("img", { alt });
  img.addEventListener("load", () => {
    const longest = Math.max(img.naturalWidth, img.naturalHeight);
    img.classList.toggle("tiny", longest <= TINY);
    shown(img.naturalWidth, img.naturalHeight, longest <= TINY ? Math.max(1, Math.round(TINY_SHOWN / longest)) : 1);
  });
  img.src = url;
  return img;
}

// A place for a picture, which may still be on its way.
export class Frame {
  constructor(size, filled = false) {
    this.node = element("span", { className: "drawn waiting" });
    this.filled = filled;  // whether the surroundings decide its size
    this._size(size, size, size <= TINY ? Math.max(1, Math.round(TINY_SHOWN / size)) : 1);
  }

  _size(width, height, factor) {
    if (this.filled) return;
    this.node.style.width = `${width * factor}px`;
    this.node.style.aspectRatio = `${width} / ${height}`;
  }

  preview({ image: url, step, steps }) {
    this.node.className = "drawn coming";
    this.node.style.setProperty("--done", step / steps);
    this._show(url, `A picture after ${step} of ${steps} steps`);
  }

  picture(url, alt, note = "") {
    this.node.className = "drawn";
    const img = this._show(url, alt);
    img.style.cursor = "zoom-in";
    img.addEventListener("click", () => enlarge(url, alt, note));
  }

  _show(url, alt) {
    const img = image(url, alt, (width, height, factor) => {
      this._size(width, height, factor);
      img.style.width = this.filled ? "" : "100%";
    });
    this.node.replaceChildren(img);
    return img;
  }
}

export function enlarge(url, alt, note = "") {
  const dialog = document.getElementById("shown");
  const old = dialog.querySelector("img");
  old.replaceWith(image(url, alt));
  dialog.querySelector("figcaption span").textContent = note || alt;
  dialog.querySelector("a").href = url;
  dialog.showModal();
}

// What the model writes, as it comes: paragraphs, and pictures in their places.
export class Written {
  constructor(size) {
    this.node = element("div", { className: "written" });
    this.content = "";       // as the server sent it
    this.pictures = 0;
    this._size = size;
    this._text = null;       // the paragraph that is being written
    this._frame = null;      // the picture that is on its way
    this._caret(true);
  }

  text(piece) {
    this.content += piece;
    for (const part of split(piece)) {
      if (typeof part === "string") this._write(part);
      else this._picture(part.url);
    }
  }

  preview(preview) {
    this._coming().preview(preview);
  }

  done() {
    this._caret(false);
    this._frame?.node.remove();
    this._frame = null;
    this._trim();
    if (this._text && !this._text.textContent) this._text.remove();
    if (!this.content.trim()) this.node.append(element("p", { className: "note" }, "Nothing was written."));
  }

  _write(text) {
    if (this._text === null) {
      text = text.replace(/^\s+/, "");
      if (!text) return;
      this._text = element("p");
      this.node.append(this._text);
      this._caret(true);
    }
    this._text.append(text);
  }

  _coming() {
    if (this._frame === null) {
      this._frame = new Frame(this._size);
      this._place(this._frame.node);
    }
    return this._frame;
  }

  _picture(url) {
    this.pictures += 1;
    this._trim();
    this._coming().picture(url, `Picture ${this.pictures}`);
    this._frame = null;
    this._text = null;
    this._caret(true);
  }

  // The interface puts empty lines around pictures, which stand apart here by themselves.
  _trim() {
    if (this._text) this._text.textContent = this._text.textContent.trimEnd();
  }

  // Short words and tiny pictures stand side by side, as in a row of cards; others follow each other.
  _place(node) {
    const text = this._text;
    const short = text === null || text.textContent.trim().length <= SHORT_TEXT;
    if (this._size > TINY || !short) {
      this.node.append(node);
      return;
    }
    const last = this.node.lastElementChild;
    const before = text ? text.previousElementSibling : last;
    const flow = before?.classList.contains("flow") ? before : element("div", { className: "flow" });
    if (!flow.parentNode) this.node.insertBefore(flow, text);
    const together = element("div", { className: "together" });
    if (text) together.append(text);
    together.append(node);
    flow.append(together);
  }

  _caret(on) {
    for (const one of [this.node, ...this.node.querySelectorAll(".caret")]) one.classList.remove("caret");
    if (on) (this._text ?? this.node).classList.add("caret");
  }
}

// Content that is already there.
export function written(content, size) {
  const made = new Written(size);
  made.text(content);
  made.done();
  return made.node;
}
