// Prompts on which the demo model (SmolLM2-135M-Instruct, greedy) was seen to be right or to make
// things up. `flagged`: whether its shipped probe flags any token of the answer; a test asks both.

const SHORT = "Respond with the answer only, without any explanation.";
const COMPLETE = "Respond with the missing words only.";

export const EXAMPLES = [
  {
    title: "The demo model gets these right",
    flagged: false,
    prompts: [
      ["Capital of France", `What is the capital of France? ${SHORT}`],
      ["Symbol for gold", `What is the chemical symbol for gold? ${SHORT}`],
      ["Plants", `Which gas do plants take in for photosynthesis? ${SHORT}`],
      ["Capital of Italy", `Complete the sentence: The capital of Italy is ... ${COMPLETE}`],
    ],
  },
  {
    title: "Here it makes things up",
    flagged: true,
    prompts: [
      ["The Football War", "Which two countries fought the Football War of 1969?"],
      ["Peace of Westphalia", "When was the Peace of Westphalia signed, and where?"],
      ["Monte Cristo", `Complete the sentence: The Count of Monte Cristo was written by ... ${COMPLETE}`],
      ["An invented town", "What is the town of Veldmoor in Austria known for?"],
    ],
  },
  {
    title: "Wrong too, and the probe misses it",
    flagged: false,
    prompts: [
      ["Second on the Moon", `Who was the second person to walk on the Moon? ${SHORT}`],
    ],
  },
];
