"""A document as a reader sees it: one HTML page that needs nothing else."""

from __future__ import annotations

import base64
import html
import io
import re
from pathlib import Path

from PIL import Image

from dreamllm.documents import Document, Picture, Text, load_picture

TINY = 64
"""Pictures whose longer side has at most this many pixels stand in the line, enlarged with hard pixel edges."""

TINY_SHOWN = 96
SHORT_TEXT = 32
"""A text of at most this many characters is kept on one line with the tiny picture after it."""

STYLE = """
:root {
  color-scheme: light dark;
  --paper: #fbfaf8; --ink: #1f1e1b; --muted: #6b6963; --line: #e2dfd8; --raised: #ffffff; --accent: #2f5fb3;
  --good: #2c7a4b; --bad: #b3372f;
  --reading: Charter, "Bitstream Charter", "Sitka Text", Cambria, Georgia, "DejaVu Serif", serif;
  --label: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #15161a; --ink: #e8e6e1; --muted: #9b9992; --line: #2f3138; --raised: #1d1f24; --accent: #8db4f5;
    --good: #6cc08b; --bad: #f08c84;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body {
  margin: 0; background: var(--paper); color: var(--ink); font: 1.125rem/1.6 var(--reading);
  padding: clamp(1.25rem, 5vw, 4rem) clamp(1rem, 5vw, 2rem);
}
main { max-width: 42rem; margin: 0 auto; }
h1, h2, h3 { font-weight: 600; line-height: 1.25; text-wrap: balance; }
h1 { font-size: 1.9rem; margin: 0 0 1.5rem; letter-spacing: -0.01em; }
p { margin: 0 0 1em; overflow-wrap: break-word; }
figure { margin: 1.5rem 0; }
figure img { display: block; max-width: 100%; height: auto; border-radius: 6px; }
img.tiny {
  image-rendering: pixelated; vertical-align: middle; border-radius: 5px; margin: 0.35rem 0.9rem 0.35rem 0.15rem;
  box-shadow: 0 0 0 1px var(--line);
}
.together { white-space: nowrap; }
.prompt {
  font: 1rem/1.5 var(--label); color: var(--muted); border-left: 3px solid var(--line);
  margin: 0 0 2rem; padding: 0.1rem 0 0.1rem 1rem;
}
.prompt p:last-child, .flow p:last-child { margin-bottom: 0; }
.nothing { color: var(--muted); font-style: italic; }
"""

REPORT_STYLE = """
body { font-size: 1.0625rem; }
main { max-width: 64rem; }
h1 { margin-bottom: 0.4rem; }
h2 { font-size: 1.35rem; margin: 3.2rem 0 0.5rem; }
h3 { font: 600 0.95rem/1.4 var(--label); margin: 0; }
.lead, .note { color: var(--muted); max-width: 46rem; margin: 0 0 1.2rem; }
.lead { font-size: 1.15rem; }
.label { font: 0.86rem/1.4 var(--label); color: var(--muted); }
.scroll { overflow-x: auto; }
img.px { image-rendering: pixelated; }
footer { margin-top: 4rem; padding-top: 1.2rem; border-top: 1px solid var(--line); }
"""
"""What pages with figures, tables and examples share."""

_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def document_page(document: Document, title: str = "DreamLLM", prompt: Document | str | None = None) -> str:
    """HTML of `document`, with what it answers (`prompt`) above it. Self-contained: pictures are data URIs.

    Raises `PictureError` for a picture that cannot be read.
    """
    question = ""
    if prompt is not None:
        asked = Document((Text(prompt),)) if isinstance(prompt, str) else prompt
        question = f'<aside class="prompt" aria-label="Prompt">{flow(asked)}</aside>'
    return html_page(title, f'<main>{question}<article class="flow">{flow(document)}</article></main>')


def write_page(
    path: str | Path, document: Document, title: str = "DreamLLM", prompt: Document | str | None = None
) -> None:
    """Writes `document_page` to `path`."""
    Path(path).write_text(document_page(document, title, prompt), encoding="utf-8")


def html_page(title: str, body: str, style: str = "") -> str:
    """A complete page in the house style around `body`; `style` adds rules."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}{style}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def report_page(title: str, body: str, style: str = "") -> str:
    """A complete page of results: `REPORT_STYLE`, and `style` after it."""
    return html_page(title, f"<main>{body}</main>", REPORT_STYLE + style)


def flow(document: Document) -> str:
    """The document's parts as paragraphs and figures: tiny pictures in the line, others on their own."""
    blocks: list[str] = []
    line: list[str] = []
    number = 0
    for part in document.parts:
        if isinstance(part, Text):
            paragraphs = [p for p in re.split(r"\n\s*\n", part.text.strip()) if p.strip()]
            for i, paragraph in enumerate(paragraphs):
                if i:
                    _close(line, blocks)
                line.append(escape(paragraph).replace("\n", "<br>"))
        elif isinstance(part, Picture):
            number += 1
            image = load_picture(part.source)
            alt = f"{'Created picture' if part.creation else 'Picture'} {number}"
            if max(image.size) <= TINY:
                before = line.pop() if line and len(line[-1]) <= SHORT_TEXT else ""
                line.append(f'<span class="together">{before} {picture_tag(image, alt)}</span>')
            else:
                _close(line, blocks)
                blocks.append(f"<figure>{picture_tag(image, alt)}</figure>")
    _close(line, blocks)
    return "\n".join(blocks) or '<p class="nothing">Nothing was written.</p>'


def picture_tag(image: Image.Image, alt: str, shown: int = TINY_SHOWN) -> str:
    """An `<img>` with the picture inside; a tiny one is enlarged by a whole factor to about `shown` CSS pixels."""
    longest = max(image.size)
    if longest > TINY:
        return f'<img src="{data_uri(image)}" alt="{escape(alt)}" width="{image.width}" height="{image.height}">'
    factor = max(1, round(shown / longest))
    width, height = image.width * factor, image.height * factor
    return f'<img class="tiny" src="{data_uri(image)}" alt="{escape(alt)}" width="{width}" height="{height}">'


def data_uri(image: Image.Image) -> str:
    """The picture as a PNG data URI."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def escape(text: str) -> str:
    """Text for HTML; control characters, which HTML does not allow, become the replacement character."""
    return html.escape(_UNPRINTABLE.sub("\ufffd", text))


def _close(line: list[str], blocks: list[str]) -> None:
    if line:
        blocks.append(f"<p>{' '.join(line)}</p>")
        line.clear()
