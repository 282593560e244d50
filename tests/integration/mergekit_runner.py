"""Runs configurations with mergekit; started by its own interpreter, which need not have ours.

python mergekit_runner.py CONFIG_DIRECTORY OUTPUT_DIRECTORY
"""

import sys
from pathlib import Path

import yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions


def main() -> None:
    configs, outputs = map(Path, sys.argv[1:])
    for path in sorted(configs.glob("*.yml")):
        config = MergeConfiguration.model_validate(yaml.safe_load(path.read_text()))
        options = MergeOptions(copy_tokenizer=False, write_model_card=False, quiet=True)
        run_merge(config, str(outputs / path.stem), options=options)


if __name__ == "__main__":
    main()
