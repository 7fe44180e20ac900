// The probe that is applied: which one, where it flags, and what it is not good for.

import { el } from "./dom.js";
import { brief, percent } from "./words.js";

export class ProbePanel {
  #body;
  #onRule;
  #probes = [];
  #probe = null;
  #point = null; // name of the chosen operating point

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

  /** The chosen operating point of tokens and of responses; null without a probe. */
  get rule() {
    if (!this.#probe) return null;
    const { token, response } = this.#probe.thresholds;
    return {
      probe: this.#probe.id,
      token: pick(token, this.#point),
      response: pick(response, this.#point),
    };
  }

  #choose(probe) {
    this.#probe = probe;
    this.#point = probe?.thresholds.token.default ?? null;
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
      this.#points(probe),
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

  /** Operating points as radio buttons: the share of faithful tokens flagged by mistake. */
  #points(probe) {
    const { token } = probe.thresholds;
    const cost = el("p", { class: "hint", "aria-live": "polite" });
    const tell = () => {
      const { threshold, recall } = this.rule.token;
      cost.textContent = `Flags tokens from risk ${brief(threshold)} up; finds ${percent(recall)} of the hallucinated tokens of held-out data.`;
    };
    const choices = token.operating_points.map(({ name, false_positive_rate: rate }) => {
      const radio = el("input", {
        type: "radio",
        name: "point",
        value: name,
        checked: name === this.#point,
      });
      radio.addEventListener("change", () => {
        this.#point = name;
        tell();
        this.#onRule(this.rule);
      });
      return el("label", {}, radio, el("span", {}, percent(rate)));
    });
    tell();
    return el(
      "fieldset",
      { class: "points" },
      el("legend", {}, "Flag at a false-positive rate of"),
      el("div", { class: "segments" }, ...choices),
      cost,
    );
  }
}

function pick(rule, name) {
  return (
    rule.operating_points.find((point) => point.name === name) ??
    rule.operating_points.find((point) => point.name === rule.default)
  );
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
