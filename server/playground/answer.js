// <risk-answer>: the text of one answer, each token tinted with its risk as it arrives.
//
// Offsets on the wire are Unicode code points, JavaScript's strings are UTF-16: the text is kept as
// an array of code points. One token at a time is in the tab order; arrow keys move between tokens.

import { el } from "./dom.js";
import { level } from "./spans.js";

class RiskAnswer extends HTMLElement {
  #points = []; // code points of the visible text
  #shown = 0; // how many of them stand in token spans already
  #waiting = []; // entries whose text has not come yet
  #tail = document.createTextNode(""); // text whose entries have not come yet
  #spans = []; // the focusable tokens, in reading order
  #threshold = Infinity;
  tokens = []; // every entry as served, those without text too

  connectedCallback() {
    this.setAttribute("role", "group");
    this.setAttribute(
      "aria-label",
      "Answer, token by token. Left and right arrows move, up and down find flagged tokens.",
    );
    this.append(this.#tail);
    this.addEventListener("keydown", (event) => this.#move(event));
    this.addEventListener("focusin", (event) => this.#enter(event.target));
  }

  /** The tokens that show text: only these are drawn, flagged and counted, as on the server. */
  get visible() {
    return this.tokens.filter(({ start, end }) => end > start);
  }

  get text() {
    return this.#points.join("");
  }

  /** Text as it streams, and the entries that ride with it. */
  push(text, entries) {
    for (const point of text) this.#points.push(point);
    this.#waiting.push(...entries);
    this.tokens.push(...entries);
    while (this.#waiting.length && this.#waiting[0].end <= this.#points.length) {
      this.#place(this.#waiting.shift());
    }
    this.#tail.data = this.#points.slice(this.#shown).join("");
  }

  /** Text that never got an entry is not scored, and looks it. */
  close(reason) {
    const start = this.#shown;
    const end = this.#points.length;
    if (start < end)
      this.#place({ token: this.#slice(start, end), start, end, risk: null, reason });
    this.#tail.data = "";
  }

  set threshold(value) {
    this.#threshold = value;
    for (const span of this.#spans) this.#paint(span);
  }

  #place(entry) {
    const start = Math.max(entry.start, this.#shown); // bytes of one character may span tokens
    if (entry.end <= start) return; // no text of its own: the end token, part of a character
    if (start > this.#shown)
      this.#place({
        token: this.#slice(this.#shown, start),
        start: this.#shown,
        end: start,
        risk: null,
        reason: "missing",
      });
    // A leading space stays outside the tint: at a line's end it would hang there as a stub.
    const [, space, ink] = this.#slice(start, entry.end).match(/^(\s*)(.*)$/s);
    const span = el(
      "span",
      { class: "token", tabindex: this.#spans.length ? "-1" : "0" },
      ink || space,
    );
    span.entry = entry;
    this.#shown = entry.end;
    this.#spans.push(span);
    this.#paint(span);
    this.#tail.before(ink && space, span);
  }

  #paint(span) {
    const { risk } = span.entry;
    span.dataset.level = level(risk, this.#threshold);
    if (risk !== null) span.style.setProperty("--risk", risk);
  }

  #slice(start, end) {
    return this.#points.slice(start, end).join("");
  }

  #enter(target) {
    if (!this.#spans.includes(target)) return;
    for (const span of this.#spans) span.tabIndex = span === target ? 0 : -1;
  }

  #move(event) {
    const here = this.#spans.indexOf(event.target);
    if (here < 0 || event.altKey || event.ctrlKey || event.metaKey) return;
    const flagged = (span) => span.dataset.level === "flagged";
    const next = {
      ArrowRight: () => this.#spans[here + 1],
      ArrowLeft: () => this.#spans[here - 1],
      ArrowDown: () => this.#spans.slice(here + 1).find(flagged),
      ArrowUp: () => this.#spans.slice(0, here).findLast(flagged),
      Home: () => this.#spans[0],
      End: () => this.#spans.at(-1),
    }[event.key];
    if (!next) return;
    event.preventDefault(); // also at the ends: the page must not scroll away under the reader
    next()?.focus();
  }
}

customElements.define("risk-answer", RiskAnswer);
