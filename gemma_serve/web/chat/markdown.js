// What a model wrote, as elements. It is hostile: whoever wrote its prompt may have written its answer.
//
// marked never passes the text's own HTML on, DOMPurify lets only this short list of elements through, whatever
// marked made of the text, and the page's Content-Security-Policy runs no script but the page's files.

import { Marked } from "./vendor/marked.esm.js";
import DOMPurify from "./vendor/purify.es.mjs";

const ALLOWED = {
  ALLOWED_TAGS: [
    "a", "blockquote", "br", "code", "del", "em", "h1", "h2", "h3", "h4", "h5", "h6", "hr", "li", "ol", "p", "pre",
    "strong", "table", "tbody", "td", "th", "thead", "tr", "ul",
  ],
  ALLOWED_ATTR: ["href", "align", "start", "data-language"],
  ADD_URI_SAFE_ATTR: ["align", "start", "data-language"],
  ALLOWED_URI_REGEXP: /^(?:https?:\/\/|mailto:)/i,
  ALLOW_DATA_ATTR: false,
  ALLOW_ARIA_ATTR: false,
  RETURN_DOM_FRAGMENT: true,
};

const ENTITIES = { "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;", "'": "&#39;" };
const escape = (text) => String(text).replace(/[&<>"']/g, (character) => ENTITIES[character]);

const marked = new Marked({
  gfm: true,
  breaks: true,
  renderer: {
    html: ({ text, block }) => (block ? `<p>${escape(text)}</p>` : escape(text)),
    // An image would tell its host that, and when, this was read. A link waits for a click.
    image: ({ href, text }) => `<a href="${escape(href)}">${escape(text || href)}</a>`,
    checkbox: ({ checked }) => (checked ? "☑ " : "☐ "),
    code: ({ text, lang }) => {
      const language = (lang ?? "").match(/^[\w+#.-]{1,20}/)?.[0] ?? "";
      return `<pre data-language="${escape(language)}"><code>${escape(text)}</code></pre>`;
    },
  },
});

// In characters, of a text and of a part without an empty line. The time that marked takes grows with the square of
// the latter (`**a _` many times), and the page stands still for it.
const MOST = 100_000;
const MOST_AT_ONCE = 10_000;

/** A fragment of safe elements; as it stands where it is no Markdown that can be read, or too much. */
export function rendered(text) {
  if (text.length > MOST || text.split(/\n[ \t]*\n/).some((part) => part.length > MOST_AT_ONCE)) return plain(text);
  let html;
  try {
    html = marked.parse(text);
  } catch {
    return plain(text); // nested so deep that the parser gave up
  }
  const fragment = DOMPurify.sanitize(html, ALLOWED);
  for (const link of fragment.querySelectorAll("a[href]")) {
    link.target = "_blank";
    link.rel = "noopener noreferrer nofollow";
    link.title = link.href; // where it leads, whatever its text says
  }
  for (const pre of fragment.querySelectorAll("pre")) frame(pre);
  for (const table of fragment.querySelectorAll("table")) scrollable(table);
  return fragment;
}

export function plain(text) {
  const fragment = document.createDocumentFragment();
  const block = document.createElement("p");
  block.className = "plain";
  block.textContent = text;
  fragment.append(block);
  return fragment;
}

/** A line above the code, with its language and a button; what is clicked is found by its class. */
function frame(pre) {
  const head = document.createElement("div");
  head.className = "code-head";
  const language = document.createElement("span");
  language.textContent = pre.dataset.language || "";
  const copy = document.createElement("button");
  copy.type = "button";
  copy.className = "copy-code";
  copy.textContent = "Copy";
  copy.setAttribute("aria-label", "Copy this code");
  head.append(language, copy);
  const block = document.createElement("div");
  block.className = "code";
  pre.tabIndex = 0; // so that the arrow keys can scroll it
  pre.replaceWith(block);
  block.append(head, pre);
}

function scrollable(table) {
  const block = document.createElement("div");
  block.className = "table";
  block.tabIndex = 0;
  table.replaceWith(block);
  block.append(table);
}
