// <risk-sparkline>: risk over the tokens of one answer, with the threshold. Higher is worse.

import { svg } from "./dom.js";
import { level } from "./spans.js";
import { brief, plural, visible } from "./words.js";

const WIDTH = 1000;
const HEIGHT = 100; // of the drawing; the style sheet stretches it
const FEWEST = 24; // tokens the axis has room for before it starts to compress

class RiskSparkline extends HTMLElement {
  #line = svg("path", { class: "line" });
  #area = svg("path", { class: "area" });
  #flagged = svg("path", { class: "dots" });
  #unscored = svg("path", { class: "unscored" });
  #threshold = svg("path", { class: "threshold" });
  #cursor = svg("path", { class: "cursor" });
  #drawing = svg(
    "svg",
    {
      viewBox: `0 0 ${WIDTH} ${HEIGHT}`,
      preserveAspectRatio: "none",
      role: "img",
      "aria-label": "No risk yet",
    },
    this.#area,
    this.#unscored,
    this.#threshold,
    this.#line,
    this.#flagged,
    this.#cursor,
  );
  #tokens = [];

  connectedCallback() {
    this.append(this.#drawing);
  }

  /** `tokens` that show text, so far. */
  draw(tokens, threshold) {
    this.#tokens = tokens;
    const line = [];
    const area = [];
    const dots = [];
    const holes = [];
    tokens.forEach(({ risk }, i) => {
      const x = this.#x(i);
      if (risk === null) {
        holes.push(`M${x} 0V${HEIGHT}`);
        return;
      }
      const joined = i > 0 && tokens[i - 1].risk !== null;
      const last = i + 1 === tokens.length || tokens[i + 1].risk === null;
      line.push(`${joined ? "L" : "M"}${x} ${y(risk)}${joined ? "" : "h0"}`);
      area.push(`${joined ? "L" : `M${x} ${HEIGHT}L`}${x} ${y(risk)}${last ? `V${HEIGHT}Z` : ""}`);
      if (level(risk, threshold) === "flagged") dots.push(`M${x} ${y(risk)}h0`);
    });
    this.#line.setAttribute("d", line.join(""));
    this.#area.setAttribute("d", area.join(""));
    this.#flagged.setAttribute("d", dots.join(""));
    this.#unscored.setAttribute("d", holes.join(""));
    this.#threshold.setAttribute("d", `M0 ${y(threshold)}H${WIDTH}`);
    this.#drawing.setAttribute("aria-label", summary(tokens, threshold));
  }

  /** Mark one token, or none. */
  point(token) {
    const index = this.#tokens.indexOf(token);
    this.#cursor.setAttribute("d", index < 0 ? "" : `M${this.#x(index)} 0V${HEIGHT}`);
  }

  #x(index) {
    return Math.round(((index + 0.5) * WIDTH) / Math.max(this.#tokens.length, FEWEST));
  }
}

const y = (risk) => Math.round((1 - risk) * (HEIGHT - 8) + 4);

function summary(tokens, threshold) {
  const scored = tokens.filter(({ risk }) => risk !== null);
  if (!scored.length) return `${plural(tokens.length, "token")}, none scored.`;
  const worst = scored.reduce((a, b) => (b.risk > a.risk ? b : a));
  const flagged = scored.filter(({ risk }) => risk >= threshold).length;
  const unscored = tokens.length - scored.length;
  return (
    `Risk over ${plural(tokens.length, "token")}, higher is worse. ` +
    `Highest ${brief(worst.risk)} at token ${tokens.indexOf(worst) + 1}, “${visible(worst.token)}”. ` +
    `${flagged} at or over the threshold of ${brief(threshold)}` +
    (unscored ? `, ${unscored} not scored.` : ".")
  );
}

customElements.define("risk-sparkline", RiskSparkline);
