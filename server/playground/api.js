// The server's /v1, as any client sees it. Knows no page.

import { events } from "./sse.js";

/** A refusal or failure, in words fit to be shown. */
export class ApiError extends Error {
  constructor(message, { status = 0, param = null, retryAfter = null } = {}) {
    super(message);
    this.status = status;
    this.param = param;
    this.retryAfter = retryAfter;
  }
}

export class Api {
  #key = null; // memory only: never stored, never in an address

  setKey(key) {
    this.#key = key;
  }

  async models() {
    return (await this.#json("v1/models")).data;
  }

  async probes() {
    return (await this.#json("v1/probes")).data;
  }

  async score(body, signal) {
    return this.#json("v1/risk", body, signal);
  }

  /** Chunks of a streamed chat completion. Throws ApiError unless the stream ends with [DONE]. */
  async *chat(body, signal) {
    const response = await this.#send("v1/chat/completions", { ...body, stream: true }, signal);
    for await (const data of streamed(response)) {
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new ApiError(chunk.error.message, { param: chunk.error.param });
      yield chunk;
    }
    throw new ApiError("The connection ended before the answer was complete.");
  }

  async #json(path, body, signal) {
    return (await this.#send(path, body, signal)).json();
  }

  async #send(path, body, signal) {
    const headers = { accept: "application/json, text/event-stream" };
    if (body !== undefined) headers["content-type"] = "application/json";
    if (this.#key !== null) headers.authorization = `Bearer ${this.#key}`;
    let response;
    try {
      response = await fetch(new URL(path, document.baseURI), {
        method: body === undefined ? "GET" : "POST",
        headers,
        body: body === undefined ? undefined : JSON.stringify(body),
        signal,
        cache: "no-store",
      });
    } catch (error) {
      throw unreachable(error);
    }
    if (!response.ok) throw await refusal(response);
    return response;
  }
}

async function* streamed(response) {
  try {
    yield* events(response.body);
  } catch (error) {
    throw unreachable(error);
  }
}

/** fetch says TypeError for every kind of broken network; an abort stays an abort. */
function unreachable(error) {
  if (error instanceof TypeError) {
    return new ApiError("The server cannot be reached, or the connection was lost.");
  }
  return error;
}

async function refusal(response) {
  const seconds = Number.parseFloat(response.headers.get("retry-after") ?? "");
  const error = (await response.json().catch(() => null))?.error; // a proxy may answer HTML
  return new ApiError(error?.message ?? `The server answered with status ${response.status}.`, {
    status: response.status,
    param: error?.param ?? null,
    retryAfter: Number.isFinite(seconds) ? seconds : null,
  });
}
