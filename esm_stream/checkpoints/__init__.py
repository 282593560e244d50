"""Reading models: headers, checkpoints and tensors of safetensors files, never a whole model."""
