"""Builds the optional extension from `native/`: three C functions in a plain shared library, loaded by ctypes.

It uses neither the Python C API nor the C library, so one file serves all Python versions and needs no headers. Without
a compiler the installation succeeds without it (`rock doctor` reports that). ROCK_NO_EXTENSIONS=1 leaves it out.
Everything else about the package is in pyproject.toml.
"""

from __future__ import annotations

import os
import platform
import sys

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

LIBRARY = "rock.guest.init.librocknative"  # native.py loads it from its own folder
SOURCES = ["native/program.c", "native/zygote.c", "native/sharing.c"]
COMPILE = [
    "-std=gnu11", "-O2", "-g0", "-fPIC", "-Wall", "-Wextra",
    "-ffreestanding", "-fvisibility=hidden",
    "-fno-stack-protector",  # needs the C library, and thread-local storage that a child does not have
    "-fno-lto", "-fno-strict-aliasing", "-fno-asynchronous-unwind-tables", "-U_FORTIFY_SOURCE",
]  # fmt: skip
LINK = ["-nostdlib", "-fno-lto", "-Wl,--no-undefined", "-Wl,-z,relro,-z,now,-z,noexecstack", "-Wl,-s"]


class build_library(build_ext):
    """A shared library with a name of its own, not that of a Python module of one version."""

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".so"


class platform_wheel(bdist_wheel):
    """Tagged for the platform and for every Python 3; "any" when the extension was left out."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


def extensions() -> list[Extension]:
    here = sys.platform == "linux" and platform.machine() in ("x86_64", "aarch64")
    if not here or os.environ.get("ROCK_NO_EXTENSIONS"):
        return []
    return [Extension(LIBRARY, SOURCES, depends=["native/syscall.h", "native/child.h"], extra_compile_args=COMPILE,
                      extra_link_args=LINK, optional=True)]  # fmt: skip


if __name__ == "__main__":
    setup(ext_modules=extensions(), cmdclass={"build_ext": build_library, "bdist_wheel": platform_wheel})
