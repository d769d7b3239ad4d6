"""Protocol buffers and gRPC services as C++ libraries, by Debian's protoc."""

load("@rules_cc//cc:defs.bzl", "cc_library")

_PROTOC = "/usr/bin/protoc"
_GRPC_PLUGIN = "/usr/bin/grpc_cpp_plugin"

def codistill_proto_library(name, srcs, deps = [], grpc = False, visibility = None):
    """A cc_library of the messages, and with `grpc` the services, of `srcs`.

    Files import one another by their path from the root of the repository (`proto/job.proto`); C++ includes them the same way
    (`proto/job.pb.h`, `proto/control.grpc.pb.h`).

    Args:
      name: of the cc_library.
      srcs: .proto files of this package.
      deps: other codistill_proto_library targets whose files these import.
      grpc: also generate the services.
      visibility: of the cc_library.
    """
    stems = [src[:-len(".proto")] for src in srcs]
    headers = [stem + ".pb.h" for stem in stems]
    sources = [stem + ".pb.cc" for stem in stems]
    flags = ["--cpp_out=$(GENDIR)"]
    if grpc:
        headers += [stem + ".grpc.pb.h" for stem in stems]
        sources += [stem + ".grpc.pb.cc" for stem in stems]
        flags += ["--grpc_out=$(GENDIR)", "--plugin=protoc-gen-grpc=" + _GRPC_PLUGIN]

    native.filegroup(
        name = name + "_protos",
        srcs = srcs + [dep + "_protos" for dep in deps],
        visibility = visibility,
    )
    native.genrule(
        name = name + "_gen",
        srcs = [":" + name + "_protos"],
        outs = headers + sources,
        cmd = " ".join([_PROTOC, "-I."] + flags + [native.package_name() + "/" + src for src in srcs]),
        message = "Generating C++ from",
        visibility = ["//visibility:private"],
    )
    cc_library(
        name = name,
        srcs = sources,
        hdrs = headers,
        # Generated: its warnings are not ours.
        copts = ["-w"],
        visibility = visibility,
        deps = deps + (["//third_party:grpc"] if grpc else ["//third_party:protobuf"]),
    )
