// The page: its elements, and who hears of what.

import { Chat } from "./chat.js";
import { Connection } from "./connection.js";
import { duration, plainWords } from "./errors.js";
import { Live } from "./live.js";
import { Settings } from "./settings.js";
import { browser } from "./storage.js";
import { Transcript } from "./transcript.js";

const $ = (id) => document.getElementById(id);
const [form, question, sendButton, stopButton, alertLine, editingLine] = [
  $("composer"), $("question"), $("send"), $("stop"), $("alert"), $("editing"),
];
let editing = null; // the message that the question takes the place of
let serverState = null;

const transcript = new Transcript($("transcript"), $("scroll"), $("empty"));
const settings = new Settings($("settings"), { onKey: connect, onClose: () => question.focus() });
const live = new Live($("live"), () => settings.key, (status, phase) => {
  serverState = status === null || status === "ready" ? null : phase ? `${status}: ${phase}` : status;
  showStatus();
});
const connection = new Connection({ state: connectionState, models: showModels, ready });
const chat = new Chat(
  connection,
  { show, grew: (message) => transcript.grew(message), giveBack },
  () => ({ ...settings.sampling(), ...($("model").value ? { model: $("model").value } : {}) }),
  () => settings.systemPrompt,
);

// --- the connection

let status = "Connecting…";

function connect() {
  connection.key = settings.key;
  live.allowed = false;
  connection.start();
}

function connectionState(name, error, seconds) {
  const words = error ? plainWords(error, Boolean(settings.key)) : "";
  status = {
    connecting: "Connecting…",
    connected: "Connected",
    waiting: `${words} The page tries again in ${duration(seconds ?? 0)}.`,
    refused: words,
    asleep: "Disconnected after a long silence; the next question connects again.",
  }[name];
  document.documentElement.dataset.connection = name;
  if (name === "refused") settings.askForKey(words);
  if (name === "connected") say("");
  showStatus();
  show();
}

function showStatus() {
  const text = connection.connected && serverState ? `Connected; the server is not ready (${serverState})` : status;
  document.documentElement.toggleAttribute("data-not-ready", Boolean(serverState));
  if ($("status").textContent !== text) $("status").textContent = text; // or it is read out again
}

function showModels(models) {
  const select = $("model");
  const chosen = select.value;
  select.replaceChildren(...models.map(({ id }) => new Option(id, id, false, id === chosen)));
  select.disabled = models.length === 0;
  nameModel();
}

function nameModel() {
  $("empty-model").textContent = $("model").value || "the model";
}

async function ready(resumed, session) {
  live.allowed = true;
  live.start();
  try {
    const system = await chat.connected(resumed, session);
    if (system) settings.systemPrompt = system;
    if (resumed === false && chat.messages.length === 0) say("The server no longer has the earlier chat. This is a new one.");
  } catch (error) {
    failed(error);
  }
}

// --- the chat

function show() {
  transcript.show(chat);
  const { answering } = chat;
  const focused = document.activeElement;
  stopButton.hidden = !answering;
  sendButton.hidden = answering;
  if (focused?.hidden) (answering ? stopButton : question).focus(); // or the keyboard is nowhere
  sendButton.disabled = !question.value.trim();
  $("new-chat").disabled = answering || !connection.connected;
  editingLine.hidden = editing === null;
}

async function submit() {
  const text = question.value;
  if (!text.trim() || chat.answering) return;
  if (!connection.connected) {
    if (document.documentElement.dataset.connection === "refused") return settings.askForKey(status);
    connection.wake();
    return say("There is no connection to the server. The question stays here; send it once there is one.");
  }
  const at = editing === null ? undefined : chat.messages.indexOf(editing);
  question.value = "";
  editing = null;
  say("");
  await attempt(() => chat.ask(text, at === -1 ? undefined : at));
}

async function attempt(work) {
  try {
    await work();
  } catch (error) {
    failed(error);
  }
}

function failed(error) {
  say(plainWords(error, Boolean(settings.key)));
}

function say(text) {
  alertLine.textContent = text;
  alertLine.hidden = !text;
}

/** A question that was not answered, for another try. */
function giveBack(text) {
  if (!question.value) question.value = text;
  show();
}

function edit(message) {
  editing = message;
  question.value = message.content;
  show();
  question.focus();
}

function leaveEditing() {
  editing = null;
  question.value = "";
  show();
  question.focus();
}

async function copy(text, button) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    // Pages that came over plain HTTP from another machine have no clipboard.
    const area = document.createElement("textarea");
    area.value = text;
    area.className = "hidden";
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
    button.focus();
  }
  button.textContent = "Copied";
  setTimeout(() => (button.textContent = "Copy"), 1500);
}

// --- what the person does

form.addEventListener("submit", (event) => {
  event.preventDefault();
  submit();
});
question.addEventListener("input", show);
question.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  submit();
});
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || event.isComposing || $("settings").open) return;
  if (chat.answering) chat.stop();
  else if (editing !== null) leaveEditing();
});
stopButton.addEventListener("click", () => {
  chat.stop();
  question.focus();
});
$("cancel-edit").addEventListener("click", leaveEditing);
$("new-chat").addEventListener("click", () => {
  editing = null;
  say("");
  attempt(() => chat.begin());
  question.focus();
});
$("model").addEventListener("change", nameModel);
$("open-settings").addEventListener("click", () => settings.open());
$("transcript").addEventListener("click", ({ target }) => {
  if (target.tagName !== "BUTTON") return;
  if (target.className === "copy-code") {
    return copy(target.closest(".code").querySelector("code").textContent, target);
  }
  const at = transcript.indexOf(target, chat.messages);
  const message = chat.messages[at];
  if (!message) return;
  if (target.className === "copy") return copy(message.content, target);
  if (chat.answering || at < chat.forgotten) return;
  if (target.className === "edit") edit(message);
  if (target.className === "regenerate") {
    say("");
    attempt(() => chat.regenerate());
    question.focus();
  }
});

const dark = () => {
  const { theme } = document.documentElement.dataset;
  return theme ? theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
};
function nameTheme() {
  $("theme").textContent = dark() ? "Light" : "Dark";
  $("theme").setAttribute("aria-label", dark() ? "Light theme" : "Dark theme");
}
$("theme").addEventListener("click", () => {
  const theme = dark() ? "light" : "dark";
  document.documentElement.dataset.theme = theme;
  browser.set("theme", theme);
  nameTheme();
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", nameTheme);
nameTheme();

for (const event of ["focus", "online"]) window.addEventListener(event, () => connection.wake());
$("live").open = matchMedia("(min-width: 60rem)").matches;
connect();
live.start();
