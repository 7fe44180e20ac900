// What a threshold makes of token risks. Risks are compared, never averaged.

/** "unscored" is a state of its own: no number, and not the same as low. */
export function level(risk, threshold) {
  if (risk === null) return "unscored";
  if (risk >= threshold) return "flagged";
  return risk >= threshold / 2 ? "near" : "low";
}

/** Half-open runs `[start, stop)` of neighbouring tokens at or over the threshold. */
export function flaggedRuns(tokens, threshold) {
  const runs = [];
  let start = -1;
  for (let i = 0; i <= tokens.length; i += 1) {
    const flagged = i < tokens.length && level(tokens[i].risk, threshold) === "flagged";
    if (flagged && start < 0) start = i;
    if (!flagged && start >= 0) {
      runs.push([start, i]);
      start = -1;
    }
  }
  return runs;
}
