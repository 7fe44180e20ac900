// One answer with everything known about it: response risk, sparkline, tokens, spans, table.

import "./answer.js";
import "./sparkline.js";
import { ApiError } from "./api.js";
import { el } from "./dom.js";
import { flaggedRuns, level } from "./spans.js";
import { brief, exact, failure, percent, plural, visible, whyNotScored } from "./words.js";

const isShown = ({ segment }) => segment === "content";
const ENDINGS = {
  stop: "ended by itself",
  length: "cut at max tokens",
  content_filter: "ended by the server’s policy",
};
const NOT_CALIBRATED =
  "Risk is not calibrated at this alpha: read it as a rough order only. " +
  "Alpha is an experimental lever on behaviour, not a fix for hallucinations.";
const NO_PROBE = "Not scored: this server has no probe. That is not the same as a low risk.";

export class Column {
  complete = false; // the whole answer has arrived
  error = null; // ApiError, when it did not
  #rule; // operating points of the applied probe, or null: there is no probe
  #calibrated;
  #summary = null; // the risk object of the last chunk
  #unscored = null; // why tokens without a number have none
  #frame = 0;
  #closed = false; // nothing more will come

  #answer = el("risk-answer", { class: "text" });
  #sparkline = el("risk-sparkline");
  #state = el("p", { class: "state" });
  #score = el("p", { class: "score" }, "–");
  #verdict = el("p", { class: "verdict" });
  #measure = el("p", { class: "hint" });
  #note = el("p", { class: "hint" });
  #spans = el("ul", { class: "spans" });
  #rows = el("tbody");
  #table = tokenTable(this.#rows);

  constructor({ title, alpha, rule, card }) {
    this.#rule = rule;
    this.#calibrated = alpha === 1;
    this.element = el(
      "article",
      {
        class: "column",
        "aria-label": title,
        "data-probe": rule ? "yes" : "no",
        "data-calibrated": this.#calibrated ? "yes" : "no",
      },
      ...this.#parts(title),
    );
    this.#note.textContent = rule ? (this.#calibrated ? "" : NOT_CALIBRATED) : NO_PROBE;
    if (rule) {
      this.#answer.threshold = rule.token.threshold;
      this.#describe("", "known when the answer is complete");
    }
    this.#table.addEventListener("toggle", () => this.#fillTable());
    card.watch(
      this.#answer,
      () => ({
        threshold: this.#rule?.token.threshold,
        calibrated: this.#calibrated,
        unscored: this.#unscored,
      }),
      (token) => this.#sparkline.point(token),
    );
  }

  get text() {
    return this.#answer.text;
  }

  /** What a screen reader says once, at the end. */
  get spoken() {
    const parts = [this.element.ariaLabel, this.#state.textContent];
    if (this.#rule)
      parts.push(
        this.#verdict.textContent,
        `risk ${this.#score.textContent}`,
        this.#measure.textContent,
      );
    return `${parts.filter(Boolean).join(", ")}.`;
  }

  /** Show the chunks of `stream` as they come; what it throws ends the column with a sentence. */
  async follow(stream) {
    this.#state.textContent = "waiting";
    let ending = null;
    try {
      for await (const { choices } of stream) {
        if (!choices.length) continue; // a chunk that only carries usage
        const [choice] = choices;
        this.push(choice.delta.content ?? "", choice.risk);
        this.#state.textContent = choice.delta.reasoning ? "reasoning" : "writing";
        ending = choice.finish_reason ?? ending;
      }
      this.end(ENDINGS[ending] ?? ending);
    } catch (error) {
      this.fail(error);
    }
  }

  push(text, risk) {
    // Offsets of other segments (reasoning) point into text that is not shown here.
    this.#answer.push(text, (risk?.tokens ?? []).filter(isShown));
    if (risk && "status" in risk) this.#summary = risk;
    this.#frame ||= requestAnimationFrame(() => this.#draw());
  }

  end(how) {
    this.complete = true;
    this.#close(how, "missing");
  }

  fail(error) {
    if (error.name === "AbortError") {
      this.#close("stopped by you", "stopped");
      return;
    }
    if (!(error instanceof ApiError)) reportError(error); // a bug of the page, shown as one too
    this.error = error;
    this.#close("failed", "failed");
    this.element
      .querySelector("header")
      .append(el("p", { class: "error", role: "alert" }, failure(error)));
  }

  /** Another operating point of the same probe: flags change, risks do not. */
  apply(rule) {
    if (!this.#rule || rule?.probe !== this.#rule.probe) return;
    this.#rule = rule;
    this.#answer.threshold = rule.token.threshold;
    if (this.#closed) this.#conclude();
  }

  /** How far this answer is the other's. */
  compare(other) {
    const [mine, theirs] = [[...this.text], [...other.text]];
    const differs = mine.findIndex((point, i) => point !== theirs[i]);
    const shared = differs < 0 ? mine.length : differs;
    const same = this.text === other.text;
    const sentence = same
      ? "The same text as at alpha 1."
      : `The same as at alpha 1 for ${plural(shared, "character")}, then another text.`;
    this.#note.textContent = `${sentence} ${NOT_CALIBRATED}`;
  }

  #parts(title) {
    const header = el(
      "header",
      {},
      el("h2", {}, title),
      this.#calibrated ? "" : el("span", { class: "badge" }, "risk not calibrated"),
      this.#state,
    );
    if (!this.#rule) return [header, this.#answer, this.#note];
    const axis = el(
      "p",
      { class: "axis" },
      el("span", {}, "risk per token, higher is worse"),
      el("span", { class: "key" }, "threshold"),
    );
    return [
      header,
      el("div", { class: "response" }, this.#score, el("div", {}, this.#verdict, this.#measure)),
      el("div", { class: "chart" }, this.#sparkline, axis),
      this.#answer,
      this.#note,
      el("section", { class: "flags" }, el("h3", {}, "Flagged spans"), this.#spans),
      this.#table,
    ];
  }

  #close(how, reason) {
    this.#closed = true;
    if (this.#summary) this.#calibrated = this.#summary.calibrated;
    this.#unscored = this.#rule ? (this.#summary?.reason ?? reason) : "no_probe";
    this.#answer.close(this.#unscored);
    this.#state.textContent = how;
    this.#conclude();
  }

  #conclude() {
    if (!this.#rule) return;
    this.#draw();
    this.#fillTable();
    this.#listSpans();
    if (!this.#summary) {
      this.#describe("Not known", "the answer did not reach its end");
      return;
    }
    const { score, status } = this.#summary;
    const { threshold, false_positive_rate: rate } = this.#rule.response;
    const place = level(score, threshold);
    const count = this.#answer.visible.filter(({ risk }) => risk === null).length;
    const missing =
      status === "partial"
        ? `. Not scored: ${plural(count, "token")}, because ${whyNotScored(this.#unscored)}`
        : "";
    this.#score.textContent = score === null ? "–" : brief(score);
    this.#score.dataset.level = place;
    if (place === "unscored")
      this.#describe("Not scored", `${whyNotScored(this.#unscored)}, which is not a low risk`);
    else
      this.#describe(
        place === "flagged" ? "Flagged" : "Not flagged",
        `threshold ${brief(threshold)} at ${percent(rate)} false positives${missing}`,
      );
  }

  #describe(verdict, measure) {
    this.#verdict.textContent = verdict;
    this.#measure.textContent = `Response risk, higher is worse; ${measure}`;
  }

  #draw() {
    cancelAnimationFrame(this.#frame);
    this.#frame = 0;
    if (this.#rule) this.#sparkline.draw(this.#answer.visible, this.#rule.token.threshold);
  }

  #listSpans() {
    const tokens = this.#answer.visible;
    const points = [...this.text];
    const items = flaggedRuns(tokens, this.#rule.token.threshold).map(([first, stop]) => {
      const [start, end] = [tokens[first].start, tokens[stop - 1].end];
      // The server pools a span's logits at its own operating point; at another one only the
      // tokens' risks are known here, and those are never averaged.
      const served = this.#summary?.spans.find(
        (span) => isShown(span) && span.start === start && span.end === end,
      );
      const worst = Math.max(...tokens.slice(first, stop).map(({ risk }) => risk));
      const figure = served ? brief(served.risk) : `up to ${brief(worst)}`;
      return el(
        "li",
        {},
        el("q", {}, points.slice(start, end).join("").trim()),
        el("span", { class: "figure" }, figure),
      );
    });
    this.#spans.replaceChildren(
      ...(items.length ? items : [el("li", { class: "none" }, "None at this operating point")]),
    );
  }

  #fillTable() {
    if (!this.#table.open) return; // hundreds of rows, made only for those who look
    const { threshold } = this.#rule.token;
    const flagged = ({ risk, start, end }) => end > start && level(risk, threshold) === "flagged";
    const row = (token, i) => [
      String(i + 1),
      visible(token.token),
      token.risk === null ? "not scored" : exact(token.risk),
      flagged(token) ? "yes" : "",
    ];
    this.#rows.replaceChildren(
      ...this.#answer.tokens.map((token, i) =>
        el("tr", {}, ...row(token, i).map((text) => el("td", {}, text))),
      ),
    );
  }
}

function tokenTable(rows) {
  const heads = ["Token", "Text", "Risk (higher is worse)", "Flagged"].map((word) =>
    el("th", { scope: "col" }, word),
  );
  return el(
    "details",
    {},
    el("summary", {}, "All tokens as a table"),
    el("table", {}, el("thead", {}, el("tr", {}, ...heads)), rows),
  );
}
