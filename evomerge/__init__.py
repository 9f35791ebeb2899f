"""Search for the best merge of language models, inside a live vLLM engine."""

__version__ = "0.1.0"
