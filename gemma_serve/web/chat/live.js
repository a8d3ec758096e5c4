// The panel with the live server. /health counts against no limit, so it may be asked all the time.

import { fetchJson } from "./connection.js";

const EVERY_SECONDS = 2;

export class Live {
  /** May `/health/metrics` be asked? With a wrong key each time would count as a try at guessing one. */
  allowed = false;
  #root;
  #key;
  #onState;
  #timer = 0;

  /** `key()` gives the present one; `onState(status, phase)` is told the server's state. */
  constructor(root, key, onState) {
    this.#root = root;
    this.#key = key;
    this.#onState = onState;
    document.addEventListener("visibilitychange", () => this.start());
    root.addEventListener("toggle", () => this.start());
  }

  start() {
    clearTimeout(this.#timer);
    if (document.hidden) return;
    this.#ask();
  }

  async #ask() {
    clearTimeout(this.#timer);
    await Promise.all([this.#askState(), this.#root.open && this.allowed && this.#askMetrics()]);
    clearTimeout(this.#timer); // of another `#ask` that was faster
    if (!document.hidden) this.#timer = setTimeout(() => this.#ask(), EVERY_SECONDS * 1000);
  }

  async #askState() {
    try {
      const { status, phase } = await fetchJson("health/live");
      this.#say("state", phase ? `${status}: ${phase}` : status);
      this.#onState(status, phase);
    } catch (error) {
      this.#say("state", error.status ? "failed" : "cannot be reached");
      this.#onState(null);
    }
  }

  async #askMetrics() {
    let now = {};
    try {
      now = await fetchJson("health/metrics", this.#key());
    } catch (error) {
      if (error.refusesKey) this.allowed = false;
    }
    this.#say("running", now.running);
    this.#say("waiting", now.waiting);
    this.#say("kv", share(now.kv_cache_use));
    this.#root.querySelector("#live-kv-meter").value = now.kv_cache_use ?? 0;
    this.#say("tokens", now.tokens_per_second?.["10s"]?.toFixed(1));
    this.#say("hits", share(now.cache_hit_rate));
  }

  #say(name, value) {
    this.#root.querySelector(`#live-${name}`).textContent = value ?? "–";
  }
}

const share = (value) => (value === null || value === undefined ? undefined : `${(value * 100).toFixed(1)}%`);
