"""The one place where tensor names are parsed: patterns, blocks, roles and kinds of matrices.

A *pattern* is what users write in manifests: a glob, or "re:" and a regular expression that has to
match the whole name. The *block* of a tensor is the first number among the components of its name.
Its *role* (the papers' layer group) is the name with that number replaced by "*". Its *kind* is the
part it plays in a transformer block, for example "q" or "down".
"""

import fnmatch
import re
import warnings
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Final, Literal

from esm_stream.errors import ManifestError

Kind = Literal["q", "k", "v", "qkv", "o", "gate", "up", "gate_up", "down"]

# First match wins. Names end in what is listed, before ".weight"; they cover the conventions of
# transformers' checkpoints (Llama, GPT, BERT, ViT, CLIP, T5, Falcon, BLOOM, DistilBERT, ...).
KINDS: Final[tuple[tuple[Kind, str], ...]] = (
    ("qkv", r"(in_proj|qkv_proj|qkv|query_key_value|Wqkv|attn\.c_attn|in_proj_weight)"),
    ("q", r"(q_proj|query|q_lin|query_proj|wq|[Aa]ttention\.q|q)"),
    ("k", r"(k_proj|key|k_lin|key_proj|wk|[Aa]ttention\.k|k)"),
    ("v", r"(v_proj|value|v_lin|value_proj|wv|[Aa]ttention\.v|v)"),
    ("gate_up", r"(gate_up_proj|Wi)"),
    ("gate", r"(gate_proj|w1|wi_0)"),
    (
        "up",
        r"(up_proj|w3|wi_1|c_fc|fc1|fc_in|lin1|wi|dense_h_to_4h|intermediate\.dense|ffn\.up_proj)",
    ),
    ("down", r"(down_proj|w2|mlp\.c_proj|fc2|fc_out|lin2|wo|dense_4h_to_h|mlp\.Wo)"),
    (
        "o",
        r"(o_proj|out_proj|out_lin|attn\.c_proj|attention\.output\.dense|attention\.dense"
        r"|self_attention\.dense|attn\.Wo|[Aa]ttention\.o|attention\.wo|o)",
    ),
    ("down", r"(output\.dense)"),
)
_KIND_PATTERNS: Final = tuple(
    (kind, re.compile(rf"(^|.*\.){ending}(\.weight)?$")) for kind, ending in KINDS
)
_BLOCK: Final = re.compile(r"(?<=\.)(\d+)(?=\.)")


def matcher(patterns: Iterable[str]) -> Callable[[str], bool]:
    """A test whether a tensor name matches any of the patterns (globs, or "re:" full matches).

    Raises:
        ManifestError: A regular expression does not compile.
    """
    compiled = [compile_pattern(pattern) for pattern in patterns]
    return lambda name: any(pattern.fullmatch(name) for pattern in compiled)


@lru_cache(maxsize=1024)
def compile_pattern(pattern: str) -> re.Pattern[str]:
    """The regular expression of one pattern.

    Raises:
        ManifestError: The regular expression does not compile.
    """
    if not pattern.startswith("re:"):
        return re.compile(fnmatch.translate(pattern))
    try:
        with warnings.catch_warnings():
            # What a later Python may read otherwise ("[[") is read as this one does.
            warnings.simplefilter("ignore", FutureWarning)
            return re.compile(pattern.removeprefix("re:"))
    except re.error as error:
        raise ManifestError(f"pattern '{pattern}' is not a regular expression: {error}") from error


def block_of(name: str) -> int | None:
    """Number of the block a tensor belongs to: the first number inside its name."""
    match = _BLOCK.search("." + name)
    return int(match[1]) if match else None


def in_block(name: str, number: int) -> str:
    """The name of the same tensor of another block."""
    return _BLOCK.sub(str(number), "." + name, count=1)[1:]


def stack_of(name: str) -> str:
    """What precedes the block's number, which names its list of blocks; the whole name if none."""
    match = _BLOCK.search("." + name)
    return name[: match.start() - 1] if match else name


def role_of(name: str) -> str:
    """The name with its block number replaced by "*"."""
    return _BLOCK.sub("*", "." + name, count=1)[1:]


def kind_of(name: str) -> Kind | None:
    """The part a weight plays in its block by the ending of its name, or None if it is unknown."""
    return next((kind for kind, pattern in _KIND_PATTERNS if pattern.match(name)), None)


def fused_name(names: Iterable[str]) -> str:
    """One name for matrices merged as one: "a.q.weight", "a.k.weight" -> "a.{q,k}.weight"."""
    parts = [name.split(".") for name in names]
    place = next(i for i in range(len(parts[0])) if len({tuple(p[i : i + 1]) for p in parts}) > 1)
    joined = ",".join(p[place] for p in parts)
    return ".".join([*parts[0][:place], "{" + joined + "}", *parts[0][place + 1 :]])
