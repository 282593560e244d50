"""Stage 7: index, config, tokenizer, card and report beside the shards; complete.json last."""

import json
from hashlib import sha256
from pathlib import Path
from typing import Any

from esm_stream.checkpoints.checkpoint import INDEX_NAME
from esm_stream.checkpoints.companions import model_files
from esm_stream.checkpoints.restacked import restacked_config
from esm_stream.planning.plan import Plan
from esm_stream.report.card import model_card
from esm_stream.report.numbers import build_report
from esm_stream.stages.context import Context, TaskResult, checkpoint_at
from esm_stream.stages.write import HASHES, layouts_of
from esm_stream.store.files import sealed, write_atomically
from esm_stream.write.shards import write_index

COMPLETE = "complete.json"


def run(context: Context) -> TaskResult:
    """Write everything beside the shards."""
    plan, output = context.plan, context.plan.output
    layouts = layouts_of(plan)
    write_index(output, list(layouts.values()))
    written = [output / INDEX_NAME] if len(layouts) > 1 else []
    written += [_copy(path, plan) for path in model_files(plan.base)]
    experts = {name: checkpoint_at(plan, root) for name, root in plan.experts.items()}
    report = build_report(plan, checkpoint_at(plan, plan.base), experts)
    written.append(_write(output / "report.json", json.dumps(report, indent=1)))
    written.append(_write(output / "README.md", model_card(plan, report)))
    outputs = [context.directory.record(path) for path in written]
    complete = {
        "esm_stream": plan.version,
        "shards": {
            name: {
                "size": layout.file_size,
                "header_sha256": sha256(layout.header).hexdigest(),
                HASHES: context.directory.results(f"seal/{name}")[HASHES],
            }
            for name, layout in layouts.items()
        },
        "files": {o.path: {"size": o.size, HASHES: o.xxh3_128} for o in outputs},
    }
    write_atomically(output / COMPLETE, sealed(json.dumps(complete, indent=1).encode()))
    return TaskResult([*outputs, context.directory.record(output / COMPLETE)])


def _copy(source: Path, plan: Plan) -> Path:
    """Copy one small file of the base; the configuration learns the output's dtype and layers."""
    content = source.read_bytes()
    if source.name == "config.json" and plan.block_order is not None:
        config = restacked_config(json.loads(content), plan.block_order)
        content = (json.dumps(config, indent=2) + "\n").encode()
    if source.name == "config.json" and plan.output_dtype != "base":
        content = _with_dtype(json.loads(content), plan.output_dtype)
    target = plan.output / source.name
    write_atomically(target, content)
    return target


def _with_dtype(config: dict[str, Any], dtype: str) -> bytes:
    key = "torch_dtype" if "torch_dtype" in config and "dtype" not in config else "dtype"
    return (json.dumps({**config, key: dtype}, indent=2) + "\n").encode()


def _write(path: Path, text: str) -> Path:
    write_atomically(path, text.encode())
    return path
