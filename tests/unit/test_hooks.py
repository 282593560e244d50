"""What is observed is what was multiplied: for every kind of matrix, on every way of using it."""

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - its usual name
from transformers.pytorch_utils import Conv1D

from esm_stream.calibration.hooks import ObservedMatrix, named, observe_inputs, trace_inputs

Seen = dict[str, Tensor]


class Around(nn.Module):
    """A module around functions of its parameters, as models write them."""

    def __init__(self, forward: Callable[..., Tensor], **shapes: tuple[int, ...]) -> None:
        super().__init__()
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape), requires_grad=False))
        self.body = forward

    def forward(self, *args: object, **kwargs: object) -> Tensor:
        return self.body(self, *args, **kwargs)


def watch(
    module: nn.Module, *args: object, **kwargs: object
) -> tuple[Any, dict[str, ObservedMatrix], Seen]:
    """Output, matrices, and rows of inputs; the output is that of the unwatched module."""
    module.eval()
    with torch.inference_mode():
        plain = module(*args, **kwargs)
        with trace_inputs(module) as matrices:
            module(*args, **kwargs)
        seen: dict[str, list[Tensor]] = {}

        def observer(key: str, x: Tensor) -> None:
            seen.setdefault(key, []).append(x.reshape(-1, x.shape[-1]).clone())

        with observe_inputs(module, observer, matrices):
            again = module(*args, **kwargs)
    first, second = (y[0] if isinstance(y, tuple) else y for y in (plain, again))
    assert torch.equal(first, second)
    rows = {key: torch.cat(found) for key, found in seen.items()}
    for key, matrix in matrices.items():
        assert rows[key].shape[1] == matrix.layout.inputs
        assert matrix.rows == len(rows[key])
    return plain, matrices, rows


def weight_of(module: nn.Module, matrix: ObservedMatrix) -> Tensor:
    """The matrix (O, I) as its description says it is kept."""
    value = module.get_parameter(matrix.parameter)
    if matrix.stack is not None:
        value = value.unflatten(0, (matrix.stack, -1))
        value = value[matrix.slice].squeeze(0) if value.ndim == 4 else value[matrix.slice]
    rows = (matrix.layout.inputs, -1) if matrix.layout.transposed else (matrix.layout.outputs, -1)
    flat = value.reshape(rows)
    return flat.T if matrix.layout.transposed else flat


ONE_MATRIX = {
    "linear": nn.Linear(6, 4, bias=False),
    "subclass": type("Special", (nn.Linear,), {})(6, 4, bias=False),
    "conv1d of gpt": Conv1D(4, 6),
    "router": Around(lambda m, x: F.linear(x.double(), m.weight.double()), weight=(4, 6)),
    "matmul": Around(lambda m, x: x @ m.weight, weight=(6, 4)),
    "transposed": Around(lambda m, x: x.matmul(m.weight.t()), weight=(4, 6)),
    "property": Around(lambda m, x: torch.matmul(x, m.weight.T), weight=(4, 6)),
    "from the left": Around(lambda m, x: (m.weight @ x.mT).mT, weight=(4, 6)),
    "addmm": Around(lambda m, x: torch.addmm(x.new_zeros(4), x[0], m.weight)[None], weight=(6, 4)),
    "keywords": Around(lambda m, x: F.linear(input=x, weight=m.weight), weight=(4, 6)),
    "einsum": Around(
        lambda m, x: torch.einsum("bti,ihd->bthd", x, m.weight).flatten(2), weight=(6, 2, 2)
    ),
    "einsum of outputs first": Around(
        lambda m, x: torch.einsum("bthd,ohd->bto", x.unflatten(2, (2, 3)), m.weight),
        weight=(4, 2, 3),
    ),
    "twice transposed": Around(lambda m, x: F.linear(x, m.weight.T.float().T), weight=(4, 6)),
}


@pytest.mark.parametrize("kind", ONE_MATRIX)
def test_one_matrix_times_what_was_observed_is_the_output(kind: str) -> None:
    module, x = ONE_MATRIX[kind], torch.randn(1, 5, 6)
    if isinstance(module, Conv1D):
        module.bias.data.zero_()
    output, matrices, seen = watch(module, x)
    (matrix,) = matrices.values()
    assert (matrix.layout.outputs, matrix.layout.inputs) == (4, 6)
    assert matrix.key in ("", "weight")
    assert torch.equal(seen[matrix.key], x[0])
    found = x[0] @ weight_of(module, matrix).T
    assert torch.allclose(found, output[0].reshape(5, 4).float(), atol=1e-5)


CONVOLUTIONS = {
    "patches": (nn.Conv2d(3, 5, 4, stride=4), (2, 3, 8, 12)),
    "overlapping": (nn.Conv2d(3, 5, (3, 2), stride=(2, 1), padding=(1, 0)), (2, 3, 7, 6)),
    "dilated": (nn.Conv2d(2, 4, 3, dilation=2, padding="same"), (1, 2, 6, 7)),
    "even same": (nn.Conv1d(2, 4, 4, padding="same", dilation=2), (2, 2, 9)),
    "audio": (nn.Conv1d(2, 4, 5, stride=3), (2, 2, 20)),
    "video": (nn.Conv3d(3, 4, (2, 4, 4), stride=(2, 4, 4)), (2, 3, 4, 8, 8)),
    "one sample": (nn.Conv1d(2, 4, 3), (2, 9)),
    "pointwise": (nn.Conv2d(3, 5, 1), (2, 3, 4, 4)),
}


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_a_convolution_is_its_matrix_times_the_unfolded_input(kind: str) -> None:
    module, shape = CONVOLUTIONS[kind]
    module.bias.data.zero_()  # type: ignore[union-attr]
    output, matrices, seen = watch(module, torch.randn(shape))
    (matrix,) = matrices.values()
    found = seen[matrix.key] @ module.weight.flatten(1).T
    batched = output if len(shape) == module.weight.ndim else output[None]
    assert torch.allclose(found, batched.movedim(1, -1).reshape(found.shape), atol=1e-5)


def test_a_convolution_by_groups_is_not_a_matrix() -> None:
    assert not watch(nn.Conv2d(4, 4, 3, groups=4), torch.randn(1, 4, 6, 6))[1]


def test_the_looks_of_a_matrix_are_not_enough() -> None:
    """Tables that are looked up or added are never multiplied with anything."""
    module = nn.Sequential(nn.Embedding(7, 6), nn.LayerNorm((5, 6)), nn.Linear(6, 4))
    assert list(watch(module, torch.arange(5)[None])[1]) == ["2"]


def test_a_tied_head_is_observed_under_the_first_of_its_names() -> None:
    embedding, head = nn.Embedding(7, 6), nn.Linear(6, 7, bias=False)
    head.weight = embedding.weight
    module = nn.ModuleDict({"table": embedding, "head": head})
    module.forward = lambda ids: head(embedding(ids))  # type: ignore[method-assign]
    _, matrices, seen = watch(module, torch.arange(5)[None])
    assert list(matrices) == ["table"]
    assert torch.equal(seen["table"], embedding.weight[:5])


def test_matrices_with_one_input_have_one_leader() -> None:
    q, k, o = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
    module = nn.ModuleDict({"q": q, "k": k, "o": o})
    module.forward = lambda x: o(q(x) * k(x))  # type: ignore[method-assign]
    _, matrices, _ = watch(module, torch.randn(1, 3, 6))
    assert {m.key: m.leader for m in matrices.values()} == {"q": "q", "k": "q", "o": "o"}


@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_attention_of_torch_shows_all_its_projections(cross: bool, grad: bool) -> None:
    module = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    module.in_proj_bias.data.normal_()
    module.out_proj.bias.data.normal_()
    query, other = torch.randn(2, 3, 8), torch.randn(2, 5, 8)
    key = other if cross else query
    with torch.set_grad_enabled(grad):
        output, matrices, seen = watch(module, query, key, key)
    assert list(matrices) == [*(f"in_proj_weight#{i}" for i in range(3)), "out_proj"]
    assert torch.equal(seen["in_proj_weight#0"], query.flatten(0, 1))
    assert torch.equal(seen["in_proj_weight#2"], key.flatten(0, 1))
    q, k, v = (
        F.linear(x, w, b).unflatten(-1, (2, 4)).transpose(1, 2)
        for x, w, b in zip(
            (query, key, key),
            module.in_proj_weight.chunk(3),
            module.in_proj_bias.chunk(3),
            strict=True,
        )
    )
    mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2).flatten(0, 1)
    assert torch.allclose(seen["out_proj"], mixed, atol=1e-5)
    found = F.linear(seen["out_proj"], module.out_proj.weight, module.out_proj.bias)
    assert torch.allclose(found, output[0].flatten(0, 1), atol=1e-5)
    assert matrices["in_proj_weight#2"].leader == f"in_proj_weight#{1 if cross else 0}"


def test_attention_with_separate_projections() -> None:
    module = nn.MultiheadAttention(8, 2, kdim=4, vdim=6, batch_first=True)
    inputs = torch.randn(1, 3, 8), torch.randn(1, 5, 4), torch.randn(1, 5, 6)
    seen = watch(module, *inputs)[2]
    names = ["q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj"]
    assert list(seen) == names
    assert all(torch.equal(seen[n], x[0]) for n, x in zip(names[:3], inputs, strict=True))


def mixture(name: str, implementation: str) -> nn.Module:
    """Experts of a model of transformers: E = 4, hidden 8, intermediate 12."""
    import transformers
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_local_experts": 4}
    if name == "gpt-oss":
        config: Any = transformers.GptOssConfig(**sizes, num_attention_heads=2, head_dim=4)
        module: nn.Module = GptOssExperts(config)
    else:
        config = transformers.MixtralConfig(**sizes, num_attention_heads=2, num_key_value_heads=1)
        module = MixtralExperts(config)
    config._experts_implementation_internal = implementation
    torch.manual_seed(0)
    for value in module.parameters():
        value.requires_grad_(requires_grad=False).normal_()
    return module


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("name", ["mixtral", "gpt-oss"])
def test_each_expert_sees_the_tokens_that_are_routed_to_it(name: str, implementation: str) -> None:
    module, x = mixture(name, implementation), torch.randn(7, 8)
    chosen = torch.tensor([[0, 2], [2, 0], [3, 2], [2, 3], [0, 3], [2, 0], [3, 0]])  # never 1
    output, matrices, seen = watch(module, x, chosen, torch.full((7, 2), 0.5))
    transposed = name == "gpt-oss"
    expected = torch.zeros(7, 8)
    for expert in (0, 2, 3):
        up, down = matrices[f"gate_up_proj#{expert}"], matrices[f"down_proj#{expert}"]
        assert up.layout.transposed == down.layout.transposed == transposed
        assert (up.layout.outputs, up.layout.inputs, up.stack) == (24, 8, 4)
        tokens = (chosen == expert).any(dim=1)
        mine = seen[up.key]
        assert sorted(mine.tolist()) == sorted(x[tokens].tolist())
        joined = mine @ weight_of(module, up).T
        if transposed:
            joined = joined + module.gate_up_proj_bias[expert]
        assert torch.allclose(seen[down.key], module._apply_gate(joined), atol=1e-5)
        made = seen[down.key] @ weight_of(module, down).T
        if transposed:
            made = made + module.down_proj_bias[expert]
        order = [x.tolist().index(row) for row in mine.tolist()]
        expected[order] += 0.5 * made
    assert torch.allclose(output, expected, atol=1e-4)
    assert not {"gate_up_proj#1", "down_proj#1"} & set(seen)


def test_experts_that_multiply_all_tokens_count_only_those_routed_to_them() -> None:
    import transformers
    from transformers.models.llama4.modeling_llama4 import Llama4TextMoe

    config = transformers.Llama4TextConfig(
        hidden_size=6, intermediate_size=5, num_local_experts=3, num_experts_per_tok=1
    )
    module, x = Llama4TextMoe(config), torch.randn(1, 8, 6)
    for value in module.parameters():
        value.requires_grad_(requires_grad=False).normal_()
    _, matrices, seen = watch(module, x)
    scores = x[0] @ module.router.weight.T
    assert torch.equal(seen["router"], x[0])
    for expert in range(3):
        tokens = scores.argmax(dim=1) == expert
        scaled = x[0, tokens] * scores[tokens, expert, None].sigmoid()
        if tokens.any():
            assert torch.allclose(seen[f"experts.gate_up_proj#{expert}"], scaled, atol=1e-6)
            assert len(seen[f"experts.down_proj#{expert}"]) == len(scaled)
    assert all(m.layout.transposed for m in matrices.values() if "experts" in m.key)


@pytest.mark.parametrize("name", ["mixtral", "gpt-oss"])
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_without_values_all_experts_are_listed(name: str, implementation: str) -> None:
    module = mixture(name, implementation).to("meta")
    chosen = torch.zeros(7, 2, dtype=torch.long, device="meta")
    with trace_inputs(module) as matrices:
        output = module(torch.empty(7, 8, device="meta"), chosen, torch.empty(7, 2, device="meta"))
    assert output.shape == (7, 8)
    assert set(matrices) == {f"{p}#{i}" for p in ("gate_up_proj", "down_proj") for i in range(4)}
    assert matrices["gate_up_proj#3"].layout.transposed == (name == "gpt-oss")
    assert module.config._experts_implementation == implementation  # as it was


def test_stacks_of_other_makes() -> None:
    """A tall parameter seen as a stack, slices by number, and a loop over slices."""

    def forward(module: nn.Module, x: Tensor) -> Tensor:
        tall = module.tall.view(2, 4, 6)
        parts = [x.matmul(tall[i].t()) for i in range(2)]
        return sum(parts) + sum(F.linear(x, one) for one in module.stack.unbind())  # type: ignore[return-value]

    module, x = Around(forward, tall=(8, 6), stack=(2, 4, 6)), torch.randn(3, 6)
    _, matrices, seen = watch(module, x)
    assert list(matrices) == ["tall#0", "tall#1", "stack#0", "stack#1"]
    assert all(torch.equal(rows, x) for rows in seen.values())
    assert torch.equal(weight_of(module, matrices["tall#1"]), module.tall[4:])


def test_computed_weights_are_not_taken_for_parameters() -> None:
    module = Around(
        lambda m, x: F.linear(x, m.weight * 2) + F.linear(x, m.weight[:4]), weight=(4, 6)
    )
    _, matrices, _ = watch(module, torch.randn(3, 6))
    assert not matrices


def test_only_the_wanted_matrices_are_reported() -> None:
    module, seen = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4)), []
    with observe_inputs(module, lambda key, _: seen.append(key), ["layer.1"], prefix="layer"):
        module(torch.randn(2, 6))
    assert seen == ["layer.1"]


def test_hooks_are_gone_when_the_forward_fails() -> None:
    def fail(module: nn.Module, x: Tensor) -> Tensor:  # noqa: ARG001
        raise ValueError("no")

    module: nn.Module = Around(fail, weight=(4, 6))
    with pytest.raises(ValueError, match="no"), observe_inputs(module, print, ["weight"]):
        module(torch.randn(2, 6))
    assert "forward" not in module.__dict__
    module.body = lambda m, x: F.linear(x, m.weight)  # type: ignore[assignment]
    module(torch.randn(2, 6))  # nothing is printed, nobody looks


def test_an_error_of_the_observer_stops_the_forward() -> None:
    def refuse(key: str, _: Tensor) -> None:
        raise RuntimeError(key)

    module = nn.Sequential(nn.Linear(6, 4))
    with pytest.raises(RuntimeError, match="0"), observe_inputs(module, refuse, ["0"]):
        module(torch.randn(2, 6))


def test_the_forward_is_watched_in_whatever_thread_it_runs() -> None:
    module, seen = nn.Sequential(nn.Linear(6, 4)), []
    with observe_inputs(module, lambda key, _: seen.append(key), ["0"]):
        thread = threading.Thread(target=module, args=(torch.randn(2, 6),))
        thread.start()
        thread.join()
    assert seen == ["0"]


def test_parameters_loaded_while_the_module_runs_are_found() -> None:
    module, seen = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4)), []
    pristine = copy.deepcopy(module)

    def load(layer: nn.Module, _: object) -> None:
        layer.weight = nn.Parameter(layer.weight.detach().clone())

    module[0].register_forward_pre_hook(load)
    with observe_inputs(module, lambda key, _: seen.append(key), ["0", "1"]):
        for _ in range(3):
            module(torch.randn(2, 6))
    assert seen == ["0", "1"] * 3
    assert torch.equal(module[0].weight, pristine[0].weight)


def test_tensors_in_place_of_parameters_are_known_by_the_name_they_were_given() -> None:
    weight = torch.randn(4, 6)
    module = Around(lambda _, x: F.linear(x, named(weight.clone(), "far.away.weight")))
    seen = []
    with observe_inputs(module, lambda key, _: seen.append(key), ["far.away"]):
        module(torch.randn(2, 6))
    assert seen == ["far.away"]


def test_of_two_observers_the_inner_one_sees_its_part_alone() -> None:
    inner, seen = nn.Sequential(nn.Linear(6, 6)), []
    outer = nn.Sequential(inner, nn.Linear(6, 4))
    outer_sees = observe_inputs(outer, lambda key, _: seen.append(f"outer {key}"), ["0.0", "1"])
    with outer_sees, observe_inputs(inner, lambda key, _: seen.append(f"inner {key}"), ["0"]):
        outer(torch.randn(2, 6))
    assert seen == ["inner 0", "outer 1"]
