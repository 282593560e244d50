"""A small language benchmark, made from text on this machine: one Llama and an expert per kind.

    python tests/benchmarks/tongues.py make DIR [--seed 0] [--experts 8]     # a few CPU minutes
    esm-stream merge DIR/manifest.toml
    python tests/benchmarks/tongues.py score DIR DIR/merged [--experts 8]   # share of the gain

`make` finds files under /usr and this Python's packages (source code, web pages, licences,
changelogs, ...), trains a byte-pair tokenizer and a base model on common kinds of them, then one
expert for each of other kinds, all on one thread, and writes

    DIR/base, DIR/experts/KIND     directories that `from_pretrained` reads, with the tokenizer
    DIR/data/KIND.jsonl            texts the expert was trained on: calibration of `esm-stream`
    DIR/data/KIND.safetensors      `held_out`: token ids of files nobody was trained on
    DIR/losses.json                held-out loss per kind, of the base and of the kind's expert
    DIR/manifest.toml              a merge of the experts with OWL

The same seed on the same machine makes the same models; another machine has other text, so shares
are compared within one DIR only. The share of a merged model is, over the kinds, the sum of
(base loss - merged loss) divided by the sum of (base loss - expert loss).
"""

import argparse
import gzip
import json
import random
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

ROOTS = (Path("/usr"), Path(sysconfig.get_path("purelib")))
# The base sees the common kinds alone. Were it trained to the end on the experts' kinds, their
# updates would sum to nothing: at the minimum of a mixture the gradients of its parts cancel.
BASE_KINDS = {
    "prose": ("*.rst", "*.md"),
    "python": ("*.py",),
    "html": ("*.html",),
    "header": ("*.h",),
    "licence": ("copyright", "LICENSE*"),
    "javascript": ("*.js",),
}
EXPERT_KINDS = {
    "changelog": ("changelog.Debian.gz", "changelog.gz"),
    "yaml": ("*.yaml",),
    "perl": ("*.pm", "*.pl"),
    "json": ("*.json",),
    "cmake": ("*.cmake",),
    "svg": ("*.svg",),
    "stub": ("*.pyi",),
    "xml": ("*.xml",),
    "css": ("*.css",),
    "vim": ("*.vim",),
}
KINDS = BASE_KINDS | EXPERT_KINDS
FILE_BYTES, KIND_BYTES, HELD_OUT_BYTES = 12_000, 600_000, 60_000
VOCABULARY, WINDOW, BATCH = 1024, 64, 32
BASE_STEPS, EXPERT_STEPS = 800, 80
BASE_RATE, EXPERT_RATE = 4e-3, 5e-4
CALIBRATION_TEXTS, HELD_OUT_WINDOWS = 64, 128


def texts_of(kind: str, rng: random.Random) -> Iterator[str]:
    """Distinct texts of a kind, in random order, each the start of one file."""
    paths = sorted({p for root in ROOTS for pattern in KINDS[kind] for p in root.rglob(pattern)})
    rng.shuffle(paths)
    seen: set[bytes] = set()
    for path in paths:
        if not path.is_file():
            continue
        if path.suffix == ".gz":
            with gzip.open(path) as file:
                start = file.read(FILE_BYTES)
        else:
            with path.open("rb") as file:
                start = file.read(FILE_BYTES)
        if len(start) > 200 and start[:200] not in seen:
            seen.add(start[:200])
            yield start.decode("utf-8", errors="ignore")


def collect(kind: str, seed: int) -> tuple[list[str], list[str]]:
    """Texts to train on, and texts of other files that are held out."""
    held_out: list[str] = []
    training: list[str] = []
    for text in texts_of(kind, random.Random(f"{seed}/{kind}")):
        part = held_out if sum(map(len, held_out)) < HELD_OUT_BYTES else training
        part.append(text)
        if sum(map(len, training)) >= KIND_BYTES:
            break
    if not training:
        sys.exit(f"no text of kind '{kind}' ({', '.join(KINDS[kind])}) under {ROOTS}")
    return training, held_out


def make_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """Byte-level pairs, with one special token between texts."""
    pairs = ByteLevelBPETokenizer()
    pairs.train_from_iterator(texts, VOCABULARY, special_tokens=["<end>"], show_progress=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=pairs._tokenizer,
        eos_token="<end>",
        pad_token="<end>",
        model_max_length=2 * WINDOW,
    )


def token_stream(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> Tensor:
    """All texts in one row, an end token after each."""
    ids = [t for text in texts for t in (*tokenizer.backend_tokenizer.encode(text).ids, 0)]
    return torch.tensor(ids)


def windows(stream_T: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """`count` windows at random places of a stream."""
    starts = torch.randint(len(stream_T) - WINDOW, (count, 1), generator=generator)
    return stream_T[starts + torch.arange(WINDOW)]


def train(
    model: LlamaForCausalLM, streams: Sequence[Tensor], steps: int, rate: float, seed: int
) -> None:
    """AdamW on windows drawn evenly from the streams; the rate rises, then falls to zero."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.1)
    warm = max(1, steps // 20)
    for step in range(steps):
        factor = min((step + 1) / warm, (steps - step) / (steps - warm))
        optimizer.param_groups[0]["lr"] = rate * factor
        picks = torch.randint(len(streams), (BATCH,), generator=generator)
        counts = picks.bincount(minlength=len(streams)).tolist()
        ids = torch.cat([windows(s, n, generator) for s, n in zip(streams, counts, strict=True)])
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


@torch.inference_mode()
def loss_of(model: LlamaForCausalLM, ids: Tensor) -> float:
    """Mean next-token loss over windows, in nats."""
    return float(model(input_ids=ids, labels=ids).loss)


def make(folder: Path, kinds: Sequence[str], seed: int) -> None:
    """Write base, experts, calibration texts, held-out windows and their losses."""
    texts = {kind: collect(kind, seed) for kind in (*BASE_KINDS, *kinds)}
    tokenizer = make_tokenizer([t for training, _ in texts.values() for t in training])
    streams = {kind: token_stream(tokenizer, training) for kind, (training, _) in texts.items()}
    torch.manual_seed(seed)
    base = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=352,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=2 * WINDOW,
            bos_token_id=None,
            eos_token_id=0,
        )
    )
    train(base, [streams[kind] for kind in BASE_KINDS], BASE_STEPS, BASE_RATE, seed)
    base.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    (folder / "data").mkdir()
    losses = {}
    for index, kind in enumerate(kinds):
        _, held_out = texts[kind]
        generator = torch.Generator().manual_seed(seed)
        held_ids = windows(token_stream(tokenizer, held_out), HELD_OUT_WINDOWS, generator)
        save_file({"held_out": held_ids}, folder / "data" / f"{kind}.safetensors")
        calibration = windows(streams[kind], CALIBRATION_TEXTS, generator)
        lines = [json.dumps({"text": tokenizer.decode(row)}) for row in calibration]
        (folder / "data" / f"{kind}.jsonl").write_text("\n".join(lines) + "\n")
        expert = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
        train(expert, [streams[kind]], EXPERT_STEPS, EXPERT_RATE, seed + 1 + index)
        expert.save_pretrained(folder / "experts" / kind)
        tokenizer.save_pretrained(folder / "experts" / kind)
        losses[kind] = {"base": loss_of(base, held_ids), "expert": loss_of(expert, held_ids)}
        print(kind, losses[kind], flush=True)
    (folder / "losses.json").write_text(json.dumps(losses, indent=1) + "\n")
    (folder / "manifest.toml").write_text(manifest(kinds))


def manifest(kinds: Sequence[str]) -> str:
    """A merge of all experts with the defaults of OWL."""
    expert = '[[experts]]\nname = "{0}"\nmodel = "experts/{0}"\ncalibration = "data/{0}.jsonl"\n'
    experts = "".join(expert.format(kind) for kind in kinds)
    return (
        f'[base]\nmodel = "base"\n{experts}[calibration]\nmax_length = {WINDOW}\n'
        '[merge]\nmethod = "owl"\n[output]\npath = "merged"\n'
    )


def score(folder: Path, model_dir: Path, experts: int) -> None:
    """Print the loss of a model per kind, and the share of the experts' gain it keeps."""
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    losses = json.loads((folder / "losses.json").read_text())
    kept = possible = 0.0
    for kind, known in list(losses.items())[:experts]:
        loss = loss_of(model, load_file(folder / "data" / f"{kind}.safetensors")["held_out"])
        kept += known["base"] - loss
        possible += known["base"] - known["expert"]
        print(f"{kind:12} base {known['base']:.3f} expert {known['expert']:.3f} merged {loss:.3f}")
    print(f"share of the experts' gain kept: {100 * kept / possible:.1f} %")


def main() -> None:
    """Make the benchmark, or score a model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["make", "score"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--experts", type=int, default=8)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.what == "make":
        args.folder.mkdir(parents=True)
        make(args.folder, list(EXPERT_KINDS)[: args.experts], args.seed)
    elif args.model is None:
        parser.error("score needs a model directory")
    else:
        score(args.folder, args.model, args.experts)


if __name__ == "__main__":
    main()
