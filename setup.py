# SPDX-License-Identifier: Apache-2.0
"""Compiles csrc/ into vllm_kvcompress/_C.so where it can; all else about the package is in pyproject.toml.

VLLM_KVCOMPRESS_BUILD_CUDA: auto (default) compiles where nvcc and a CUDA build of torch are found, 1 compiles with any
torch or fails, 0 never compiles. CUDA_HOME names the toolkit, MAX_JOBS the compilers at a time, and NVCC_APPEND_FLAGS,
which nvcc reads itself, more flags.
"""

import gzip
import os
import re
import shutil
import site
import subprocess
import sys
import sysconfig
import tarfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.sdist import sdist
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
SWITCH = "VLLM_KVCOMPRESS_BUILD_CUDA"
MIN_NVCC = (12, 4)
MIN_TORCH = (2, 11)
"""Oldest torch the binary loads into, and the oldest headers it compiles with."""
ARCHITECTURE = "90a"
BUILDING = {"bdist_wheel", "editable_wheel", "build", "build_ext", "install", "develop"}


class Unavailable(Exception):
    """Why the extension cannot be compiled here."""


@dataclass(frozen=True)
class Toolchain:
    nvcc: Path
    torch: Path
    """Folder of the package torch, for its headers and libtorch.so"""


def find_torch(any_build: bool) -> Path:
    # pip's isolated builds hide the environment's packages from sys.path; its folders are looked at all the same, and
    # torch is not imported: it might need packages that are hidden.
    folders = [*sys.path, sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), site.getusersitepackages()]
    torch = next((Path(folder, "torch") for folder in folders if Path(folder, "torch", "version.py").is_file()), None)
    if torch is None:
        raise Unavailable(
            f"no torch in {sysconfig.get_path('purelib')} (install it first; builds isolated by other tools than pip "
            "need --no-build-isolation)"
        )
    text = (torch / "version.py").read_text(encoding="utf-8")
    version = re.search(r"^__version__ = '((\d+)\.(\d+)[^']*)'", text, re.MULTILINE)
    if version is None or (int(version[2]), int(version[3])) < MIN_TORCH:
        raise Unavailable(f"torch >= {dotted(MIN_TORCH)} is needed, {torch} is {version[1] if version else 'unknown'}")
    if not any_build and re.search(r"^cuda\b.*= None$", text, re.MULTILINE):
        raise Unavailable(f"torch {version[1]} is built without CUDA")
    if not (torch / "include" / "torch" / "csrc" / "stable" / "library.h").is_file():
        raise Unavailable(f"{torch} has no headers")
    return torch


def find_nvcc() -> Path:
    home = os.environ.get("CUDA_HOME")
    found = str(Path(home, "bin", "nvcc")) if home else shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    try:
        text = subprocess.run([found, "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        where = f"CUDA_HOME={home}" if home else "PATH and /usr/local/cuda"
        raise Unavailable(f"no working nvcc in {where}") from None
    release = re.search(r"release (\d+)\.(\d+)", text)
    if release is None or (int(release[1]), int(release[2])) < MIN_NVCC:
        raise Unavailable(f"nvcc >= {dotted(MIN_NVCC)} is needed, {found} is {release[0] if release else 'unknown'}")
    return Path(found)


def dotted(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))


def find_toolchain() -> Toolchain:
    """What compiles the extension.

    Raises:
        Unavailable: it shall not or cannot be compiled here, with the reason.
    """
    switch = os.environ.get(SWITCH, "auto")
    if switch not in ("0", "1", "auto"):
        raise SystemExit(f"{SWITCH} must be 0, 1 or auto, got {switch!r}")
    if switch == "0":
        raise Unavailable(f"{SWITCH}=0")
    try:
        if sys.platform != "linux":
            raise Unavailable(f"it runs on Linux, this is {sys.platform}")
        toolchain = Toolchain(find_nvcc(), find_torch(any_build=switch == "1"))
        if not shutil.which(os.environ.get("NVCC_CCBIN", "g++")):
            raise Unavailable("no C++ compiler: g++ in PATH, or NVCC_CCBIN")
        return toolchain
    except Unavailable as reason:
        if switch == "1" and BUILDING.intersection(sys.argv):
            raise SystemExit(f"{SWITCH}=1, but the CUDA decode kernel cannot be compiled: {reason}") from None
        raise


class BuildCuda(build_ext):
    """Compiles with nvcc into a plain shared library, which torch.ops.load_library loads: no Python in its name."""

    toolchain: Toolchain

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".so"

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        objects = Path(self.build_temp, "csrc")
        for folder in (objects, target.parent):
            folder.mkdir(parents=True, exist_ok=True)
        compile_flags = [
            "-O3",
            "-std=c++20",
            f"-gencode=arch=compute_{ARCHITECTURE},code=sm_{ARCHITECTURE}",
            "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall",
            f"-DTORCH_TARGET_VERSION={MIN_TORCH[0] << 56 | MIN_TORCH[1] << 48:#018x}",
            "-DUSE_CUDA",  # declares the stream's getter
            "-isystem",
            str(self.toolchain.torch / "include"),
        ]
        link_flags = ["-cudart", "static", "-L", str(self.toolchain.torch / "lib"), "-ltorch"]
        # libtorch.so holds nothing itself but stands for the parts of whichever torch is loaded: its name must be kept.
        link_flags += ["-Xlinker", "--no-as-needed"]
        # Symbols of the static CUDA runtime stay inside: torch's own runtime would answer for them otherwise.
        link_flags += ["-Xlinker", "--exclude-libs=ALL"]

        def compile_one(source: str) -> str:
            out = str(objects / f"{Path(source).name}.o")
            self.nvcc("-c", *compile_flags, source, "-o", out)
            return out

        jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
        with ThreadPoolExecutor(jobs) as pool:
            compiled = list(pool.map(compile_one, ext.sources))
        self.nvcc("-shared", *compiled, *link_flags, "-o", str(target))

    def nvcc(self, *arguments: str) -> None:
        command = [str(self.toolchain.nvcc), *arguments]
        print(*command, flush=True)
        if subprocess.run(command, cwd=ROOT).returncode:
            raise CompileError(f"nvcc failed, see above; {SWITCH}=0 installs without the CUDA decode kernel")


class Wheel(bdist_wheel):
    """The library speaks torch's stable C interface and none of Python's: one wheel for every Python."""

    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", super().get_tag()[2])


class SourceArchive(sdist):
    """From the same files the same bytes where SOURCE_DATE_EPOCH is set, as wheels are: setuptools' archive is not."""

    def make_archive(self, base_name, format, root_dir=None, base_dir=None, owner=None, group=None):
        epoch = os.environ.get("SOURCE_DATE_EPOCH")
        if epoch is None or format != "gztar":
            return super().make_archive(base_name, format, root_dir, base_dir, owner, group)

        def anonymous(member: tarfile.TarInfo) -> tarfile.TarInfo:
            member.mtime, member.uid, member.gid, member.uname, member.gname = int(epoch), 0, 0, "", ""
            member.mode = 0o755 if member.isdir() or member.mode & 0o100 else 0o644
            return member

        path = f"{base_name}.tar.gz"
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with (
            open(path, "wb") as file,
            gzip.GzipFile("", "wb", fileobj=file, mtime=int(epoch)) as stream,
            tarfile.open(fileobj=stream, mode="w") as archive,
        ):
            archive.add(Path(root_dir or ".", base_dir), base_dir, filter=anonymous)  # folders in order of names
        return path


def extensions() -> list[Extension]:
    try:
        BuildCuda.toolchain = find_toolchain()
    except Unavailable as reason:
        if BUILDING.intersection(sys.argv):
            print(
                f"vllm-kvcompress: without the CUDA decode kernel ({reason}); for it, install once more where "
                f"torch and a CUDA toolkit >= {dotted(MIN_NVCC)} are, with {SWITCH}=1",
                file=sys.stderr,
            )
        return []
    csrc = ROOT / "csrc"
    sources = sorted(str(path.relative_to(ROOT)) for pattern in ("*.cpp", "*.cu") for path in csrc.glob(pattern))
    return [Extension("vllm_kvcompress._C", sources)]


if __name__ == "__main__":
    setup(ext_modules=extensions(), cmdclass={"build_ext": BuildCuda, "bdist_wheel": Wheel, "sdist": SourceArchive})
