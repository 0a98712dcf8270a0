"""Puts cli.py into the wheel as pipeline/cli.py: a top-level ``cli`` would collide with others."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithCli(build_py):
    """The packages, and cli.py inside of ``pipeline``; a clone runs it from where it lies."""

    def run(self) -> None:
        """Copy the modules to the build folder."""
        super().run()
        if not self.editable_mode:
            self.copy_file("cli.py", str(Path(self.build_lib, "pipeline", "cli.py")))


setup(cmdclass={"build_py": BuildWithCli})
