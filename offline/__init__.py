"""The training: one file per verb, from questions to a probe that `server` loads."""
