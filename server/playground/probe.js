// The probe that is applied: which one, where it flags, and what it is not good for.

import { el } from "./dom.js";
import { brief, percent } from "./words.js";

// Tokens and whole answers are judged by separate operating points, each with its own default.
const LEVELS = {
  token: { legend: "Flag tokens at a false-positive rate of", nouns: "hallucinated tokens" },
  response: { legend: "Flag answers at a false-positive rate of", nouns: "wrong answers" },
};

export class ProbePanel {
  #body;
  #onRule;
  #probes = [];
  #probe = null;
  #points = {}; // the chosen operating point of each level

  constructor(body, onRule) {
    this.#body = body;
    this.#onRule = onRule;
  }

  set probes(list) {
    this.#probes = list;
    this.#choose(list.find((probe) => probe.default) ?? list[0] ?? null);
  }

  /** Name of the chosen probe; null: the server has none. */
  get name() {
    return this.#probe?.name ?? null;
  }

  /** Requests may scale its neurons. */
  get suppression() {
    return this.#probe?.suppression ?? false;
  }

  /** The chosen operating point of tokens and of responses; null without a probe. */
  get rule() {
    if (!this.#probe) return null;
    return { probe: this.#probe.id, ...this.#points };
  }

  #choose(probe) {
    this.#probe = probe;
    for (const level of Object.keys(LEVELS)) {
      if (probe) this.#points[level] = defaultPoint(probe.thresholds[level]);
    }
    this.#body.replaceChildren(...(probe ? this.#describe(probe) : [nothing()]));
    this.#onRule(this.rule);
  }

  #describe(probe) {
    return [
      this.#probes.length > 1 ? this.#selector() : "",
      el("p", { class: "probe-id" }, el("code", {}, probe.id)),
      el(
        "p",
        { class: "hint" },
        `Reads ${probe.neurons} neurons in ${probe.layers} layers, ${probe.h_neurons} of them H-neurons, when a token is ${probe.position}.`,
      ),
      ...Object.keys(LEVELS).map((level) => this.#segments(probe, level)),
      el("h3", {}, "Not good for"),
      el("ul", {}, ...probe.not_good_for.map((sentence) => el("li", {}, sentence))),
      evaluation(probe.evaluation),
    ];
  }

  #selector() {
    const options = this.#probes.map((probe) =>
      el("option", { value: probe.name, selected: probe === this.#probe }, probe.name),
    );
    const select = el("select", {}, ...options);
    select.addEventListener("change", () =>
      this.#choose(this.#probes.find(({ name }) => name === select.value)),
    );
    return el("label", {}, "Probe ", select);
  }

  /** Operating points as radio buttons: what may be flagged by mistake, and what is found. */
  #segments(probe, level) {
    const { legend, nouns } = LEVELS[level];
    const cost = el("p", { class: "hint", "aria-live": "polite" });
    const tell = () => {
      const { threshold, recall } = this.#points[level];
      const found = `finds ${percent(recall)} of the ${nouns} in held-out data`;
      cost.textContent = `From risk ${brief(threshold)} up; ${found}.`;
    };
    const choices = probe.thresholds[level].operating_points.map((point) => {
      const radio = el("input", {
        type: "radio",
        name: `${level}-point`,
        value: point.name,
        checked: point === this.#points[level],
      });
      radio.addEventListener("change", () => {
        this.#points[level] = point;
        tell();
        this.#onRule(this.rule);
      });
      return el("label", {}, radio, el("span", {}, percent(point.false_positive_rate)));
    });
    tell();
    const row = el("div", { class: "segments" }, ...choices);
    return el("fieldset", {}, el("legend", {}, legend), row, cost);
  }
}

function defaultPoint(rule) {
  return rule.operating_points.find(({ name }) => name === rule.default);
}

function nothing() {
  return el(
    "p",
    { class: "notice" },
    "No probe is loaded: the model answers, and nothing is scored. Start the server with --probe to see risks.",
  );
}

function evaluation(rows) {
  if (!rows.length) return "";
  const cells = ({ dataset, detector, metric, value, low, high, n }) => [
    `${dataset}, ${detector}`,
    metric,
    low === null || high === null
      ? value.toFixed(3)
      : `${value.toFixed(3)} [${low.toFixed(3)}, ${high.toFixed(3)}]`,
    String(n),
  ];
  const head = ["Measured on", "Metric", "Value [95 %]", "n"].map((word) =>
    el("th", { scope: "col" }, word),
  );
  const body = rows.map((row) => el("tr", {}, ...cells(row).map((text) => el("td", {}, text))));
  return el(
    "details",
    {},
    el("summary", {}, "How it was measured"),
    el(
      "div",
      { class: "scroll", tabindex: "0", role: "region", "aria-label": "Evaluation" },
      el("table", {}, el("thead", {}, el("tr", {}, ...head)), el("tbody", {}, ...body)),
    ),
  );
}
