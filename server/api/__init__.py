"""The wire: OpenAI-shaped requests in, responses and server-sent events out."""
