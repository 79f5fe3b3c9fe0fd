"""Fine-grained alignment of language models: token labels from minimal edits, token rewards, FIGA, fine-grained PPO."""

__version__ = "0.1.0"
