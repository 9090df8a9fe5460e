"""The vLLM engine: a server, the steering inside its workers, and its sampling."""
