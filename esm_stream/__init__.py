"""esm-stream: streaming, out-of-core merging of fine-tuned experts of one base model."""

__version__ = "0.1.0"
