"""Finds libtorch: Debian's by default, any other through the environment variable LIBTORCH.

LIBTORCH names an unpacked libtorch, the folder that holds `include` and `lib`, as a wheel of PyTorch does in its folder `torch`. It must have
been built with the C++11 ABI, as Debian's libraries are.

`@local_torch//:defs.bzl` has TORCH_HAS_CUDA: whether it can compute on NVIDIA GPUs.
"""

_DEBIAN_API = "/usr/include/torch/csrc/api/include"

_DEBIAN = """
cc_library(
    name = "torch",
    hdrs = glob(["api/**/*.h"]),
    # The other headers lie in /usr/include.
    includes = ["api"],
    linkopts = ["-Wl,--as-needed", "-ltorch", "-ltorch_cpu", "-lc10"],
    visibility = ["//visibility:public"],
)
"""

_OTHER = """
cc_library(
    name = "torch",
    hdrs = glob([
        "include/**/*.h",
        "include/**/*.hpp",
        "include/**/*.cuh",
    ]),
    includes = [
        "include",
        "include/torch/csrc/api/include",
    ],
    linkopts = [
        "-L{lib}",
        "-Wl,-rpath,{lib}",
        # Its libraries find those of CUDA (cuBLAS, cuDNN, ...) where the binary runs. Where it is built they need not be.
        "-Wl,--allow-shlib-undefined",
        # Back ends register themselves when loaded, so they are linked though nothing names them.
        "-Wl,--no-as-needed",
        {libraries}
        "-Wl,--as-needed",
    ],
    visibility = ["//visibility:public"],
)
"""

# A libtorch brings headers of libraries that it has linked into itself. Those of protobuf are of another version than Debian's, whose library
# all else is linked with.
_FOREIGN_HEADERS = ["google", "pybind11"]

_NONE = """
genrule(
    name = "missing",
    outs = ["missing.h"],
    cmd = "echo '{why}' >&2; exit 1",
)

cc_library(
    name = "torch",
    hdrs = ["missing.h"],
    visibility = ["//visibility:public"],
)
"""

def _local_torch_impl(ctx):
    root = ctx.os.environ.get("LIBTORCH", "")
    has_cuda = False
    if root:
        if not ctx.path(root + "/lib/libtorch_cpu.so").exists:
            fail("LIBTORCH is %s, but %s/lib/libtorch_cpu.so does not exist; it must name an unpacked libtorch" % (root, root))
        for entry in ctx.path(root + "/include").readdir():
            if entry.basename not in _FOREIGN_HEADERS:
                ctx.symlink(entry, "include/" + entry.basename)
        present = [
            library
            for library in ["torch", "torch_cpu", "torch_cuda", "c10", "c10_cuda"]
            if ctx.path("%s/lib/lib%s.so" % (root, library)).exists
        ]
        ctx.file("BUILD.bazel", _OTHER.format(
            lib = root + "/lib",
            libraries = " ".join(['"-l%s",' % library for library in present]),
        ))
        has_cuda = "torch_cuda" in present
    elif ctx.path(_DEBIAN_API).exists:
        ctx.symlink(_DEBIAN_API, "api")
        ctx.file("BUILD.bazel", _DEBIAN)
    else:
        ctx.file("BUILD.bazel", _NONE.format(why = "no libtorch: install libtorch-dev (deploy/install_deps.sh) or set LIBTORCH"))
    ctx.file("defs.bzl", "TORCH_HAS_CUDA = %s\n" % has_cuda)

local_torch = repository_rule(
    implementation = _local_torch_impl,
    environ = ["LIBTORCH"],
    local = True,
)
