"""The production engine: vLLM, with the meter inside its compiled graph."""
