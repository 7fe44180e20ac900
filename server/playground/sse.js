// Server-sent events from a fetch body. EventSource cannot POST, so this is the standard's parser
// over a byte stream: chunks may be cut anywhere, inside a character and between CR and LF too.

/** Yields the `data` of every complete event; comments and other fields are passed over. */
export async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  const parser = new EventParser();
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return; // an event without its closing blank line is dropped, as the standard says
      yield* parser.push(value);
    }
  } finally {
    // Also when the consumer stops early: the server sees the disconnect and ends the generation.
    await reader.cancel().catch(() => {}); // a stream that already failed has reported it by read()
  }
}

export class EventParser {
  #buffer = "";
  #data = [];

  /** Feed decoded text, get the data of the events that it completed. */
  push(text) {
    const done = [];
    this.#buffer += text;
    for (;;) {
      const line = this.#takeLine();
      if (line === null) return done;
      if (line === "") {
        if (this.#data.length) done.push(this.#data.join("\n"));
        this.#data = [];
      } else if (line === "data" || line.startsWith("data:")) {
        this.#data.push(line.slice(5).replace(/^ /, ""));
      }
    }
  }

  /** The next line without its CR, LF or CRLF; null while its end has not arrived. */
  #takeLine() {
    const end = this.#buffer.search(/[\r\n]/);
    if (end < 0) return null;
    const isCarriageReturn = this.#buffer[end] === "\r";
    if (isCarriageReturn && end + 1 === this.#buffer.length) return null; // its LF may be next
    const skip = isCarriageReturn && this.#buffer[end + 1] === "\n" ? 2 : 1;
    const line = this.#buffer.slice(0, end);
    this.#buffer = this.#buffer.slice(end + skip);
    return line;
  }
}
