"""``samfed`` and ``python -m pipeline``: run this project's own cli.py, whatever else has its name.

It is loaded by its place: beside this file in a wheel, one folder up in a clone. The search path,
on which another ``cli.py`` may come first, is not asked.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent


def main() -> None:
    """Run the command line."""
    path = next(path for path in (HERE / "cli.py", HERE.parent / "cli.py") if path.is_file())
    spec = importlib.util.spec_from_file_location("pipeline.cli", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    module.app(prog_name="samfed")


if __name__ == "__main__":
    main()
