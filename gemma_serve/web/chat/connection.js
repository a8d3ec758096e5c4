// The chat's protocol (the README's "Chat over a WebSocket"): one WebSocket, opened again when it breaks, on the
// same session.

import { ConnectionLost, NotOpened, ServerError, Unreachable } from "./errors.js";
import { tab } from "./storage.js";

const MOST_SECONDS = 30; // between two attempts
const OPEN_SECONDS = 20; // for the handshake
const PONG_SECONDS = 5;
const KEY = /^[!#$%&'*+.^_`|~0-9A-Za-z-]+$/; // what a subprotocol may consist of

/** JSON of one of the server's own paths. Throws `Unreachable`, `ServerError`. */
export async function fetchJson(path, key) {
  if (key && !KEY.test(key)) throw new ServerError({ message: "This is no API key.", status: 401 });
  let response;
  try {
    response = await fetch(path, { headers: key ? { Authorization: `Bearer ${key}` } : {}, cache: "no-store" });
  } catch {
    throw new Unreachable();
  }
  const body = await response.json().catch(() => ({}));
  if (response.ok) return body;
  const retry_after = Number(response.headers.get("Retry-After")) || null;
  throw new ServerError({ ...body.error, status: response.status, retry_after });
}

/**
 * Told of what happens, by the methods of `on`: `state(name, error, seconds)` with the names `connecting`,
 * `connected`, `waiting` (for the next attempt, in `seconds`), `refused` (until there is another key) and
 * `asleep` (until `wake`); `models(list)`; `ready(resumed, session)` when messages can be sent. `resumed` is
 * true, false, or null where there was nothing to go on with.
 */
export class Connection {
  key = "";
  #on;
  #socket = null;
  #attempt = 0; // which of them is the present one; what belongs to an earlier one is ignored
  #failures = 0;
  #timer = 0; // of the next attempt
  #mayHurry = true;
  #requests = new Map(); // by id
  #ids = 0;
  #asleep = false;
  #session = null; // that the socket has now
  #connected = false;

  constructor(on) {
    this.#on = on;
  }

  get connected() {
    return this.#connected;
  }

  /** Connect, with the present key; again, if there is a connection. */
  async start() {
    const attempt = ++this.#attempt;
    clearTimeout(this.#timer);
    this.#timer = 0;
    this.#asleep = false;
    this.#drop();
    this.#on.state("connecting");
    try {
      // First over HTTP: of a WebSocket's refused handshake a page learns nothing.
      const models = await fetchJson("v1/models", this.key);
      if (attempt !== this.#attempt) return;
      this.#on.models(models.data);
      const first = await this.#open(attempt);
      const [resumed, session] = await this.#resume(first);
      if (attempt !== this.#attempt) return;
      this.#failures = 0;
      this.#connected = true;
      this.#on.state("connected");
      this.#on.ready(resumed, session);
    } catch (error) {
      if (attempt === this.#attempt) this.#again(error);
    }
  }

  /** After a silence, or when the network is back: is it still there? */
  async wake() {
    if (this.#asleep || (this.#timer && this.#mayHurry)) {
      this.#failures = 0;
      return this.start();
    }
    if (!this.#connected) return;
    const attempt = this.#attempt;
    const timer = setTimeout(() => attempt === this.#attempt && this.start(), PONG_SECONDS * 1000);
    await this.request("ping").catch(() => {});
    clearTimeout(timer);
  }

  /**
   * Send a message; the promise has what ends its answer. `onPart(type, data)` is called for each `token` and
   * `trimmed` before. Throws `ServerError`, `ConnectionLost`.
   */
  request(type, data = {}, onPart = () => {}) {
    const socket = this.#socket;
    if (socket?.readyState !== WebSocket.OPEN) return Promise.reject(new ConnectionLost());
    const id = String(++this.#ids);
    socket.send(JSON.stringify({ type, id, data }));
    if (type === "cancel") return Promise.resolve(); // the question's own answer says how it ended
    return new Promise((resolve, reject) => this.#requests.set(id, { resolve, reject, onPart }));
  }

  /** The session is worth coming back to: something is in it now. */
  remember() {
    tab.set("session", this.#session);
  }

  forget() {
    tab.set("session", null);
  }

  #open(attempt) {
    const url = new URL("ws", location.href);
    url.protocol = url.protocol === "https:" ? "wss:" : "ws:";
    url.search = url.hash = "";
    const socket = new WebSocket(url.href, ["gemma-chat", ...(this.key ? [`openai-insecure-api-key.${this.key}`] : [])]);
    this.#socket = socket;
    return new Promise((resolve, reject) => {
      const late = setTimeout(() => {
        reject(new Unreachable());
        socket.close();
      }, OPEN_SECONDS * 1000);
      socket.onmessage = (event) => {
        if (attempt !== this.#attempt) return;
        clearTimeout(late);
        const message = JSON.parse(event.data);
        this.#session = message.session_id;
        this.#take(message);
        resolve(message.data); // the first one counts, which is a `session`
      };
      socket.onclose = () => {
        clearTimeout(late);
        reject(new NotOpened());
        if (attempt !== this.#attempt) return;
        if (this.#connected) this.#broke();
        else this.#abandon();
      };
    });
  }

  async #resume(first) {
    const session_id = tab.get("session");
    if (!session_id) return [null, first];
    try {
      return [true, (await this.request("session", { session_id })).data];
    } catch (error) {
      if (error.code !== "session_not_found") throw error;
      this.forget();
      return [false, first];
    }
  }

  #take({ type, id, data }) {
    if (type === "going_away") {
      this.#asleep = data.reason === "idle";
      return;
    }
    const request = this.#requests.get(id);
    if (!request) return;
    if (type === "token" || type === "trimmed") return request.onPart(type, data);
    this.#requests.delete(id);
    if (type === "error") request.reject(new ServerError(data));
    else request.resolve({ type, data });
  }

  #broke() {
    this.#attempt++;
    this.#drop();
    if (this.#asleep) this.#on.state("asleep");
    else this.#again(new ConnectionLost());
  }

  #drop() {
    this.#connected = false;
    const socket = this.#socket;
    this.#socket = null;
    socket?.close();
    this.#abandon();
  }

  #abandon() {
    const requests = [...this.#requests.values()];
    this.#requests.clear();
    for (const request of requests) request.reject(new ConnectionLost());
  }

  #again(error) {
    this.#drop();
    if (error instanceof ServerError && error.refusesKey) {
      return this.#on.state("refused", error);
    }
    const backoff = Math.min(MOST_SECONDS, 2 ** this.#failures++) * (0.75 + Math.random() / 2);
    const seconds = error.retryAfter ?? backoff;
    this.#mayHurry = !error.retryAfter; // where the server said when, that is when
    this.#timer = setTimeout(() => this.start(), seconds * 1000);
    this.#on.state("waiting", error, seconds);
  }
}
