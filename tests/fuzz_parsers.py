"""Feed parsers for as long as one likes, guided by coverage; needs `pip install atheris`.

python tests/fuzz_parsers.py header [-max_total_time=3600] [CORPUS]
"""

import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["esm_stream"]):
    from parsers import TARGETS, feed


def main() -> None:
    """Fuzz the target that is named."""
    name = sys.argv.pop(1)
    if name not in TARGETS:
        raise SystemExit(f"no target '{name}': {', '.join(TARGETS)}")
    folder = Path(tempfile.mkdtemp())
    atheris.Setup(sys.argv, lambda data: feed(name, folder, data) and None)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
