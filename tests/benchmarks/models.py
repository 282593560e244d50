"""Models for benchmarks: random Llamas of any size, and header-only (sparse) ones.

python tests/benchmarks/models.py llama DIR --experts 4      # 0.3 B parameters, bf16, sharded
python tests/benchmarks/models.py sparse-70b DIR --experts 8  # headers only, no data on disk
"""

import argparse
import json
import os
from pathlib import Path

import torch
from safetensors.torch import save_file

SEED = 0
MANIFEST = """[base]
model = "base"
{experts}
[calibration]
samples = {samples}
[merge]
method = "esm"
[output]
path = "merged"
[run]
memory = "{memory}"
"""


def llama_config(hidden: int, mlp: int, layers: int, heads: int, kv: int, vocab: int) -> dict:
    """config.json of a Llama."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "head_dim": hidden // heads,
        "vocab_size": vocab,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }


def llama_shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a Llama's tensors, in the order of its layers."""
    h, mlp, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    kv = config["num_key_value_heads"] * config["head_dim"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, h)}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        shapes |= {
            f"{prefix}.input_layernorm.weight": (h,),
            f"{prefix}.self_attn.q_proj.weight": (h, h),
            f"{prefix}.self_attn.k_proj.weight": (kv, h),
            f"{prefix}.self_attn.v_proj.weight": (kv, h),
            f"{prefix}.self_attn.o_proj.weight": (h, h),
            f"{prefix}.post_attention_layernorm.weight": (h,),
            f"{prefix}.mlp.gate_proj.weight": (mlp, h),
            f"{prefix}.mlp.up_proj.weight": (mlp, h),
            f"{prefix}.mlp.down_proj.weight": (h, mlp),
        }
    return shapes | {"model.norm.weight": (h,), "lm_head.weight": (vocab, h)}


def shards_of(shapes: dict[str, tuple[int, ...]], limit: int) -> list[list[str]]:
    """Tensor names by shard, at most `limit` bytes of bf16 each."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, shape in shapes.items():
        size = 2 * int(torch.tensor(shape).prod())
        if shards[-1] and filled + size > limit:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def write_index(root: Path, shards: list[list[str]], total: int) -> list[str]:
    """Write config-independent parts of a sharded checkpoint; returns the shards' file names."""
    files = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    weight_map = {n: f for names, f in zip(shards, files, strict=True) for n in names}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (root / "model.safetensors.index.json").write_text(json.dumps(index))
    return files


def write_random(root: Path, config: dict, seed: int, base: Path | None, limit: int) -> None:
    """A random base, or an expert: the base plus a spread-out low-rank-heavy update of 3 %."""
    root.mkdir(parents=True, exist_ok=True)
    (root / "config.json").write_text(json.dumps(config))
    shapes = llama_shapes(config)
    shards = shards_of(shapes, limit)
    files = write_index(root, shards, 0)
    generator = torch.Generator().manual_seed(seed)
    for names, file in zip(shards, files, strict=True):
        tensors = {}
        for name in names:
            tensors[name] = _random(shapes[name], generator, base, file, name)
        save_file(tensors, root / file, {"format": "pt"})


def _random(
    shape: tuple[int, ...], generator: torch.Generator, base: Path | None, file: str, name: str
) -> torch.Tensor:
    if base is None:
        if len(shape) == 1:
            return torch.ones(shape, dtype=torch.bfloat16)
        return (torch.randn(shape, generator=generator) * 0.02).bfloat16()
    from safetensors import safe_open

    with safe_open(base / file, "pt") as stored:
        weight = stored.get_tensor(name).float()
    if len(shape) == 1:
        return (weight + 0.01 * torch.randn(shape, generator=generator)).bfloat16()
    rank = 64
    left = torch.randn(shape[0], rank, generator=generator) / rank**0.5
    right = torch.randn(rank, shape[1], generator=generator)
    noise = torch.randn(shape, generator=generator)
    return (weight + 0.02 * 0.03 * (0.8 * left @ right + 0.6 * noise)).bfloat16()


def write_sparse(root: Path, config: dict, limit: int) -> None:
    """A checkpoint whose files have a header and a length, but no data on disk."""
    root.mkdir(parents=True, exist_ok=True)
    (root / "config.json").write_text(json.dumps(config))
    shapes = llama_shapes(config)
    shards = shards_of(shapes, limit)
    files = write_index(root, shards, 0)
    for names, file in zip(shards, files, strict=True):
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name in names:
            size = 2 * int(torch.tensor(shapes[name]).prod())
            shape = list(shapes[name])
            header[name] = {
                "dtype": "BF16",
                "shape": shape,
                "data_offsets": [offset, offset + size],
            }
            offset += size
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with (root / file).open("wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            os.truncate(out.fileno(), 8 + len(text) + offset)


def write_manifest(root: Path, experts: int, memory: str, samples: int, tokens: int) -> Path:
    """A manifest beside the models, with ready-made token ids as calibration inputs."""
    lines = []
    for i in range(experts):
        lines += [
            "[[experts]]",
            f'name = "e{i}"',
            f'model = "e{i}"',
            f'calibration = "e{i}.safetensors"',
        ]
        ids = torch.randint(3, 1000, (samples, tokens), generator=torch.Generator().manual_seed(i))
        save_file({"input_ids": ids}, root / f"e{i}.safetensors")
    path = root / "manifest.toml"
    text = MANIFEST.format(experts="\n".join(lines), memory=memory, samples=samples)
    path.write_text(text)
    return path


def make_llama(
    root: Path,
    experts: int = 4,
    memory: str = "2GiB",
    *,
    layers: int = 16,
    hidden: int = 1024,
    vocab: int = 32000,
) -> Path:
    """A random Llama in bf16 with its experts: 0.30 B parameters by default."""
    config = llama_config(hidden, hidden * 11 // 4, layers, 16, 8, vocab)
    write_random(root / "base", config, SEED, None, 128 << 20)
    for i in range(experts):
        write_random(root / f"e{i}", config, SEED + 1 + i, root / "base", 128 << 20)
    return write_manifest(root, experts, memory, samples=32, tokens=128)


def make_sparse_70b(root: Path, experts: int = 8) -> Path:
    """Llama-3-70B's shapes, header-only."""
    config = llama_config(8192, 28672, 80, 64, 8, 128256)
    for name in ("base", *(f"e{i}" for i in range(experts))):
        write_sparse(root / name, config, 5 << 30)
    return write_manifest(root, experts, "128GiB", samples=32, tokens=512)


def main() -> None:
    """Make one of the models."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["llama", "sparse-70b"])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--experts", type=int, default=4)
    args = parser.parse_args()
    args.directory.mkdir(parents=True, exist_ok=True)
    make = make_llama if args.what == "llama" else make_sparse_70b
    print(make(args.directory, args.experts))


if __name__ == "__main__":
    main()
