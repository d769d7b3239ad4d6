"""Python tests under /usr/bin/python3, the interpreter that Debian's python3-torch and python3-numpy belong to."""

def py_script_test(name, src, deps = [], data = [], **kwargs):
    """A test that runs the unittest cases of one Python file.

    Modules are imported by their path from the root of the repository (`from models import mlp`); the working directory is that
    root inside the test's own file tree.

    Args:
      name: of the test.
      src: the Python file with the unittest.TestCase classes.
      deps: Python files it imports.
      data: other files it reads.
      **kwargs: as for sh_test (size, tags, env...).
    """
    native.sh_test(
        name = name,
        srcs = ["//third_party/bazel:py_test.sh"],
        args = ["$(rootpath %s)" % src],
        data = [src, "//third_party/bazel:unittest_main.py"] + deps + data,
        **kwargs
    )
