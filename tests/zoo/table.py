"""The docs' table of architectures, made from the proofs' own results.

python tests/zoo/table.py          # proves all of them and writes the page, in some minutes
python tests/zoo/table.py --keep   # proves those that the page does not have
"""

import argparse
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch
import transformers
from architectures import GROUPS
from proof import Row, prove

PAGE = Path(__file__).resolve().parents[2] / "docs" / "how-it-works" / "architectures.md"
HEAD = """# Architectures

Every architecture below passed the same proof, with transformers {transformers} and torch {torch}.
A tiny model with random numbers in every parameter was saved in several shards, two experts of it
were merged, and their streamed forward was held against the model that `from_pretrained` gives, on
the same samples of several lengths, without a key/value cache, in one thread. Outputs of all blocks
are equal bit for bit. Second moments equal, bit for bit, those of what torch's kernels multiply
each matrix with (but for Zamba2, whose blocks share weights: there the order of the sums differs).
No stored tensor is read twice, except by several parameters that share it.
Configurations and proof are in `tests/zoo`; some run with every test run, all of them with
`pytest -m "slow or not slow" tests/zoo`.

The mode is chosen by [checks](forward.md), never by a model's name, and so are the matrices. That
an architecture is not listed says nothing: the plan tells what will be done with any model.

{modes}

*Matrices* are those merged with moments of their inputs (`targets = "all"`), for a mixture those of
every expert. Of the *other tensors* only those of two or more dimensions are listed, with the
reason; they are averaged. *Read* is what one expert's forward reads of the bytes stored: heads are
not read, embeddings only row by row.
"""
COMMAND = """
Made by `python tests/zoo/table.py`.
"""
COLUMNS = "| architecture | class | mode | because | matrices | other tensors | read |"
RULE = "|---|---|---|---|---|---|---|"
MEANING = {
    "chain": "a block needs its predecessor's output alone",
    "replay": "the forward is run again for every block, with stored outputs of earlier ones",
    "resident": "one pass for each expert; all samples wait at each block until it is loaded",
}


def cells(name: str, row: Row) -> str:
    """One line of the table."""
    hooked = str(row.matrices)
    others = "; ".join(
        f"{why}: {', '.join(f'`{n}`' for n in names)}" for why, names in row.others.items()
    )
    why = row.why.replace("|", "/") or "nothing else is needed"
    share = f"{100 * row.read / row.stored:.0f} %"
    return f"| {name} | `{row.model}` | {row.mode} | {why} | {hooked} | {others} | {share} |"


def lines_of(page: Path) -> dict[str, str]:
    """Lines of the page's tables by architecture."""
    if not page.is_file():
        return {}
    rows = [line for line in page.read_text(encoding="utf-8").splitlines() if line[:2] == "| "]
    found = {row.split(" | ")[0].removeprefix("| "): row for row in rows}
    found.pop("architecture", None)
    return found


def write(page: Path, lines: dict[str, str]) -> None:
    """The page, with a table for each group."""
    modes = Counter(line.split(" | ")[2] for line in lines.values())
    text = [
        HEAD.format(
            transformers=transformers.__version__,
            torch=torch.__version__.partition("+")[0],
            modes="\n".join(f"- *{m}* ({modes[m]}): {MEANING[m]}" for m in MEANING),
        ).rstrip()
    ]
    for title, group in GROUPS.items():
        text += ["", f"## {title}", "", COLUMNS, RULE, *(lines[n] for n in group if n in lines)]
    page.write_text("\n".join(text) + "\n" + COMMAND, encoding="utf-8")


def main() -> None:
    """Prove all architectures and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keep", action="store_true")
    keep = parser.parse_args().keep
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    lines, failed = lines_of(PAGE) if keep else {}, []
    for name, architecture in (item for group in GROUPS.values() for item in group.items()):
        if name in lines:
            continue
        started = time.process_time()
        with tempfile.TemporaryDirectory() as folder:
            try:
                lines[name] = cells(name, prove(architecture, Path(folder)))
            except Exception as error:  # noqa: BLE001 - all failures are told at the end
                failed.append(f"{name}: {type(error).__name__}: {str(error).splitlines()[0]}")
                print(failed[-1], flush=True)
                continue
        write(PAGE, lines)
        print(f"{lines[name]} {time.process_time() - started:.1f} s", flush=True)
    sys.exit("\n".join(failed))


if __name__ == "__main__":
    main()
