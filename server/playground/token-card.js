// The card of one token: exact risk, what it means, and which neurons added to its logit.
// One card serves the page; it follows the pointer's token, or the keyboard's.

import { el } from "./dom.js";
import { level } from "./spans.js";
import { brief, exact, signed, visible, whyNotScored } from "./words.js";

const LINGER = 150; // ms in which the pointer may travel from the token to the card

export class TokenCard {
  #card = el("div", { id: "token-card", class: "token-card", role: "tooltip", hidden: true });
  #token = null;
  #timer = 0;

  constructor() {
    document.querySelector("main").append(this.#card); // in a landmark, placed in page coordinates
    this.#card.addEventListener("pointerenter", () => clearTimeout(this.#timer));
    this.#card.addEventListener("pointerleave", () => this.#hideSoon());
    document.addEventListener("keydown", (event) => event.key === "Escape" && this.hide());
  }

  /** Tokens of `answer` show this card; `context()` gives { threshold, calibrated, unscored }. */
  watch(answer, context, onChange) {
    const show = (event) => {
      const token = event.target.closest(".token");
      if (!token) return;
      clearTimeout(this.#timer);
      this.#show(token, context());
      onChange(token.entry);
    };
    const leave = () => {
      this.#hideSoon();
      onChange(null);
    };
    answer.addEventListener("pointerover", show);
    answer.addEventListener("focusin", show);
    answer.addEventListener("pointerleave", leave);
    answer.addEventListener("focusout", leave);
  }

  hide() {
    clearTimeout(this.#timer);
    this.#token?.removeAttribute("aria-describedby");
    this.#token = null;
    this.#card.hidden = true;
  }

  #hideSoon() {
    clearTimeout(this.#timer);
    this.#timer = setTimeout(() => this.hide(), LINGER);
  }

  #show(token, context) {
    this.#token?.removeAttribute("aria-describedby");
    this.#token = token;
    this.#card.replaceChildren(...content(token.entry, context));
    this.#card.hidden = false;
    token.setAttribute("aria-describedby", this.#card.id);
    this.#place(token);
  }

  #place(token) {
    const line = [...token.getClientRects()].at(-1);
    const margin = 8;
    const { width, height } = this.#card.getBoundingClientRect();
    const left = Math.max(
      margin,
      Math.min(line.left, document.documentElement.clientWidth - width - margin),
    );
    const below = line.bottom + margin;
    const above = line.top - margin - height;
    const top = below + height > window.innerHeight && above > 0 ? above : below;
    this.#card.style.left = `${left + window.scrollX}px`;
    this.#card.style.top = `${top + window.scrollY}px`;
  }
}

function content(entry, { threshold, calibrated, unscored }) {
  const name = el("p", { class: "name" }, visible(entry.token));
  if (entry.risk === null) {
    return [
      name,
      el("p", { class: "number" }, "Not scored"),
      el("p", {}, `Because ${whyNotScored(entry.reason ?? unscored)}. This is not a low risk.`),
    ];
  }
  const verdict = { flagged: "at or over", near: "under", low: "under" }[
    level(entry.risk, threshold)
  ];
  return [
    name,
    el("p", { class: "number" }, exact(entry.risk)),
    el(
      "p",
      {},
      `Risk, higher is worse; ${verdict} the threshold of ${brief(threshold)}.${calibrated ? "" : " Not calibrated at this alpha."}`,
    ),
    ...contributors(entry.contributors ?? []),
  ];
}

function contributors(list) {
  if (!list.length) return [];
  const largest = Math.max(...list.map(({ value }) => Math.abs(value))) || 1;
  const rows = list.map(({ layer, neuron, value }) => {
    const bar = el("span", { class: value < 0 ? "bar minus" : "bar" });
    bar.style.setProperty("--length", Math.abs(value) / largest);
    return el(
      "tr",
      {},
      el("td", {}, String(layer)),
      el("td", {}, String(neuron)),
      el("td", { class: "share" }, bar, signed(value)),
    );
  });
  const head = el(
    "tr",
    {},
    ...["Layer", "Neuron", "Share of the logit"].map((word) => el("th", { scope: "col" }, word)),
  );
  return [
    el(
      "table",
      {},
      el("caption", {}, "Largest contributions to the logit, not causes"),
      el("thead", {}, head),
      el("tbody", {}, ...rows),
    ),
  ];
}
