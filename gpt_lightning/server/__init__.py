"""The Engine behind HTTP: OpenAI's interface and a page, for one model or two."""
