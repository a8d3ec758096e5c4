// The chat as elements: one article for each message, of which only what changed is made anew.

import { plainWords } from "./errors.js";
import { plain, rendered } from "./markdown.js";

const SHARE = 4; // of the time between two renderings that one of them may take at most: 1/SHARE

export class Transcript {
  #root;
  #scroll;
  #empty;
  #articles = new WeakMap(); // by message
  #note = element("p", "note", "The chat has outgrown the model's context: what stands above it no longer sees.");
  #dirty = null; // the message that waits to be rendered again
  #next = 0; // when that may be, in milliseconds

  constructor(root, scroll, empty) {
    this.#root = root;
    this.#scroll = scroll;
    this.#empty = empty;
  }

  show({ messages, forgotten, answering }) {
    const atEnd = this.#atEnd();
    const nodes = messages.map((message, index) => {
      const article = this.#article(message);
      article.classList.toggle("forgotten", index < forgotten);
      article.classList.toggle("last", index === messages.length - 1);
      return article;
    });
    if (forgotten > 0) nodes.splice(forgotten, 0, this.#note);
    nodes.forEach((node, i) => {
      if (this.#root.children[i] !== node) this.#root.insertBefore(node, this.#root.children[i] ?? null);
    });
    while (this.#root.children.length > nodes.length) this.#root.lastElementChild.remove();
    this.#root.toggleAttribute("data-answering", answering);
    this.#empty.hidden = messages.length > 0;
    if (messages.length) this.#fill(messages.at(-1));
    if (atEnd || answering) this.#toEnd();
  }

  /** An answer has grown; rendered soon, and the rarer the longer that takes. */
  grew(message) {
    const waits = this.#dirty !== null;
    this.#dirty = message;
    if (waits) return;
    setTimeout(() => requestAnimationFrame(() => this.#renderDirty()), Math.max(0, this.#next - performance.now()));
  }

  indexOf(target, messages) {
    const article = target.closest("article");
    return messages.findIndex((message) => this.#articles.get(message) === article);
  }

  #renderDirty() {
    const message = this.#dirty;
    this.#dirty = null;
    if (!message.running) return; // `show` has rendered the end of it
    const atEnd = this.#atEnd();
    const started = performance.now();
    this.#fill(message);
    const now = performance.now();
    this.#next = now + (now - started) * SHARE;
    if (atEnd) this.#toEnd();
  }

  #article(message) {
    let article = this.#articles.get(message);
    if (!article) {
      article = element("article", message.role);
      article.setAttribute("aria-label", message.role === "user" ? "You" : "The model");
      article.append(element("div", "text"), element("p", "failure"), element("p", "figures"), actions(message.role));
      this.#articles.set(message, article);
      this.#fill(message);
    }
    return article;
  }

  #fill(message) {
    const [text, failure, figures] = this.#article(message).children;
    const article = text.parentElement;
    article.setAttribute("aria-busy", String(Boolean(message.running))); // read out once it is complete
    if (message.role === "user") text.replaceChildren(plain(message.content));
    else text.replaceChildren(...reasoning(message, text), rendered(message.content));
    failure.textContent = message.failure ? plainWords(message.failure) : "";
    figures.textContent = message.stats ? inFigures(message.stats) : "";
  }

  #atEnd() {
    return this.#scroll.scrollHeight - this.#scroll.scrollTop - this.#scroll.clientHeight < 80;
  }

  #toEnd() {
    this.#scroll.scrollTop = this.#scroll.scrollHeight;
  }
}

/** Tokens, their rate after the first one, and the wait for that. */
export function inFigures({ usage, seconds, time_to_first_token: first, finish_reason, model }) {
  const tokens = usage.completion_tokens;
  const parts = [`${tokens} token${tokens === 1 ? "" : "s"}`];
  if (first !== null && tokens > 1 && seconds > first) {
    parts.push(`${((tokens - 1) / (seconds - first)).toFixed(1)} tokens/s`);
  }
  if (first !== null) parts.push(`first after ${first < 1 ? `${Math.round(first * 1000)} ms` : `${first.toFixed(2)} s`}`);
  if (finish_reason === "length") parts.push("cut off by its length");
  if (finish_reason === "cancelled") parts.push("stopped");
  parts.push(model);
  return parts.filter(Boolean).join(" · ");
}

function reasoning(message, text) {
  if (!message.reasoning) return [];
  const details = element("details", "reasoning");
  details.open = text.querySelector("details.reasoning")?.open ?? false; // as the reader left it
  details.append(element("summary", "", "Reasoning"), plain(message.reasoning));
  return [details];
}

function actions(role) {
  const row = element("div", "actions");
  row.append(button("copy", "Copy"));
  row.append(role === "user" ? button("edit", "Edit") : button("regenerate", "Again"));
  return row;
}

function button(name, text) {
  const made = element("button", name, text);
  made.type = "button";
  return made;
}

function element(tag, name, text) {
  const made = document.createElement(tag);
  if (name) made.className = name;
  if (text) made.textContent = text;
  return made;
}
