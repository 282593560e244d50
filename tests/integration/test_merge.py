"""Whole merges: against a reference in memory, in every way to run, and what lies on disk after."""

import fnmatch
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from conftest import MakeZoo, PlanOf, Run, merge_here
from models import BLOCKS, Zoo, change_tensors, load, tensors_of
from reference import Variant, esm, layer_scales, tsv
from safetensors import safe_open
from test_forward import watch
from torch import Tensor

from esm_stream.calibration.skeleton import build_skeleton
from esm_stream.engine import calibrate
from esm_stream.errors import InputError, ManifestError
from esm_stream.events import Event
from esm_stream.planning.plan import load_plan

Expected = dict[str, Tensor]


class Experts:
    """Updates of all experts, and what each matrix sees in each expert's own forward, float64."""

    def __init__(self, zoo: Zoo) -> None:
        self.base = {k: v.double() for k, v in tensors_of(zoo.base).items()}
        tuned = [tensors_of(path) for path in zoo.experts.values()]
        self.updates = {
            name: [one[name].double() - value for one in tuned] for name, value in self.base.items()
        }
        shapes = {name: tuple(value.shape) for name, value in self.base.items()}
        stored = build_skeleton(zoo.base, shapes, torch.float32).stored
        watched = [watch(zoo, expert) for expert in zoo.experts]
        self.inputs = {
            stored[f"{module}.weight"]: [torch.cat(w.inputs[module]).double() for w in watched]
            for module in watched[0].inputs
            if f"{module}.weight" in stored
        }

    def expect(
        self,
        esm_roles: list[str | list[str]],
        variant: Variant,
        *,
        alpha: float,
        layers: bool = False,
        others: str = "average",
        alpha_on_all: bool = False,
        copied: tuple[str, ...] = (),
        transposed: bool = False,
    ) -> Expected:
        """The merged model, in which every tensor is treated by name (block number as "{}")."""
        rest = alpha if alpha_on_all else 1.0
        merged: Expected = {}
        for role in esm_roles:
            patterns = [role] if isinstance(role, str) else role
            names = [[p.format(block) for p in patterns] for block in range(BLOCKS)]
            updates = [self._fused(group, variant, transposed=transposed) for group in names]
            scales = layer_scales(updates) if layers else [1.0] * BLOCKS
            for group, update, scale in zip(names, updates, scales, strict=True):
                heights = [self._rows(name, transposed=transposed) for name in group]
                for name, part in zip(group, update.split(heights), strict=True):
                    part = part.T if transposed else part  # noqa: PLW2901
                    merged[name] = self.base[name] + alpha * scale * part
        for name, base in self.base.items():
            if any(fnmatch.fnmatch(name, pattern) for pattern in copied):
                merged[name] = base
            elif name not in merged and base.ndim == 2 and others != "average":
                merged[name] = base + rest * self._other(name, others, layers=layers)
            elif name not in merged:
                merged[name] = base + rest * sum(self.updates[name]) / len(self.updates[name])
        return merged

    def _rows(self, name: str, *, transposed: bool) -> int:
        return self.base[name].shape[1 if transposed else 0]

    def _fused(self, names: list[str], variant: Variant, *, transposed: bool) -> Tensor:
        each = [self.updates[name] for name in names]
        turned = [[d.T if transposed else d for d in one] for one in each]
        return esm(
            [torch.cat(parts) for parts in zip(*turned, strict=True)],
            self.inputs[names[0]],
            variant,
        )

    def _other(self, name: str, others: str, *, layers: bool) -> Tensor:
        """TSV-M of a matrix that is no target; it is scaled within its role too."""
        alike = [name.replace(".0.", f".{b}.").replace(".1.", f".{b}.") for b in range(BLOCKS)]
        alike = list(dict.fromkeys(alike))
        found = {n: tsv(self.updates[n], by_mean_singular_values=others == "tsv*") for n in alike}
        scales = layer_scales(list(found.values())) if layers else [1.0] * len(alike)
        return dict(zip(alike, scales, strict=True))[name] * found[name]


def assert_merged(output: Path, expected: Expected, base: Expected) -> None:
    """Merged updates equal the reference's, relative to their own norm.

    First matrices of an MLP have more outputs than inputs: all their input directions are kept,
    also those that a layer norm nearly removes, which hang on the rounding of float32 moments.
    """
    found = tensors_of(output)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        update = value - base[name]
        # What float32 storage of the merged tensor itself rounds away.
        rounding = 2**-23 * float(value.norm())
        error = float((found[name].double() - value).norm())
        tolerance = 1e-3 if "intermediate" in name or "c_fc" in name else 3e-5
        assert error <= tolerance * float(update.norm()) + rounding, (
            name,
            error / float(update.norm()),
        )


BERT = "encoder.layer.{}."
VIT = "encoder.layer.{}."
LLAMA = "model.layers.{}."
GPT2 = "transformer.h.{}."
ATTENTION = [f"attention.attention.{part}.weight" for part in ("query", "key", "value")]
SELF = [f"attention.self.{part}.weight" for part in ("query", "key", "value")]
LLAMA_LINEARS = [
    *(f"{LLAMA}self_attn.{part}_proj.weight" for part in "qkvo"),
    *(f"{LLAMA}mlp.{part}_proj.weight" for part in ("gate", "up", "down")),
]
CASES: dict[str, tuple[str, int, dict[str, Any], dict[str, Any]]] = {
    # Vision: q, k, v and the first matrix of the MLP; all three levels; the rest averaged, times 1.
    "journal on a ViT": (
        "vit",
        3,
        {"alpha": 0.7, "options": {"profile": "journal"}},
        {
            "esm_roles": [*(VIT + a for a in ATTENTION), VIT + "intermediate.dense.weight"],
            "variant": Variant(task=True, dimension=True),
            "layers": True,
        },
    ),
    "vit-official on a ViT": (
        "vit",
        2,
        {"alpha": 0.9, "options": {"profile": "vit-official"}},
        {
            "esm_roles": [
                [VIT + a for a in ATTENTION],
                VIT + "intermediate.dense.weight",
                VIT + "output.dense.weight",
            ],
            "variant": Variant(factor=2.0, task=True, dimension=True),
            "layers": True,
            "others": "tsv",
        },
    ),
    "roberta-official on a BERT classifier": (
        "bert-classifier",
        2,
        {"alpha": 2.8, "options": {"profile": "roberta-official"}},
        {
            "esm_roles": [
                *("bert." + BERT + a for a in SELF),
                "bert." + BERT + "attention.output.dense.weight",
                "bert." + BERT + "intermediate.dense.weight",
                "bert." + BERT + "output.dense.weight",
            ],
            "variant": Variant(),
            "layers": True,
            "others": "tsv*",
            "alpha_on_all": True,
            "copied": ("*bias*", "*classifier*"),
        },
    ),
    # Language: every linear of the blocks, no scaling.
    "journal on a Llama": (
        "llama",
        3,
        {"alpha": 2.0, "options": {"profile": "journal"}},
        {"esm_roles": [*LLAMA_LINEARS], "variant": Variant()},
    ),
    "every level on a Llama, alpha on everything": (
        "llama",
        2,
        {
            "alpha": 0.8,
            "options": {"levels": ["task", "dimension", "layer"], "alpha_on": "all", "factor": 1.5},
        },
        {
            "esm_roles": [*LLAMA_LINEARS],
            "variant": Variant(factor=1.5, task=True, dimension=True),
            "layers": True,
            "alpha_on_all": True,
        },
    ),
    "q, k, v of a grouped-query Llama as one": (
        "llama",
        2,
        {"alpha": 1.5, "options": {"fuse_qkv": True, "eigenvalue_exponent": 0.3}},
        {
            "esm_roles": [
                [f"{LLAMA}self_attn.{part}_proj.weight" for part in "qkv"],
                *LLAMA_LINEARS[3:],
            ],
            "variant": Variant(power=0.3),
        },
    ),
    # Conv1D stores (inputs, outputs); q, k, v are one stored matrix.
    "journal on a GPT-2": (
        "gpt2",
        2,
        {"alpha": 1.2, "options": {"profile": "journal"}},
        {
            "esm_roles": [
                GPT2 + f"{part}.weight"
                for part in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
            ],
            "variant": Variant(),
            "transposed": True,
        },
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_merge_equals_the_definition_in_memory(case: str, zoo: MakeZoo, run: Run) -> None:
    name, experts, merge, spec = CASES[case]
    found = zoo(name, experts=experts)
    output = run(found, merge=merge)
    known = Experts(found)
    expected = known.expect(alpha=merge["alpha"], **spec)
    assert_merged(output, expected, known.base)


def test_default_alpha_is_the_methods_own_choice(zoo: MakeZoo, plan_of: PlanOf) -> None:
    language = plan_of(zoo("llama"), "a")
    assert {m.alpha for m in language.matrices.values()} == {2.0}
    vision = plan_of(zoo("vit"), "b", merge={"options": {"profile": "vit-official"}})
    esm_alphas = {m.alpha for m in vision.matrices.values() if m.method.name == "esm"}
    assert esm_alphas == {0.75}
    assert {m.alpha for m in vision.matrices.values() if m.method.name == "tsv_m"} == {1.0}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_average_is_the_float32_mean_rounded_once(
    dtype: torch.dtype, zoo: MakeZoo, run: Run
) -> None:
    found = zoo("llama", dtype=dtype, noise=0.1, experts=3)
    merged = tensors_of(run(found, merge={"method": "average", "alpha": 0.7}))
    experts = [tensors_of(path) for path in found.experts.values()]
    for name, base in tensors_of(found.base).items():
        total = sum(expert[name].float() - base.float() for expert in experts)
        expected = base.float() + (total / 3) * torch.tensor(0.7)
        assert merged[name].dtype == dtype
        assert torch.equal(merged[name], expected.to(dtype)), name


@pytest.mark.parametrize("name", ["vit-classifier", "bert-classifier", "llama", "gpt2"])
def test_merged_directory_loads_as_the_base_does(name: str, zoo: MakeZoo, run: Run) -> None:
    import transformers

    found = zoo(name, shard="12KB")
    output = run(found)
    assert {p.name for p in output.glob("*.safetensors*")} == {
        p.name for p in found.base.glob("*.safetensors*")
    }
    infos = [
        transformers.AutoModel.from_pretrained(path, output_loading_info=True)[1]
        for path in (found.base, output)
    ]
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert set(infos[0][kind]) == set(infos[1][kind])
    loaded = load(found.family, output, torch.float32)
    plain = {k: v for k, v in loaded.state_dict().items() if k in tensors_of(output)}
    for tensor, value in plain.items():
        assert torch.equal(value, tensors_of(output)[tensor])


@pytest.mark.parametrize("shard", ["1GB", "12KB"])
def test_output_shards_have_the_layout_of_the_base(shard: str, zoo: MakeZoo, run: Run) -> None:
    found = zoo("llama", shard=shard)
    output = run(found)
    for file in found.base.glob("*.safetensors"):
        ours, theirs = (output / file.name).read_bytes(), file.read_bytes()
        length = 8 + int.from_bytes(theirs[:8], "little")
        assert ours[:length] == theirs[:length]
        assert len(ours) == len(theirs)
        assert ours != theirs
    index = "model.safetensors.index.json"
    assert (output / index).exists() == (found.base / index).exists()
    if (output / index).exists():
        maps = [
            json.loads((path / index).read_bytes())["weight_map"] for path in (output, found.base)
        ]
        assert maps[0] == maps[1]
    assert (output / "config.json").read_bytes() == (found.base / "config.json").read_bytes()


@pytest.mark.parametrize("options", [{}, {"profile": "vit-official"}], ids=["journal", "official"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_experts_equal_to_the_base_give_the_bytes_of_the_base(
    dtype: torch.dtype, options: dict[str, Any], zoo: MakeZoo, run: Run, tmp_path: Path
) -> None:
    found = zoo("gpt2", dtype=dtype, noise=0.0, shard="12KB").copy(tmp_path / "zoo")

    def with_negative_zeros(value: Tensor) -> Tensor:
        value.view(-1)[::3] = -0.0
        return value

    for path in (found.base, *found.experts.values()):
        change_tensors(path, dict.fromkeys(tensors_of(path), with_negative_zeros))
    output = run(found, merge={"options": options})
    files = sorted(p.name for p in found.base.glob("*.safetensors"))
    assert len(files) > 1
    for file in files:
        assert (output / file).read_bytes() == (found.base / file).read_bytes()


def test_a_tensor_that_no_expert_changed_keeps_its_bytes(
    zoo: MakeZoo, run: Run, tmp_path: Path
) -> None:
    found = zoo("llama").copy(tmp_path / "zoo")
    frozen = "model.layers.1.mlp.up_proj.weight"
    base = tensors_of(found.base)
    for path in found.experts.values():
        change_tensors(path, {frozen: lambda _: base[frozen]})
    merged = tensors_of(run(found))
    assert torch.equal(merged[frozen], base[frozen])
    other = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(merged[other], base[other])


def test_a_frozen_layer_counts_in_the_mean_of_its_role(
    zoo: MakeZoo, run: Run, tmp_path: Path
) -> None:
    found = zoo("llama").copy(tmp_path / "zoo")
    base = tensors_of(found.base)
    frozen, other = (f"model.layers.{b}.mlp.up_proj.weight" for b in (1, 0))
    for path in found.experts.values():
        change_tensors(path, {frozen: lambda _: base[frozen]})
    output = run(found, merge={"options": {"levels": ["layer"]}})
    report = json.loads((output / "report.json").read_bytes())
    # Norms (n, 0) have mean n / 2: scales (2 ** 2, 0).
    assert report["matrices"][other]["layer_scale"] == pytest.approx(4.0)
    assert report["matrices"][frozen]["layer_scale"] == 0.0
    assert torch.equal(tensors_of(output)[frozen], base[frozen])


def test_skipped_tensors_may_differ_in_shape_or_be_absent_and_are_the_bases(
    zoo: MakeZoo, run: Run, tmp_path: Path
) -> None:
    found = zoo("bert-classifier").copy(tmp_path / "zoo")
    one, other = found.experts.values()
    change_tensors(one, {"classifier.weight": lambda v: torch.cat([v, v]), "classifier.bias": None})
    change_tensors(other, {"classifier.bias": lambda v: v + float("nan")})
    merged = tensors_of(run(found, base={"skip": ["classifier.*"]}))
    base = tensors_of(found.base)
    for name in ("classifier.weight", "classifier.bias"):
        assert torch.equal(merged[name], base[name])
    assert not torch.equal(merged["bert.pooler.dense.weight"], base["bert.pooler.dense.weight"])


def test_first_rule_that_matches_decides(zoo: MakeZoo, run: Run) -> None:
    found = zoo("llama")
    rules = [
        {"tensors": "model.layers.0.mlp.*", "method": "base"},
        {"tensors": "re:model\\.layers\\.\\d+\\.mlp\\..*", "method": "average", "alpha": 0.5},
        {"tensors": "*.self_attn.o_proj.weight", "alpha": 0.25},
        {"tensors": "*.self_attn.q_proj.weight", "method": "tsv_m"},
        {"tensors": "*", "method": "base"},
    ]
    merged = tensors_of(run(found, "ruled", merge={"alpha": 1.5, "rules": rules}))
    plain = tensors_of(run(found, "plain", merge={"alpha": 1.5}))
    base, known = tensors_of(found.base), Experts(found)
    for name, value in base.items():
        update = merged[name].double() - value.double()
        if ".0.mlp." in name or (
            ".mlp." not in name and "o_proj" not in name and "q_proj" not in name
        ):
            assert torch.equal(merged[name], value), name
        elif ".1.mlp." in name:
            mean = 0.5 * sum(known.updates[name]) / 2
            assert torch.allclose(update, mean, atol=1e-7)
        elif "o_proj" in name:
            expected = (plain[name].double() - value.double()) * 0.25 / 1.5
            assert torch.allclose(update, expected, atol=1e-6)
        else:
            assert torch.allclose(update, tsv(known.updates[name]), atol=1e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_other_output_dtype_is_the_float32_merge_rounded_once(
    dtype: str, zoo: MakeZoo, run: Run
) -> None:
    found = zoo("llama")
    whole = tensors_of(run(found, "whole"))
    narrow_path = run(found, "narrow", output={"dtype": dtype})
    narrow = tensors_of(narrow_path)
    assert narrow.keys() == whole.keys()
    for name, value in whole.items():
        assert torch.equal(narrow[name], value.to(getattr(torch, dtype)))
    config = json.loads((narrow_path / "config.json").read_bytes())
    assert config.get("dtype", config.get("torch_dtype")) == dtype
    assert load(found.family, narrow_path, getattr(torch, dtype)).dtype == getattr(torch, dtype)


def test_shard_size_splits_the_same_tensors(zoo: MakeZoo, run: Run) -> None:
    found = zoo("llama")
    one = run(found, "one")
    many = run(found, "many", output={"shard_size": "8KB"})
    files = sorted(p.name for p in many.glob("*.safetensors"))
    assert files == [
        f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)
    ]
    assert len(files) > 3
    whole, split = tensors_of(one), tensors_of(many)
    assert whole.keys() == split.keys()
    assert all(torch.equal(split[name], value) for name, value in whole.items())
    index = json.loads((many / "model.safetensors.index.json").read_bytes())
    for name, file in index["weight_map"].items():
        with safe_open(many / file, "pt") as shard:
            assert name in shard.keys()  # noqa: SIM118 - safe_open has no `in`
    assert index["metadata"]["total_size"] == sum(v.nbytes for v in whole.values())
    load(found.family, many, torch.float32)


def test_equal_integer_tensors_are_copied_and_different_ones_refused_before_work(
    zoo: MakeZoo, run: Run, plan_of: PlanOf, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    found = zoo("bert").copy(tmp_path / "zoo")
    for path in (found.base, *found.experts.values()):
        tensors = load_file(path / "model.safetensors")
        tensors["embeddings.position_ids"] = torch.arange(64)[None]
        save_file(tensors, path / "model.safetensors", {"format": "pt"})
    merged = tensors_of(run(found, merge={"method": "average"}))
    assert torch.equal(merged["embeddings.position_ids"], torch.arange(64)[None])
    change_tensors(found.experts["expert1"], {"embeddings.position_ids": lambda v: v + 1})
    plan = plan_of(found, "other", merge={"method": "average"})
    with pytest.raises(InputError, match=r"embeddings\.position_ids.*expert1"):
        merge_here(plan)
    assert not list((tmp_path / "other").glob("*.safetensors*"))
    skipping = run(
        found, "third", merge={"method": "average"}, base={"skip": ["embeddings.position_ids"]}
    )
    assert torch.equal(tensors_of(skipping)["embeddings.position_ids"], torch.arange(64)[None])


def digests(output: Path) -> dict[str, str]:
    """sha256 of every file of a directory."""
    return {
        path.relative_to(output).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(output.rglob("*"))
        if path.is_file()
    }


@pytest.mark.parametrize(("scheduler", "parallel"), [("threads", 2), ("local", 1), ("local", 2)])
def test_every_scheduler_gives_the_same_bytes(
    scheduler: str, parallel: int, zoo: MakeZoo, plan_of: PlanOf, tmp_path: Path
) -> None:
    found = zoo("llama", shard="12KB")
    merge = {"options": {"levels": ["task", "layer"]}}
    one = plan_of(found, "one/merged", merge=merge)
    merge_here(one)
    # No more memory than the largest task: a gate that miscounts never lets it in.
    other = plan_of(found, "two/merged", merge=merge, run={"memory": one.peak_bytes})
    outcome = merge_here(other, scheduler=scheduler, parallel=parallel)
    assert outcome.tasks_run == len(other.tasks)
    assert digests(tmp_path / "one/merged") == digests(tmp_path / "two/merged")


def test_a_fixed_number_of_threads_gives_the_same_bytes_whatever_runs_beside(
    zoo: MakeZoo, plan_of: PlanOf, tmp_path: Path
) -> None:
    found, before = zoo("llama"), torch.get_num_threads()
    one = plan_of(found, "one/merged", run={"threads": 2})
    merge_here(one)
    other = plan_of(found, "two/merged", run={"threads": 2})
    merge_here(other, scheduler="threads", parallel=2)
    assert digests(tmp_path / "one/merged") == digests(tmp_path / "two/merged")
    assert torch.get_num_threads() == before


def test_a_work_directory_keeps_the_threads_it_began_with(zoo: MakeZoo, plan_of: PlanOf) -> None:
    found, before = zoo("llama"), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        first = plan_of(found)
        calibrate(first, parallel=2)
        assert load_plan(first.directory.plan).manifest["run"]["threads"] == 1
        merge_here(plan_of(found), parallel=1)
        assert load_plan(first.directory.plan).manifest["run"]["threads"] == 1
        merge_here(plan_of(found, run={"threads": 2}), parallel=2)
        assert load_plan(first.directory.plan).manifest["run"]["threads"] == 2
    finally:
        torch.set_num_threads(before)


def test_a_merge_opens_no_port_to_the_network(zoo: MakeZoo, plan_of: PlanOf) -> None:
    import psutil

    seen = set()

    def listen(event: Event) -> None:
        del event
        connections = psutil.Process().net_connections("inet")
        seen.update(c.laddr for c in connections if c.status == psutil.CONN_LISTEN)

    plan = plan_of(zoo("gpt2"), merge={"method": "average"})
    merge_here(plan, listen, scheduler="local", parallel=2)
    assert [address for address in seen if not address.ip.startswith(("127.", "::1"))] == []


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_a_cluster_of_processes_gives_the_same_bytes(
    zoo: MakeZoo, plan_of: PlanOf, tmp_path: Path
) -> None:
    from distributed import LocalCluster

    found = zoo("llama", shard="12KB")
    merge_here(plan_of(found, "one/merged"))
    with LocalCluster(
        n_workers=2,
        threads_per_worker=1,
        processes=True,
        dashboard_address=None,
        memory_limit=0,
        resources={"MEMORY": 1 << 30},
    ) as cluster:
        plan = plan_of(found, "two/merged")
        outcome = merge_here(plan, scheduler=cluster.scheduler_address)
        assert outcome.tasks_run == len(plan.tasks)
    assert digests(tmp_path / "one/merged") == digests(tmp_path / "two/merged")


def test_complete_json_has_the_hash_of_every_tensor(zoo: MakeZoo, run: Run) -> None:
    found = zoo("llama", shard="12KB")
    output = run(found)
    complete = json.loads((output / "complete.json").read_bytes())
    assert set(complete["shards"]) == {p.name for p in output.glob("*.safetensors")}
    for file, entry in complete["shards"].items():
        content = (output / file).read_bytes()
        assert entry["size"] == len(content)
        start = 8 + int.from_bytes(content[:8], "little")
        assert entry["header_sha256"] == hashlib.sha256(content[:start]).hexdigest()
        header = json.loads(content[8:start])
        header.pop("__metadata__", None)
        assert set(entry["xxh3_128"]) == set(header)
        for name, info in header.items():
            first, last = (start + offset for offset in info["data_offsets"])
            assert entry["xxh3_128"][name] == xxhash.xxh3_128_hexdigest(content[first:last])
    beside = {p.name for p in output.iterdir()} - set(complete["shards"])
    assert set(complete["files"]) == beside - {"complete.json"}
    for file, entry in complete["files"].items():
        content = (output / file).read_bytes()
        assert entry == {"size": len(content), "xxh3_128": xxhash.xxh3_128_hexdigest(content)}


def test_report_and_card_say_what_was_done(zoo: MakeZoo, plan_of: PlanOf) -> None:
    found = zoo("bert-classifier", experts=3)
    options = {"profile": "roberta-official"}
    rules = [{"tensors": "*pooler*", "method": "average", "alpha": 0.5}]
    plan = plan_of(found, merge={"alpha": 1.25, "options": options, "rules": rules})
    output = merge_here(plan).output
    report = json.loads((output / "report.json").read_bytes())
    base = tensors_of(found.base)
    assert report["method"] == "esm"
    assert report["alpha"] == 1.25
    assert report["options"] == options
    assert set(report["tensors"]) == set(base)
    by_treatment: dict[str, set[str]] = {}
    for name, entry in report["tensors"].items():
        by_treatment.setdefault(entry["treatment"], set()).add(name)
    pooler = {name for name in base if "pooler" in name}
    assert by_treatment["copy"] == {n for n in base if "bias" in n or "classifier" in n} - pooler
    assert by_treatment["elementwise"] >= pooler
    assert all(report["tensors"][name]["alpha"] == 0.5 for name in pooler)
    merged = set(report["matrices"])
    assert by_treatment["factors"] == merged
    blocks = {name for name in merged if ".layer." in name}
    assert len(blocks) == 6 * BLOCKS
    known = Experts(found)
    for name in blocks:
        numbers = report["matrices"][name]
        for expert, update in zip(found.experts, known.updates[name], strict=True):
            norm = float(update.norm())
            assert numbers["update_norms"][expert] == pytest.approx(norm, rel=1e-5)
            relative = norm / float(known.base[name].norm())
            assert numbers["relative_updates"][expert] == pytest.approx(relative, rel=1e-5)
            assert numbers["tokens"][expert] == 16 * 12
        assert numbers["shape"] == list(base[name].shape)
        assert numbers["ranks"] == [max(1, base[name].shape[0] // 3)] * 3
    for label, path in (("base", found.base), *found.experts.items()):
        entry = report["base"] if label == "base" else report["experts"][label]
        content = (path / "model.safetensors").read_bytes()
        length = 8 + int.from_bytes(content[:8], "little")
        hashes = {
            hashlib.sha256(content[:length]).hexdigest(),
            hashlib.sha256(content[8:length]).hexdigest(),
        }
        assert entry["path"] == str(path)
        assert entry["files"]["model.safetensors"]["size"] == len(content)
        assert entry["files"]["model.safetensors"]["header_sha256"] in hashes
    for expert in found.experts:
        assert report["calibration"][expert]["samples"] == list(range(16))
        assert report["calibration"][expert]["tokens"] == 16 * 12
    results = [plan.directory.results(key) for key in plan.tasks]
    total = sum(one["bytes_read"] for one in results)
    assert sum(report["bytes_read"].values()) == total
    assert report["bytes_read"]["experts"] == sum(one["bytes_read_experts"] for one in results)
    assert report["bytes_read"]["base"] >= sum(value.nbytes for value in base.values())
    card = (output / "README.md").read_text()
    assert card.startswith("---\ntags:\n")
    for expert, path in found.experts.items():
        assert f"| expert {expert} | `{path}` |" in card
    assert "| esm (target) | 12 | 1.25 |" in card
    assert f"| average (rule '*pooler*') | {len(pooler)} | 0.5 |" in card


def test_small_updates_of_bfloat16_experts_are_warned_of(zoo: MakeZoo, run: Run) -> None:
    output = run(zoo("llama", dtype=torch.bfloat16, noise=0.002))
    warnings = json.loads((output / "report.json").read_bytes())["warnings"]
    assert any("expert0" in line and "bfloat16" in line for line in warnings)


def test_order_of_experts_does_not_matter_where_the_method_is_symmetric(
    zoo: MakeZoo, run: Run
) -> None:
    found = zoo("llama", experts=3)
    one = tensors_of(run(found, "one"))
    document = found.document(Path("unused"))
    other = tensors_of(run(found, "two", experts=document["experts"][::-1]))
    for name, value in one.items():
        assert torch.allclose(other[name], value, rtol=0, atol=2e-5), name


@pytest.mark.parametrize(
    "rule", [{"alpha": 0.5}, {"method": "average"}, {"method": "base"}], ids=str
)
def test_a_rule_about_a_part_of_one_matrix_is_refused(
    rule: dict[str, Any], zoo: MakeZoo, plan_of: PlanOf
) -> None:
    """q, k and v merged as one: a rule about k alone must not silently do something else."""
    merge = {
        "options": {"fuse_qkv": True},
        "rules": [{"tensors": "*.k_proj.weight", **rule}],
    }
    with pytest.raises(ManifestError, match="merges as one matrix") as error:
        plan_of(zoo("llama"), merge=merge)
    assert "self_attn.k_proj.weight" in str(error.value)


def test_a_rule_about_all_parts_of_one_matrix_decides(zoo: MakeZoo, plan_of: PlanOf) -> None:
    rules = [{"tensors": "*.[qkv]_proj.weight", "alpha": 0.5}]
    plan = plan_of(zoo("llama"), merge={"options": {"fuse_qkv": True}, "rules": rules})
    fused = [m for m in plan.matrices.values() if len(m.parts) == 3]
    assert [m.alpha for m in fused] == [0.5] * BLOCKS


def test_patterns_that_match_nothing_are_noted(zoo: MakeZoo, plan_of: PlanOf) -> None:
    plan = plan_of(
        zoo("llama"),
        base={"skip": ["lm_heads.*"]},
        merge={"rules": [{"tensors": "*.qproj.*", "method": "base"}]},
    )
    for pattern in ("lm_heads.*", "*.qproj.*"):
        assert any(pattern in note and "no tensor" in note for note in plan.notes)
