// The settings' dialog: key, system prompt and sampling. What was not moved is not sent: the model's own holds.

import { browser, tab } from "./storage.js";

const UNSET = "the model's own";

export class Settings {
  #dialog;
  #key;
  #system;
  #sampling;
  #values;

  /** `onKey()` is called when there is another key, `onClose()` when the dialog has closed. */
  constructor(dialog, { onKey, onClose }) {
    this.#dialog = dialog;
    this.#key = dialog.querySelector("#key");
    this.#system = dialog.querySelector("#system");
    this.#sampling = dialog.querySelector("#sampling");
    this.#key.value = tab.get("key") ?? "";
    this.#system.value = tab.get("system") ?? "";
    this.#values = parsed(browser.get("sampling"));
    for (const input of this.#inputs()) this.#show(input);

    this.#sampling.addEventListener("input", ({ target }) => {
      const value = target.value === "" ? NaN : Number(target.value);
      if (Number.isFinite(value) && target.validity.valid) this.#values[target.name] = value;
      else delete this.#values[target.name];
      this.#show(target, target.type === "number");
      this.#keep();
    });
    dialog.querySelector("#reset").addEventListener("click", () => {
      this.#values = {};
      for (const input of this.#inputs()) this.#show(input);
      this.#keep();
    });
    this.#system.addEventListener("input", () => tab.set("system", this.#system.value));
    let known = this.key;
    const takeKey = () => {
      if (this.key === known) return;
      known = this.key;
      tab.set("key", known);
      onKey();
    };
    this.#key.addEventListener("change", takeKey);
    this.#key.addEventListener("keydown", (event) => event.key === "Enter" && dialog.close());
    dialog.querySelector("#close-settings").addEventListener("click", () => dialog.close());
    dialog.addEventListener("click", (event) => event.target === dialog && dialog.close()); // beside it
    dialog.addEventListener("close", () => {
      takeKey(); // a field that vanishes with its dialog may not say that it has changed
      onClose();
    });
  }

  get key() {
    return this.#key.value.trim();
  }

  /** The text, or null. */
  get systemPrompt() {
    return this.#system.value.trim() ? this.#system.value : null;
  }

  set systemPrompt(text) {
    this.#system.value = text ?? "";
    tab.set("system", text);
  }

  /** Parameters of an answer: those that were set. */
  sampling() {
    return { ...this.#values };
  }

  open() {
    this.#problem("");
    if (!this.#dialog.open) this.#dialog.showModal();
  }

  /** `problem`: why another one is needed. */
  askForKey(problem) {
    this.open();
    this.#problem(problem);
    this.#key.focus();
    this.#key.select();
  }

  #problem(text) {
    const line = this.#dialog.querySelector("#key-problem");
    line.textContent = text;
    line.hidden = !text;
  }

  #inputs() {
    return this.#sampling.querySelectorAll("input");
  }

  #show(input, typed = false) {
    const value = this.#values[input.name];
    if (input.type === "number") {
      if (!typed) input.value = value ?? "";
      return;
    }
    input.value = value ?? input.dataset.start ?? 1;
    const text = value === undefined ? UNSET : String(value);
    input.classList.toggle("unset", value === undefined);
    input.setAttribute("aria-valuetext", text);
    this.#sampling.querySelector(`output[for="${input.id}"]`).value = text;
  }

  #keep() {
    browser.set("sampling", Object.keys(this.#values).length ? JSON.stringify(this.#values) : null);
  }
}

/** Numbers by the names that the page knows; anything else that storage may hold is left out. */
function parsed(text) {
  const values = {};
  try {
    for (const name of ["temperature", "top_p", "top_k", "repetition_penalty", "max_tokens", "seed"]) {
      const value = JSON.parse(text)?.[name];
      if (Number.isFinite(value)) values[name] = value;
    }
  } catch {} // nothing was kept, or no JSON
  return values;
}
