// What a visitor decides about answers; kept for this visit.

const KEPT = "dreamllm-settings";

export class Settings {
  constructor(about) {
    this._about = about;
    this._form = document.getElementById("settings");
    const fields = this._form.elements;
    fields.max_tokens.max = about.limits.tokens;
    fields.steps.max = Math.min(about.limits.steps, Math.max(100, about.drawing.steps));
    for (const [name, value] of Object.entries(about.drawing)) fields[name].value = value;
    for (const field of fields) {
      if (field.tagName === "SELECT") for (const option of field.options) option.defaultSelected = option.selected;
      else if ("defaultValue" in field && field.tagName === "INPUT") field.defaultValue = field.value;
    }
    this._restore();
    this._form.addEventListener("input", () => { this._tell(); this._keep(); });
    this._form.addEventListener("reset", () => setTimeout(() => { this._tell(); this._keep(); }));
    this._form.addEventListener("submit", (event) => event.preventDefault());
    this._tell();
  }

  showFor(tab) {
    for (const group of this._form.querySelectorAll("[data-tabs]")) group.hidden = !group.dataset.tabs.split(" ").includes(tab);
  }

  // Fields of a request that writes.
  get writing() {
    const { pictures, temperature, max_tokens: most } = this._form.elements;
    return {
      pictures: pictures.value, temperature: Number(temperature.value), drawing: this.drawing, ...this.seed,
      ...(most.value ? { max_tokens: Number(most.value) } : {}),
    };
  }

  get drawing() {
    const { steps, guidance_scale: guidance, scheduler, negative_prompt: negative } = this._form.elements;
    return {
      steps: Number(steps.value), scheduler: scheduler.value,
      guidance_scale: guidance.value === "" ? this._about.drawing.guidance_scale : Number(guidance.value),
      negative_prompt: negative.value,
    };
  }

  get seed() {
    const { value } = this._form.elements.seed;
    return value === "" ? {} : { seed: Number(value) };
  }

  // After how many steps a preview is worth its time.
  get previewEvery() { return Math.max(1, Math.ceil(this.drawing.steps / 8)); }

  _tell() {
    for (const output of this._form.querySelectorAll("output")) output.value = output.nextElementSibling.value;
  }

  _keep() { sessionStorage.setItem(KEPT, JSON.stringify([this._about.model, Object.fromEntries(new FormData(this._form))])); }

  _restore() {
    const [model, values] = JSON.parse(sessionStorage.getItem(KEPT) ?? "[null, {}]");
    if (model === this._about.model) for (const [name, value] of Object.entries(values)) this._form.elements[name].value = value;
  }
}
