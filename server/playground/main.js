// Wires the page: forms in, columns out. State is one conversation turn and one AbortController.

import { Api } from "./api.js";
import { Column } from "./column.js";
import { byId, el } from "./dom.js";
import { EXAMPLES } from "./examples.js";
import { ProbePanel } from "./probe.js";
import { TokenCard } from "./token-card.js";
import { failure } from "./words.js";

const CONTRIBUTORS = 5; // per token; the wire allows 10

const api = new Api();
const card = new TokenCard();
const panel = new ProbePanel(byId("probe-body"), (rule) => {
  columns.forEach((column) => column.apply(rule));
  byId("alpha").disabled = !panel.suppression;
});
let columns = [];
let model = null;
let running = null; // AbortController of the turn that is being answered

// --- the server -----------------------------------------------------------------------------

async function connect() {
  try {
    const [models, probes] = await Promise.all([api.models(), api.probes()]);
    model = models[0].id;
    panel.probes = probes;
    byId("score-send").disabled = panel.name === null;
    byId("send").disabled = false;
    byId("key").hidden = true;
    say(panel.name === null ? `${model}, no probe` : model, "ready");
  } catch (error) {
    say(failure(error), "down");
    byId("key").hidden = error.status !== 401;
    if (error.status === 503 || error.status === 0)
      setTimeout(connect, (error.retryAfter ?? 2) * 1000);
  }
}

function say(text, state) {
  byId("server").textContent = text;
  byId("server").dataset.state = state;
}

// --- one turn -------------------------------------------------------------------------------

function ask() {
  const prompt = byId("prompt").value;
  if (!prompt.trim() || model === null) return;
  const alpha = panel.suppression ? byId("alpha").valueAsNumber : 1;
  const alphas = alpha === 1 ? [1] : [1, alpha];
  const title = (value) =>
    alphas.length === 1
      ? "Answer"
      : value === 1
        ? "Alpha 1, unchanged"
        : `Alpha ${value.toFixed(1)}`;
  const request = body(prompt); // one for all: the same seed, so that only alpha differs
  turn(
    alphas.map((value) => ({ title: title(value), alpha: value })),
    async (signal) => {
      const follow = (column, i) => {
        const risk = panel.name === null ? {} : { risk: riskOptions(alphas[i]) };
        return column.follow(api.chat({ ...request, ...risk }, signal));
      };
      await Promise.all(columns.map(follow));
      if (columns.length === 2 && columns.every(({ complete }) => complete))
        columns[1].compare(columns[0]);
    },
  );
}

function score() {
  const [question, answer] = [byId("score-question").value, byId("score-answer").value];
  if (!question.trim() || !answer || panel.name === null) return;
  turn([{ title: "Given text", alpha: 1 }], async (signal) => {
    const [column] = columns;
    try {
      const messages = [{ role: "user", content: question }];
      const result = await api.score({ model, messages, answer, risk: riskOptions(1) }, signal);
      column.push(answer, result.risk);
      column.end("read, not generated");
    } catch (error) {
      column.fail(error);
    }
  });
}

async function turn(specifications, work) {
  running?.abort();
  const mine = new AbortController();
  running = mine;
  card.hide();
  columns = specifications.map(
    (specification) => new Column({ ...specification, rule: panel.rule, card }),
  );
  byId("columns").replaceChildren(...columns.map((column) => column.element));
  byId("columns").scrollIntoView({ block: "nearest" }); // on a phone the answers lie below the form
  setBusy(true);
  byId("announcer").textContent = "";
  await work(mine.signal);
  if (running !== mine) return; // a newer turn has taken the page
  running = null;
  setBusy(false);
  if (columns.some(({ error }) => error?.status === 401)) byId("key").hidden = false;
  byId("announcer").textContent = columns.map((column) => column.spoken).join(" ");
}

function body(prompt) {
  const system = byId("system").value;
  const messages = [{ role: "user", content: prompt }];
  if (system) messages.unshift({ role: "system", content: system });
  const request = { model, messages, seed: Math.floor(Math.random() * 2 ** 31) };
  const numbers = { temperature: "temperature", "max-tokens": "max_tokens", seed: "seed" };
  for (const [id, name] of Object.entries(numbers)) {
    const value = byId(id).valueAsNumber;
    if (!Number.isNaN(value)) request[name] = value; // empty: the server's default
  }
  return request;
}

const riskOptions = (alpha) => ({ probe: panel.name, alpha, contributors: CONTRIBUTORS });

function setBusy(busy) {
  const [stop, send] = [byId("stop"), byId("send")];
  byId("answers").ariaBusy = String(busy);
  const lost = document.activeElement === stop; // a disabled button would drop the focus
  stop.disabled = !busy;
  if (lost && !busy) send.focus();
}

// --- the controls ---------------------------------------------------------------------------

function showTab(tab) {
  for (const each of document.querySelectorAll("[role=tab]")) {
    const chosen = each === tab;
    each.ariaSelected = String(chosen);
    each.tabIndex = chosen ? 0 : -1;
    byId(each.getAttribute("aria-controls")).hidden = !chosen;
  }
}

function showExamples() {
  for (const { title, prompts } of EXAMPLES) {
    const buttons = prompts.map(([name, prompt]) => {
      const button = el("button", { type: "button", title: prompt }, name);
      button.addEventListener("click", () => {
        byId("prompt").value = prompt;
        ask();
      });
      return button;
    });
    byId("examples").append(
      el("p", { class: "hint" }, title),
      el("div", { class: "chips" }, ...buttons),
    );
  }
}

function submitOnEnter(event) {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  event.target.form.requestSubmit();
}

for (const [id, action] of [
  ["ask", ask],
  ["score", score],
  ["key", useKey],
]) {
  byId(id).addEventListener("submit", (event) => {
    event.preventDefault();
    action();
  });
}

function useKey() {
  api.setKey(byId("api-key").value);
  byId("api-key").value = "";
  connect();
}

byId("prompt").addEventListener("keydown", submitOnEnter);
byId("stop").addEventListener("click", () => running?.abort());
byId("alpha").addEventListener("input", () => {
  byId("alpha-value").textContent = byId("alpha").valueAsNumber.toFixed(1);
});
for (const tab of document.querySelectorAll("[role=tab]")) {
  tab.addEventListener("click", () => showTab(tab));
  tab.addEventListener("keydown", (event) => {
    if (event.key !== "ArrowLeft" && event.key !== "ArrowRight") return;
    const other = tab.nextElementSibling ?? tab.previousElementSibling;
    showTab(other);
    other.focus();
  });
}

showExamples();
connect();
