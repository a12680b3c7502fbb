"""HTTP: a chat page and OpenAI's dialect over the engine's process. Imports no torch."""
