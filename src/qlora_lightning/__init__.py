"""QLoRA finetuning of large language models on PyTorch Lightning."""

__version__ = "0.1.0"
