"""CUDA sources as libraries, through nvcc.

A cuda_library is built only with --config=cuda; without it the target counts as incompatible, so `bazel test //...` leaves it out and nothing
of the CUDA Toolkit is needed. C++ that has a CUDA path chooses it so:

    deps = [...] + select({
        "//third_party:cuda_enabled": ["//cuda:loss"],
        "//conditions:default": [],
    }),
    defines = select({
        "//third_party:cuda_enabled": ["CODISTILL_CUDA=1"],
        "//conditions:default": [],
    }),
"""

load("@local_torch//:defs.bzl", "TORCH_HAS_CUDA")
load("@rules_cc//cc:defs.bzl", "cc_binary", "cc_library", "cc_test")

def with_cuda_torch(yes, no = []):
    """What code that needs both CUDA and a libtorch for it adds to a target.

    Args:
      yes: with --config=cuda, where LIBTORCH names a libtorch for CUDA.
      no: else, so that //cuda/... can be built with Debian's libtorch.

    Returns:
      one of them.
    """
    if not TORCH_HAS_CUDA:
        return no
    return select({
        "//third_party:cuda_enabled": yes,
        "//conditions:default": no,
    })

CudaToolkitInfo = provider(
    doc = "Where the CUDA Toolkit of this machine is.",
    fields = {"root": "its folder; empty when there is none"},
)

def _cuda_toolkit_impl(ctx):
    return [CudaToolkitInfo(root = ctx.attr.root)]

cuda_toolkit = rule(
    implementation = _cuda_toolkit_impl,
    attrs = {"root": attr.string(doc = "folder with bin/nvcc; empty when there is none")},
)

# Code for the generations in use, and PTX that later ones compile for themselves.
_ARCHITECTURES = [
    "arch=compute_80,code=sm_80",
    "arch=compute_90,code=sm_90",
    "arch=compute_100,code=sm_100",
    "arch=compute_100,code=compute_100",
]

# Incompatible unless --config=cuda: no platform has this constraint value.
CUDA_ONLY = select({
    "//third_party:cuda_enabled": [],
    "//conditions:default": ["//third_party:cuda_needed"],
})

_NO_TOOLKIT = "no CUDA Toolkit: neither CUDA_HOME nor /usr/local/cuda holds bin/nvcc"

def _nvcc_objects_impl(ctx):
    root = ctx.attr._toolkit[CudaToolkitInfo].root
    merged = cc_common.merge_cc_infos(cc_infos = [dep[CcInfo] for dep in ctx.attr.deps]).compilation_context
    debug = ctx.var["COMPILATION_MODE"] == "dbg"

    flags = ["-std=c++17", "-Xcompiler", "-fPIC", "-Xcompiler", "-Wall", "-Xcompiler", "-Wextra"]
    # Extended lambdas and constexpr functions of the standard library on the device.
    flags += ["--extended-lambda", "--expt-relaxed-constexpr"]
    flags += ["-O0", "-g", "-G"] if debug else ["-O3", "-lineinfo"]
    for architecture in _ARCHITECTURES:
        flags += ["-gencode", architecture]
    if ctx.attr.werror:
        flags += ["-Werror", "all-warnings"]
    include_flags = ["-I."]
    include_flags += ["-I" + folder for folder in merged.quote_includes.to_list()]
    include_flags += ["-I" + folder for folder in merged.includes.to_list()]
    for folder in merged.system_includes.to_list():
        include_flags += ["-isystem", folder]
    define_flags = ["-D" + define for define in merged.defines.to_list()]

    objects = []
    for src in ctx.files.srcs:
        stem = src.basename[:-len(src.extension) - 1]
        object = ctx.actions.declare_file("_cuda/%s/%s.pic.o" % (ctx.label.name, stem))
        arguments = flags + include_flags + define_flags + ctx.attr.copts + ["-c", src.path, "-o", object.path]
        inputs = depset([src] + ctx.files.hdrs, transitive = [merged.headers])
        if root:
            ctx.actions.run(
                executable = root + "/bin/nvcc",
                arguments = arguments,
                inputs = inputs,
                outputs = [object],
                mnemonic = "CudaCompile",
                progress_message = "Compiling with nvcc " + src.short_path,
                # nvcc looks for the host compiler on the path.
                env = {"PATH": "/usr/local/bin:/usr/bin:/bin"},
            )
        else:
            ctx.actions.run_shell(
                command = "echo '%s' >&2; exit 1" % _NO_TOOLKIT,
                inputs = inputs,
                outputs = [object],
                mnemonic = "CudaCompile",
            )
        objects.append(object)
    return [DefaultInfo(files = depset(objects))]

_nvcc_objects = rule(
    implementation = _nvcc_objects_impl,
    attrs = {
        "srcs": attr.label_list(allow_files = [".cu"]),
        "hdrs": attr.label_list(allow_files = [".h", ".cuh"]),
        "deps": attr.label_list(providers = [CcInfo]),
        "copts": attr.string_list(),
        "werror": attr.bool(),
        "_toolkit": attr.label(default = "@local_cuda//:toolkit"),
    },
)

def cuda_library(name, srcs, hdrs = [], deps = [], copts = [], tags = [], **kwargs):
    """A cc_library of .cu files, linked with the static CUDA runtime.

    Args:
      name: of the cc_library.
      srcs: .cu files.
      hdrs: headers; .cu files and dependents see them, so they include <cuda_runtime.h> only where dependents may need the Toolkit too.
      deps: cc_library or cuda_library targets.
      copts: further options of nvcc.
      tags: of all targets made.
      **kwargs: as for cc_library (visibility, testonly...).
    """
    inherited = {key: kwargs[key] for key in ["testonly"] if key in kwargs}
    _nvcc_objects(
        name = name + "_objects",
        srcs = srcs,
        hdrs = hdrs,
        copts = copts,
        deps = deps + ["@local_cuda//:headers"],
        tags = tags,
        target_compatible_with = CUDA_ONLY,
        visibility = ["//visibility:private"],
        werror = select({
            "//third_party:cuda_werror": True,
            "//conditions:default": False,
        }),
        **inherited
    )
    cc_library(
        name = name,
        srcs = [":" + name + "_objects"],
        hdrs = hdrs,
        tags = tags,
        target_compatible_with = CUDA_ONLY,
        deps = deps + ["@local_cuda//:cudart_static"],
        **kwargs
    )

def cuda_test(name, tags = [], **kwargs):
    """A cc_test that needs a GPU: built with --config=cuda, run where there is one (tag `gpu`)."""
    cc_test(
        name = name,
        tags = tags + ["gpu"],
        target_compatible_with = CUDA_ONLY,
        **kwargs
    )

def cuda_binary(name, **kwargs):
    """A cc_binary, such as a benchmark, built only with --config=cuda."""
    cc_binary(
        name = name,
        target_compatible_with = CUDA_ONLY,
        **kwargs
    )
