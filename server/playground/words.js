// Numbers, reasons and failures, as a person reads them.

export const percent = (share) => `${+(share * 100).toPrecision(2)} %`;
export const brief = (risk) => risk.toFixed(2);
export const exact = (risk) => risk.toFixed(4);
export const signed = (value) => (value < 0 ? "−" : "+") + Math.abs(value).toFixed(3);
export const plural = (count, noun) => `${count} ${noun}${count === 1 ? "" : "s"}`;

/** A token as a person can see it: spaces and line ends have no shape of their own. */
export function visible(text) {
  if (text === "") return "(no text)";
  return text
    .replaceAll("\n", "⏎")
    .replaceAll("\t", "⇥")
    .replace(/^ +| +$/g, (s) => "␣".repeat(s.length));
}

const REASONS = {
  not_read: "the model ended before it read this token",
  nonfinite: "the reading was not a finite number",
  no_text: "the answer holds no text",
  missing: "the server sent no number for it",
  failed: "the answer broke off before it was read",
  stopped: "the answer was stopped before it was read",
  no_probe: "this server has no probe",
};

/** Why something was not scored; an unknown reason is shown as the server words it. */
export function whyNotScored(reason) {
  return REASONS[reason] ?? (reason ? reason.replaceAll("_", " ") : "the server gave no reason");
}

function sentence(words) {
  const end = /[.!?]$/.test(words) ? "" : ".";
  return words.charAt(0).toUpperCase() + words.slice(1) + end;
}

/** An error as one or two sentences: what happened, and what to do. */
export function failure(error) {
  const wait =
    error.retryAfter === null || error.retryAfter === undefined
      ? ""
      : ` Try again in ${plural(Math.ceil(error.retryAfter), "second")}.`;
  switch (error.status) {
    case 400:
      return `The server refused the request: ${sentence(error.message)}`;
    case 401:
      return "The server asks for an API key, or does not know this one.";
    case 413:
      return `The text is too long: ${sentence(error.message)}`;
    case 429:
      return `The server is busy.${wait || " Try again soon."}`;
    case 503:
      return `The server is not ready.${wait || " Try again soon."}`;
    default:
      return sentence(error.message);
  }
}
