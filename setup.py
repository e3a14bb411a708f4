"""The one thing that pyproject.toml can't say: an extension module whose absence is no failure.

Without a compiler, cffi or liburing the package still installs; the simulator needs none of them, and the real ring names what is
missing when it is opened (`ublk_trio.real.native`). Set ``UBLK_TRIO_REQUIRE_NATIVE=1`` to make that a failure, as CI does.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import BaseError

sys.path.insert(0, str(Path(__file__).resolve().parent / "native"))
import build_native


class OptionalNative(build_ext):
    """Builds the native part, or says in one line why not."""

    def build_extension(self, ext: Extension) -> None:
        compiler = list(self.compiler.compiler_so)
        try:
            build_native.check(compiler)
            generated = Path(self.build_temp, "_native.c")
            build_native.generate(generated)
            ext.sources = [str(generated), *ext.sources]
            ext.extra_link_args = build_native.link_args(compiler)
            super().build_extension(ext)
        except (build_native.NotBuildableError, BaseError, OSError) as error:
            if os.environ.get("UBLK_TRIO_REQUIRE_NATIVE") == "1":
                raise
            print(f"ublk_trio: the native part was NOT built: {error}: {build_native.MEND}", file=sys.stderr)

    def copy_extensions_to_source(self) -> None:
        # An editable install copies what was built next to its package; here that may be nothing.
        self.extensions = [
            ext for ext in self.extensions if Path(self.get_ext_fullpath(ext.name)).exists() or self._built(ext)
        ]
        super().copy_extensions_to_source()

    def _built(self, ext: Extension) -> bool:
        return Path(self.build_lib, self.get_ext_filename(self.get_ext_fullname(ext.name))).exists()

    def get_outputs(self) -> list[str]:
        return [output for output in super().get_outputs() if Path(output).exists()]

    def get_output_mapping(self) -> dict[str, str]:
        return {built: source for built, source in super().get_output_mapping().items() if Path(built).exists()}


setup(
    ext_modules=[
        Extension(
            build_native.MODULE,
            sources=["native/ring.c", "native/worker.c"],
            depends=["native/ring.h", "native/worker.h", "native/ublk_abi.h"],
            include_dirs=["native"],
            extra_compile_args=build_native.COMPILE_ARGS,
        )
    ],
    cmdclass={"build_ext": OptionalNative},
)
