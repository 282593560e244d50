"""A small real merge that needs no download: the engine of `esm-stream demo`.

From:  the 1797 scanned digits of 8 x 8 pixels that scikit-learn brings along.
To:    a folder with a base, one expert per task, heads, proxies and two manifests; and, after
       both merges, the accuracy of every model on scans that nothing was trained on.
Cost:  about a minute on one core, 500 MB of memory, 24 MB of disk.

All tasks ask which digit is shown, each in a view of its own: upright, negative, striped, turned.
The base is a vision transformer that learned to tell digits and views apart. An expert is the base
fine-tuned on one view until its class token points in the direction that stands for the digit in
the head of its task. Heads are drawn before any fine-tuning and never trained, as the embedded
class names of CLIP are; the directions of all tasks are orthogonal, so no answer excludes another.
The experts meet in the weights: they start from one base, see the same strokes, and each turns the
same matrices towards its own answers with no regard for the other views.
"""

import json
import math
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from esm_stream.errors import EsmStreamError, ManifestError
from esm_stream.store.files import write_atomically

if TYPE_CHECKING:
    import numpy as np
    from torch import Generator as RandomDraw
    from torch import Tensor
    from transformers import ViTModel

Report = Callable[[str], None]

DIGITS = 10
_BATCH = 32  # images of one training step
_MARKER = "demo.json"
_VIEWS: dict[str, str] = {
    "upright": "as scanned",
    "negative": "light and dark exchanged",
    "striped": "every other column in negative",
    "turned": "by a quarter turn",
}
TASKS = tuple(_VIEWS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Size of the models and length of the training.

    Attributes:
        hidden: Width of the encoder; at least ten directions for each task.
        layers: Transformer blocks.
        attention_heads: Attention heads of a block.
        base_steps: Steps that train the base.
        expert_steps: Steps that fine-tune each expert.
        test_images: Scans that are kept for the test.
        proxies: Unlabelled training images per task that are shown to the merge.
    """

    hidden: int = 80
    layers: int = 4
    attention_heads: int = 4
    base_steps: int = 1300
    expert_steps: int = 120
    test_images: int = 360
    proxies: int = 32


@dataclass(frozen=True, slots=True)
class DemoFiles:
    """Where everything of one demo lies; nothing here needs to exist yet."""

    directory: Path

    @property
    def base(self) -> Path:
        """Directory of the base model."""
        return self.directory / "models" / "base"

    def expert(self, task: str) -> Path:
        """Directory of the expert of one task."""
        return self.directory / "models" / "experts" / task

    def calibration(self, task: str) -> Path:
        """Proxies of one task, as model inputs."""
        return self.directory / "data" / f"{task}.safetensors"

    @property
    def heads(self) -> Path:
        """One matrix (digits, hidden) per task."""
        return self.directory / "heads.safetensors"

    @property
    def test(self) -> Path:
        """Test images and digits of every task."""
        return self.directory / "data" / "test.npz"

    @property
    def esm(self) -> Path:
        """Manifest of the merge by ESM."""
        return self.directory / "esm.toml"

    @property
    def average(self) -> Path:
        """Manifest of the plain average."""
        return self.directory / "average.toml"

    @property
    def results(self) -> Path:
        """The table, as JSON."""
        return self.directory / "results.json"


@dataclass(frozen=True, slots=True)
class DemoRow:
    """Test accuracy of one model, or of the experts each on its own task, in percent."""

    name: str
    accuracy: Mapping[str, float]

    @property
    def mean(self) -> float:
        """Mean over the tasks."""
        return sum(self.accuracy.values()) / len(self.accuracy)


@dataclass(frozen=True, slots=True)
class DemoResult:
    """The table of the demo: base, experts, plain average, ESM."""

    tasks: tuple[str, ...]
    rows: tuple[DemoRow, ...]

    def to_json(self) -> str:
        """The table as a JSON document, accuracies in percent."""
        rows = [
            {
                "name": row.name,
                "accuracy": {task: round(row.accuracy[task], 2) for task in self.tasks},
                "mean": round(row.mean, 2),
            }
            for row in self.rows
        ]
        return json.dumps({"tasks": self.tasks, "rows": rows}, indent=2)


def _silent(line: str) -> None:
    del line


def run(
    directory: Path,
    merge: Callable[[Path], Path],
    *,
    seed: int = 0,
    recipe: Recipe | None = None,
    report: Report = _silent,
) -> DemoResult:
    """Prepare the models, merge them by average and by ESM, and compare on the test images.

    Args:
        directory: Folder of the demo; finished models in it are used again.
        merge: Merges a manifest and returns the directory of the merged model.
        seed: Decides the split, the heads, the initial weights and the order of the images.
        recipe: Sizes and steps; the default trains for about a minute.
        report: Is told what happens, one line at a time.
    """
    files = prepare(directory, seed, report=report, recipe=recipe)
    report("merging by plain average")
    average = merge(files.average)
    report("merging by ESM")
    esm = merge(files.esm)
    report("testing all models")
    own = {task: evaluate(directory, files.expert(task), [task])[task] for task in TASKS}
    rows = (
        DemoRow("base", evaluate(directory, files.base, TASKS)),
        DemoRow("experts", own),
        DemoRow("average", evaluate(directory, average, TASKS)),
        DemoRow("esm", evaluate(directory, esm, TASKS)),
    )
    result = DemoResult(TASKS, rows)
    write_atomically(files.results, (result.to_json() + "\n").encode())
    return result


def prepare(
    directory: Path,
    seed: int = 0,
    *,
    report: Report = _silent,
    recipe: Recipe | None = None,
) -> DemoFiles:
    """Train base and experts, and write all that a merge needs; a finished folder is kept as it is.

    Raises:
        ManifestError: The folder holds something else, or a demo of another seed or recipe.
        EsmStreamError: scikit-learn is not installed.
    """
    recipe = recipe or Recipe()
    files = DemoFiles(directory)
    identity = {"seed": seed, **asdict(recipe)}
    if _is_finished(directory, identity):
        report(f"using the models in {directory}")
        return files
    images, digits = _scans()
    directory.mkdir(parents=True, exist_ok=True)
    _mark(directory, identity, finished=False)
    with _one_thread(), _no_progress_bars():
        _make(files, _Split.draw(images, digits, seed, recipe), seed, recipe, report)
    for path, method in ((files.average, "average"), (files.esm, "esm")):
        write_atomically(path, _manifest(method, recipe).encode())
    _mark(directory, identity, finished=True)
    return files


def evaluate(directory: Path, model_dir: Path, tasks: Sequence[str]) -> dict[str, float]:
    """Test accuracy of one model in percent, by task.

    Args:
        directory: A prepared demo; its heads and test images are used.
        model_dir: A transformers directory of the base's architecture.
        tasks: Names of the tasks to test.
    """
    import numpy as np
    import torch
    from safetensors.torch import load_file

    files = DemoFiles(directory)
    heads = load_file(files.heads)
    model = _load(model_dir).eval()
    result = {}
    with np.load(files.test) as test, torch.inference_mode():
        for task in tasks:
            pixels = torch.from_numpy(test[f"{task}_x"])
            answers = (_features(model, pixels) @ heads[task].T).argmax(1)
            hits = answers == torch.from_numpy(test[f"{task}_y"])
            result[task] = 100 * hits.double().mean().item()
    return result


def _is_finished(directory: Path, identity: Mapping[str, Any]) -> bool:
    """Whether a complete demo of this identity is there; False for an empty or unfinished one."""
    if not directory.exists():
        return False
    if not directory.is_dir():
        raise ManifestError(f"{directory}: is a file; the demo needs a directory")
    try:
        marker = json.loads((directory / _MARKER).read_text(encoding="utf-8"))
    except FileNotFoundError:
        if any(directory.iterdir()):
            raise ManifestError(
                f"{directory}: is not empty and holds no demo; name an empty or a new directory"
            ) from None
        return False
    except ValueError as error:
        raise ManifestError(
            f"{directory / _MARKER}: was not written by the demo: {error}"
        ) from error
    if not isinstance(marker, dict) or "finished" not in marker:
        raise ManifestError(f"{directory / _MARKER}: was not written by the demo")
    if not marker["finished"]:
        return False
    different = sorted(key for key, value in identity.items() if marker.get(key) != value)
    if different:
        was = ", ".join(f"{key} = {marker.get(key)}" for key in different)
        raise ManifestError(f"{directory}: holds a demo made with {was}; name another directory")
    return True


def _mark(directory: Path, identity: Mapping[str, Any], *, finished: bool) -> None:
    document = {"finished": finished, **identity}
    write_atomically(directory / _MARKER, (json.dumps(document, indent=2) + "\n").encode())


def _scans() -> tuple["np.ndarray", "np.ndarray"]:
    """All scans as float32 (1797, 8, 8) in [-1, 1], and their digits."""
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise EsmStreamError(
            "the demo trains on the digits that come with scikit-learn, which is not installed; "
            'install it: pip install "esm-stream[demo]"'
        ) from error
    scans = load_digits()
    return (scans.images / 8 - 1).astype("float32"), scans.target


def _view(images: "np.ndarray", task: str) -> "np.ndarray":
    """The images (n, 8, 8) as a task sees them, as model inputs (n, 1, 8, 8)."""
    import numpy as np

    if task == "negative":
        images = -images
    elif task == "striped":
        images = images * np.where(np.arange(8) % 2, 1, -1).astype(images.dtype)
    elif task == "turned":
        images = np.rot90(images, axes=(1, 2))
    return np.ascontiguousarray(images[:, None])


@dataclass(frozen=True, slots=True)
class _Split:
    """Training and test scans; all views of one scan are on the same side."""

    train_x: "np.ndarray"
    train_y: "np.ndarray"
    test_x: "np.ndarray"
    test_y: "np.ndarray"

    @classmethod
    def draw(
        cls, images: "np.ndarray", digits: "np.ndarray", seed: int, recipe: Recipe
    ) -> "_Split":
        import numpy as np

        order = np.random.RandomState(seed).permutation(len(images))
        test, train = order[: recipe.test_images], order[recipe.test_images :]
        return cls(images[train], digits[train], images[test], digits[test])


def _make(files: DemoFiles, split: _Split, seed: int, recipe: Recipe, report: Report) -> None:
    """Train and write base, experts, heads, proxies and test images."""
    import copy

    import torch

    digits = torch.from_numpy(split.train_y)
    views = {task: torch.from_numpy(_view(split.train_x, task)) for task in TASKS}
    draw = torch.Generator().manual_seed(seed)
    model = _new_model(recipe, seed)
    report(f"training the base: {recipe.base_steps} steps on all views of {len(digits)} scans")
    # One class for each digit in each view: the base learns what is shown and how.
    pixels = torch.cat(list(views.values()))
    labels = torch.cat([digits + DIGITS * i for i in range(len(TASKS))])
    classes = torch.randn(DIGITS * len(TASKS), recipe.hidden, generator=draw, requires_grad=True)
    _train(model, pixels, labels, classes, recipe.base_steps, 1e-3, draw)
    model.save_pretrained(files.base)
    heads = _heads(recipe, draw)
    _write_data(files, split, heads, recipe)
    for task in TASKS:
        report(f"training the expert '{task}' ({_VIEWS[task]}): {recipe.expert_steps} steps")
        expert = copy.deepcopy(model)
        _train(expert, views[task], digits, heads[task], recipe.expert_steps, 4e-4, draw)
        expert.save_pretrained(files.expert(task))


def _new_model(recipe: Recipe, seed: int) -> "ViTModel":
    import torch
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(
        hidden_size=recipe.hidden,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.attention_heads,
        intermediate_size=4 * recipe.hidden,
        image_size=8,
        patch_size=2,
        num_channels=1,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ViTModel(config, add_pooling_layer=False)


def _heads(recipe: Recipe, draw: "RandomDraw") -> dict[str, "Tensor"]:
    """Ten orthonormal directions for each task, drawn at random, orthogonal across tasks."""
    import torch

    square = torch.randn(recipe.hidden, recipe.hidden, generator=draw)
    directions = torch.linalg.qr(square)[0].T.contiguous()
    return dict(zip(TASKS, directions[: DIGITS * len(TASKS)].split(DIGITS), strict=True))


def _train(
    model: "ViTModel",
    pixels: "Tensor",
    labels: "Tensor",
    classes: "Tensor",
    steps: int,
    rate: float,
    draw: "RandomDraw",
) -> None:
    """Turn the features of the images towards their class; `classes` learns if it asks for it."""
    import torch
    from torch.nn.functional import cross_entropy, normalize

    weights = [*model.parameters(), *([classes] if classes.requires_grad else [])]
    optimizer = torch.optim.AdamW(weights, lr=rate, weight_decay=0.0)
    model.train()
    for step in range(steps):
        warm = min(1.0, (step + 1) / 20)
        for group in optimizer.param_groups:
            group["lr"] = rate * warm * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        rows = torch.randint(len(pixels), (_BATCH,), generator=draw)
        # 16: cosines are at most 1, and a softmax over them would never be certain.
        scores = 16 * _features(model, pixels[rows]) @ normalize(classes, dim=-1).T
        optimizer.zero_grad()
        cross_entropy(scores, labels[rows]).backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()


def _features(model: "ViTModel", pixels: "Tensor") -> "Tensor":
    """Class token of the last layer, of length 1."""
    from torch.nn.functional import normalize

    return normalize(model(pixel_values=pixels).last_hidden_state[:, 0], dim=-1)


def _write_data(
    files: DemoFiles, split: _Split, heads: Mapping[str, "Tensor"], recipe: Recipe
) -> None:
    import numpy as np
    import torch
    from safetensors.torch import save_file

    files.test.parent.mkdir(parents=True, exist_ok=True)
    save_file({task: head.clone() for task, head in heads.items()}, files.heads)
    test: dict[str, Any] = {}
    for task in TASKS:
        proxies = torch.from_numpy(_view(split.train_x[: recipe.proxies], task))
        save_file({"pixel_values": proxies}, files.calibration(task))
        test[f"{task}_x"] = _view(split.test_x, task)
        test[f"{task}_y"] = split.test_y
    np.savez_compressed(files.test, **test)


def _load(model_dir: Path) -> "ViTModel":
    """The encoder in a directory."""
    import torch
    from transformers import AutoModel

    with _no_progress_bars():
        model: ViTModel = AutoModel.from_pretrained(
            model_dir, dtype=torch.float32, add_pooling_layer=False
        )
    return model


@contextmanager
def _no_progress_bars() -> Generator[None]:
    """Keep transformers from drawing any: progress goes through `report`."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


@contextmanager
def _one_thread() -> Generator[None]:
    """One thread: matrices this small gain nothing from more, and sums keep their order."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _manifest(method: str, recipe: Recipe) -> str:
    """Text of the manifest of one method; the keys are explained for a first reader."""
    experts = "\n".join(_EXPERT.format(task=task, view=_VIEWS[task]) for task in TASKS)
    return _MANIFEST.format(
        title=_TITLES[method],
        experts=experts,
        samples=recipe.proxies,
        merge=_MERGES[method],
        method=method,
    )


_TITLES = {
    "esm": "Merges the four digit readers into one by Essential Subspace Merging.",
    "average": "Merges the four digit readers into one by averaging their weights.",
}
_EXPERT = """\
[[experts]]
name = "{task}"                                 # digits {view}
model = "models/experts/{task}"
calibration = "data/{task}.safetensors"         # unlabelled inputs of this expert's task
"""
_MERGES = {
    "esm": """\
method = "esm"
# How far to go from the base along the merged update. "default" needs no labelled data; if you
# have some, try values around it and keep the best.
alpha = "default"

[merge.options]
# A published variant of the method. "vit-official" is the one of the authors' code for vision
# transformers; try "journal" to see the variant of the journal article.
profile = "vit-official"
""",
    "average": """\
method = "average"
# 1.0 is the plain average; smaller values stay closer to the base.
alpha = 1.0
""",
}
_MANIFEST = """\
# {title}
#
#   esm-stream plan {method}.toml      what a merge would do, read and need; touches nothing
#   esm-stream merge {method}.toml     do it
#
# Paths are relative to this file.

[base]
model = "models/base"            # the model that every expert was fine-tuned from

# One block for each expert: the same architecture as the base, other weights.
{experts}
[calibration]
# The merge runs these inputs through the models to see which directions of the weights matter.
# A few are enough, and no labels are needed. The plain average looks at none.
samples = {samples}                     # inputs used per expert
seed = 0                         # which ones, if the file holds more

[merge]
{merge}
[output]
path = "merged-{method}"         # the merged model: an ordinary transformers directory

[run]
work = "merged-{method}.work"    # intermediate results; an interrupted merge goes on from here
"""
