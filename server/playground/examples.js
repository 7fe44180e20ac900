// Prompts on which the demo model (SmolLM2-135M-Instruct, greedy) was seen to be right or to make
// things up. Another model may know better; the page says whose examples they are.

const SHORT = "Respond with the answer only, without any explanation.";

export const EXAMPLES = [
  {
    title: "The demo model gets these right",
    prompts: [
      ["Capital of France", `What is the capital of France? ${SHORT}`],
      ["Symbol for gold", `What is the chemical symbol for gold? ${SHORT}`],
      ["Penicillin", `Who discovered penicillin? ${SHORT}`],
      [
        "Capital of Italy",
        "Complete the sentence: The capital of Italy is ... Respond with the missing words only.",
      ],
    ],
  },
  {
    title: "Here it makes things up",
    prompts: [
      ["Capital of Kazakhstan", `What is the capital of Kazakhstan? ${SHORT}`],
      ["The film Stalker", `Who directed the film Stalker (1979)? ${SHORT}`],
      ["Peace of Westphalia", "When was the Peace of Westphalia signed, and where?"],
      ["An invented physicist", "Who was the Danish physicist Orvald Kjeldsen-Brandt?"],
    ],
  },
];
