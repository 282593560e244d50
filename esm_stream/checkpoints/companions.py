"""Files beside the weights that make tensors a model: configuration, tokenizer, processor."""

from pathlib import Path

WEIGHT_ENDINGS = (
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".gguf",
    ".onnx",
    ".h5",
    ".msgpack",
    ".index.json",
    ".partial",
    ".tmp",
)
OUR_FILES = ("README.md", "report.json", "complete.json")


def model_files(root: Path) -> list[Path]:
    """Files of a model that its merged model has too: config, tokenizer, processor."""
    return [
        path
        for path in sorted(root.iterdir())
        if path.is_file()
        and not path.name.endswith(WEIGHT_ENDINGS)
        and not path.name.startswith(".")
        and path.name not in OUR_FILES
    ]
