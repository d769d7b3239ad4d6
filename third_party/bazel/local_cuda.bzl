"""Finds the CUDA Toolkit: CUDA_HOME, or /usr/local/cuda.

Where there is none the repository still loads, and only building a CUDA target fails, saying what is missing.
"""

_FOUND = """
load("@codistill//third_party/bazel:cuda.bzl", "cuda_toolkit")

cuda_toolkit(
    name = "toolkit",
    root = "{root}",
    visibility = ["//visibility:public"],
)

cc_library(
    name = "headers",
    hdrs = glob([
        "include/**/*.h",
        "include/**/*.hpp",
        "include/**/*.cuh",
        "include/**/*.inl",
    ], exclude = [
        "include/cccl/**",
        "include/cudnn*",
    ]),
    includes = ["include"],
    visibility = ["//visibility:public"],
)

cc_library(
    name = "cudart_static",
    srcs = ["lib64/libcudart_static.a"],
    linkopts = ["-ldl", "-lrt", "-lpthread"],
    visibility = ["//visibility:public"],
    deps = [":headers"],
)
"""

_MISSING = """
load("@codistill//third_party/bazel:cuda.bzl", "cuda_toolkit")

cuda_toolkit(
    name = "toolkit",
    root = "",
    visibility = ["//visibility:public"],
)

[genrule(
    name = "missing_" + kind,
    outs = [out],
    cmd = "echo 'no CUDA Toolkit: neither CUDA_HOME nor /usr/local/cuda holds bin/nvcc' >&2; exit 1",
) for kind, out in [("header", "cuda_runtime.h"), ("library", "libcudart_static.a")]]

cc_library(
    name = "headers",
    hdrs = ["cuda_runtime.h"],
    visibility = ["//visibility:public"],
)

cc_library(
    name = "cudart_static",
    srcs = ["libcudart_static.a"],
    visibility = ["//visibility:public"],
    deps = [":headers"],
)
"""

def _local_cuda_impl(ctx):
    root = ctx.os.environ.get("CUDA_HOME", "") or "/usr/local/cuda"
    if ctx.path(root + "/bin/nvcc").exists:
        ctx.symlink(root + "/include", "include")
        ctx.symlink(root + "/lib64", "lib64")
        ctx.file("BUILD.bazel", _FOUND.format(root = root))
    else:
        ctx.file("BUILD.bazel", _MISSING)

local_cuda = repository_rule(
    implementation = _local_cuda_impl,
    environ = ["CUDA_HOME"],
    local = True,
)
