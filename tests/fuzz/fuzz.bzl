"""Targets that are fuzzed."""

load("@rules_cc//cc:defs.bzl", "cc_binary", "cc_library", "cc_test")

def fuzz_target(name, deps):
    """A file NAME.cc that defines FuzzSeeds and FuzzOne (fuzz_target.h), with its two mains.

    Args:
      name: of the file. NAME_test tries seeds, the findings of the past (corpus/NAME-*) and some mutations; NAME_libfuzzer is for
        tests/fuzz/run.sh, which compiles with clang.
      deps: of the file.
    """
    cc_library(
        name = name,
        testonly = True,
        srcs = [name + ".cc"],
        deps = deps + [":fuzz_target_header"],
        alwayslink = True,
    )
    findings = native.glob(["corpus/" + name + "-*"], allow_empty = True)
    cc_test(
        name = name + "_test",
        size = "small",
        args = ["$(location %s)" % finding for finding in findings],
        data = findings,
        deps = [":" + name, ":regression_main"],
    )
    cc_binary(
        name = name + "_libfuzzer",
        testonly = True,
        tags = ["manual"],
        deps = [":" + name, ":libfuzzer_main"],
    )
