// The chat itself: what was said, and what the server's session has of it. Knows no HTML.

import { ConnectionLost, NoAnswer } from "./errors.js";

const STOPPED = "Stopped before the answer began.";

const same = (one, other) => one && other && one.role === other.role && one.content === other.content;

/**
 * `messages` are `{role, content}`, of answers also `reasoning`, `stats` (the data of the server's `message`),
 * `note` (why it ended early) and `running`. The first `forgotten` of them the server's session no longer has.
 */
export class Chat {
  messages = [];
  forgotten = 0;
  answering = false;
  #connection;
  #view;
  #sampling;
  #systemPrompt;
  #system = null; // as the session has it
  #interrupted = null; // the question whose answer a broken connection cut off
  #stopped = false; // by the person, also before the server has the question

  /**
   * `view` has `show()` after a change of the list, `grew(message)` after one of an answer, and
   * `giveBack(question)` for one that was not answered; `sampling()` gives the parameters of an answer,
   * `systemPrompt()` the text or null.
   */
  constructor(connection, view, sampling, systemPrompt) {
    this.#connection = connection;
    this.#view = view;
    this.#sampling = sampling;
    this.#systemPrompt = systemPrompt;
  }

  /** Ask; in place of the message `at` and all that follows it, where that is given. */
  ask(question, at = this.messages.length) {
    const data = { message: question };
    if (at < this.messages.length) data.keep = at - this.forgotten;
    return this.#answer("chat", data, [...this.messages.slice(0, at), { role: "user", content: question }]);
  }

  /** Answer the last question again. */
  regenerate() {
    const last = this.messages.findLastIndex((message) => message.role === "user");
    if (last < this.forgotten) return Promise.resolve();
    return this.#answer("regenerate", {}, this.messages.slice(0, last + 1));
  }

  stop() {
    if (!this.answering) return;
    this.#stopped = true;
    this.#connection.request("cancel").catch(() => {});
  }

  /** A new session; the old one stays with the server until its time is up. */
  async begin() {
    const { data } = await this.#connection.request("session");
    this.#connection.forget();
    this.#system = data.system;
    this.messages = [];
    this.forgotten = 0;
    this.#view.show();
  }

  /**
   * After every connect: bring page and session to the same. Returns the session's system prompt when it was
   * resumed, else undefined.
   */
  async connected(resumed, session) {
    this.#system = session.system;
    if (resumed) await this.#refresh();
    else await this.#reload();
    const lost = this.#interrupted;
    this.#interrupted = null;
    if (lost !== null && this.messages.findLast((message) => message.role === "user")?.content !== lost) {
      this.#view.giveBack(lost);
    }
    return resumed ? this.#system : undefined;
  }

  async #answer(type, data, shown) {
    if (this.answering) return;
    const before = [this.messages, this.forgotten];
    const question = shown.at(-1).content;
    const answer = { role: "assistant", content: "", reasoning: "", running: true };
    this.messages = [...shown, answer];
    this.answering = true;
    this.#stopped = false;
    this.#view.show();
    let failure = null;
    try {
      await this.#tellSystem();
      if (this.#stopped) throw new NoAnswer(STOPPED);
      const reply = await this.#connection.request(type, { ...data, ...this.#sampling() }, (kind, part) => {
        if (kind === "trimmed") {
          this.forgotten = shown.length - 1 - part.messages;
          this.#view.show();
        } else {
          answer.content += part.text ?? "";
          answer.reasoning += part.reasoning ?? "";
          this.#view.grew(answer);
        }
      });
      answer.content = reply.data.content;
      answer.reasoning = reply.data.reasoning ?? "";
      answer.stats = reply.data;
      if (!answer.content) {
        const stopped = reply.type === "cancelled";
        failure = new NoAnswer(stopped ? STOPPED : "The model's answer was empty.");
      }
    } catch (error) {
      failure = error;
    }
    answer.running = false;
    this.answering = false;
    if (answer.content) {
      if (failure) answer.failure = failure;
      if (failure instanceof ConnectionLost) this.#interrupted = question;
    } else {
      [this.messages, this.forgotten] = before;
    }
    this.#view.show();
    if (answer.content) this.#connection.remember();
    else if (type === "chat") this.#view.giveBack(question);
    if (failure && !answer.content) throw failure;
    // Another tab on the same session may have said something meanwhile.
    if (answer.stats && answer.stats.messages !== this.messages.length - this.forgotten) await this.#refresh();
  }

  async #tellSystem() {
    const wanted = this.#systemPrompt();
    if (wanted === this.#system) return;
    const { data } = await this.#connection.request("system", { message: wanted });
    this.#system = data.system;
  }

  /** The session's history onto the page, which may know more of the same messages: their figures. */
  async #refresh() {
    const { data } = await this.#connection.request("history");
    this.#system = data.system;
    const ours = this.messages;
    const theirs = data.messages;
    const skip = ours.length - theirs.length;
    if (skip >= 0 && theirs.every((message, i) => same(message, ours[skip + i]))) {
      this.forgotten = skip;
    } else {
      const known = theirs.map((message, i) => ours[this.forgotten + i]);
      if (!same(theirs[0], known[0])) this.forgotten = 0;
      const merged = theirs.map((message, i) => (same(message, known[i]) ? known[i] : message));
      this.messages = [...ours.slice(0, this.forgotten), ...merged];
    }
    this.#view.show();
  }

  /** The page's history into a new session, where the old one is gone. */
  async #reload() {
    const messages = this.messages.slice(this.forgotten).map(({ role, content }) => ({ role, content }));
    if (!messages.length) return;
    const { data } = await this.#connection.request("load", { messages, system: this.#systemPrompt() });
    this.#system = data.system;
    this.#connection.remember();
  }
}
