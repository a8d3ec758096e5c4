// What can go wrong, and how a person is told.

/** The server could not be reached at all. */
export class Unreachable extends Error {}

/** The server answers over HTTP, but it or something before it refuses the WebSocket. */
export class NotOpened extends Error {}

/** The connection broke before the answer to a message was complete. */
export class ConnectionLost extends Error {}

/** An answer ended before any of its text: the server's history has neither it nor its question. */
export class NoAnswer extends Error {}

/** The server said no: over HTTP, or with an `error` over the WebSocket, which has the same fields. */
export class ServerError extends Error {
  constructor({ message, status, code, retry_after }) {
    super(message || `The server answered with ${status}.`);
    this.status = status;
    this.code = code;
    this.retryAfter = retry_after ?? null;
  }

  /** Nothing helps but another key. */
  get refusesKey() {
    return this.status === 401 || this.status === 403;
  }
}

const wait = (error) => (error.retryAfter ? ` Try again in ${duration(error.retryAfter)}.` : " Try again.");

export function duration(seconds) {
  if (seconds < 120) return `${Math.ceil(seconds)} s`;
  return seconds < 7200 ? `${Math.ceil(seconds / 60)} minutes` : `${Math.ceil(seconds / 3600)} hours`;
}

/** One or two sentences. */
export function plainWords(error, hasKey = false) {
  if (error instanceof Unreachable) return "The server cannot be reached.";
  if (error instanceof NotOpened) {
    return "The server did not open the chat: it is full or over a limit, or what stands before it lets no WebSocket through.";
  }
  if (error instanceof NoAnswer) return error.message;
  if (error instanceof ConnectionLost) return "The connection broke.";
  if (!(error instanceof ServerError)) return `The page failed: ${error.message}`;
  switch (error.code) {
    case "client_blocked":
      return `Too many wrong keys or requests came from here; the server has closed the door.${wait(error)}`;
    case "engine_loading":
      return `The model is still loading.${wait(error)}`;
    case "engine_overloaded":
    case "too_many_connections":
      return `The server is full.${wait(error)}`;
    case "server_shutting_down":
      return `The server is shutting down.${wait(error)}`;
    case "context_length_exceeded":
      return `This is too long for the model. ${error.message}`;
  }
  switch (error.status) {
    case 401:
      return hasKey ? "The server does not know this API key." : "This server needs an API key.";
    case 403:
      return `The server does not allow this. ${error.message}`;
    case 429:
      return `That was too much for the limits of this ${hasKey ? "key" : "address"}.${wait(error)}`;
    case 503:
      return `The server cannot answer now: ${error.message}${wait(error)}`;
    default:
      return error.message;
  }
}
