"""Finds libtorch: Debian's by default, any other through the environment variable LIBTORCH.

LIBTORCH names an unpacked libtorch, the folder that holds `include` and `lib`. It must have been built with the C++11 ABI, as Debian's
libraries are.
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
        "libtorch/include/**/*.h",
        "libtorch/include/**/*.hpp",
        "libtorch/include/**/*.cuh",
    ]),
    includes = [
        "libtorch/include",
        "libtorch/include/torch/csrc/api/include",
    ],
    linkopts = [
        "-L{lib}",
        "-Wl,-rpath,{lib}",
        # Back ends register themselves when loaded, so they are linked though nothing names them.
        "-Wl,--no-as-needed",
        {libraries}
        "-Wl,--as-needed",
    ],
    visibility = ["//visibility:public"],
)
"""

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
    if root:
        if not ctx.path(root + "/lib/libtorch_cpu.so").exists:
            fail("LIBTORCH is %s, but %s/lib/libtorch_cpu.so does not exist; it must name an unpacked libtorch" % (root, root))
        ctx.symlink(root, "libtorch")
        present = [
            library
            for library in ["torch", "torch_cpu", "torch_cuda", "c10", "c10_cuda"]
            if ctx.path("%s/lib/lib%s.so" % (root, library)).exists
        ]
        ctx.file("BUILD.bazel", _OTHER.format(
            lib = root + "/lib",
            libraries = " ".join(['"-l%s",' % library for library in present]),
        ))
    elif ctx.path(_DEBIAN_API).exists:
        ctx.symlink(_DEBIAN_API, "api")
        ctx.file("BUILD.bazel", _DEBIAN)
    else:
        ctx.file("BUILD.bazel", _NONE.format(why = "no libtorch: install libtorch-dev (deploy/install_deps.sh) or set LIBTORCH"))

local_torch = repository_rule(
    implementation = _local_torch_impl,
    environ = ["LIBTORCH"],
    local = True,
)
