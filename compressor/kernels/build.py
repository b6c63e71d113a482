"""Compiles the CPU kernels while the package is installed, and records the result for `compress-model doctor`.

Only setuptools reads it, in an environment without other packages. A missing or failing compiler does not stop the
installation: the extension is optional, and the record has the reason.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from setuptools import Extension
from setuptools.command.build_ext import build_ext

FLAGS = ["-std=c++17", "-O3", "-ffp-contract=off", "-fvisibility=hidden", "-pthread", "-Wno-uninitialized"]
FLAGS += ["-Wno-maybe-uninitialized"]  # for gcc 12's AVX-512 header
RECORD = "_cpu_build.txt"


class BuildKernels(build_ext):
    """build_ext with the flags of the kernels and a record beside the extension."""

    def build_extension(self, ext: Extension) -> None:
        if self.compiler.compiler_type == "unix":
            ext.extra_compile_args = FLAGS
            ext.extra_link_args = ["-pthread"]
        try:
            self._compile_at_once()
            super().build_extension(ext)
            command = " ".join([*getattr(self.compiler, "compiler_cxx", ["c++"])[:1], *ext.extra_compile_args])
            outcome = f"built with: {command}"
        except Exception as error:
            outcome = f"not built: {type(error).__name__}: {error}"
            raise  # setuptools makes it a warning, since the extension is optional
        finally:
            self._record(ext, outcome)

    def _compile_at_once(self) -> None:
        """Have the compiler work on as many sources at once as there are processors."""
        compile_all = self.compiler.compile

        def compile_each(sources: list[str], **options: Any) -> list[str]:
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                made = pool.map(lambda source: compile_all([source], **options), sources)
                return [name for objects in made for name in objects]

        self.compiler.compile = compile_each

    def _record(self, ext: Extension, outcome: str) -> None:
        folder = Path(self.build_lib, *ext.name.split(".")[:-1])
        if self.editable_mode or self.inplace:
            folder = Path(self.get_finalized_command("build_py").get_package_dir(ext.name.rpartition(".")[0]))
        folder.mkdir(parents=True, exist_ok=True)
        (folder / RECORD).write_text(outcome + "\n")
