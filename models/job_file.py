"""Reads what a job file says about its model, for `export.py --check`.

Only the text format itself is understood here: fields, nested messages, lists, strings, numbers. Whether
a field exists and its value makes sense is `codistillctl validate`'s business.
"""

import re
from typing import NamedTuple

_TOKEN = re.compile(
    r"""\s+|\#[^\n]*"""
    r"""|(?P<string>"(?:[^"\\\n]|\\.)*"|'(?:[^'\\\n]|\\.)*')"""
    r"""|(?P<word>[-+A-Za-z0-9_.]+)"""
    r"""|(?P<mark>[{}<>\[\]:,;])"""
)
_SHORT = {"DT_FLOAT": "FLOAT", "DT_INT64": "INT64", "DT_INT32": "INT32", "DT_UINT8": "UINT8"}


class JobFileError(Exception):
    """A job file that cannot be read, with file and line."""


class Input(NamedTuple):
    name: str
    dtype: str  # FLOAT, INT64, ...: as forward() takes it
    shape: tuple  # of one example, with the dim of its rows where it has an embedding table


class State(NamedTuple):
    name: str
    shape: tuple  # with -1 for the batch


class Model(NamedTuple):
    module: str
    options: dict
    inputs: list
    states: list
    num_outputs: int
    bf16: bool  # training.precision is BF16


def _tokens(text, path):
    position, tokens = 0, []
    while position < len(text):
        match = _TOKEN.match(text, position)
        line = text.count("\n", 0, position) + 1
        if match is None:
            raise JobFileError(f"{path}:{line}: {text[position]!r} has no place here")
        if match.lastgroup:
            tokens.append((match.lastgroup, match.group(match.lastgroup), line))
        position = match.end()
    return tokens


class _Parser:
    """A message is a dict of lists: field -> its values, in order; a value is text or a dict."""

    def __init__(self, text, path):
        self._tokens = _tokens(text, path)
        self._path = path
        self._next = 0

    def message(self, closing=None):
        fields = {}
        while not self._at_end() and self._peek() != closing:
            if self._peek() in (",", ";"):
                self._next += 1
                continue
            kind, name, _ = self._take()
            if kind != "word":
                self._fail("a field's name was expected")
            has_colon = self._peek() == ":"
            if has_colon:
                self._next += 1
            values = fields.setdefault(name, [])
            if self._peek() == "[":
                self._next += 1
                while self._peek() != "]":
                    values.append(self._value())
                    if self._peek() == ",":
                        self._next += 1
                self._next += 1
            else:
                values.append(self._value())
        if closing is not None:
            if self._at_end():
                self._fail(f"{closing} is missing")
            self._next += 1
        return fields

    def _value(self):
        kind, text, _ = self._take()
        if text in ("{", "<"):
            return self.message("}" if text == "{" else ">")
        if kind == "string":
            value = _unquote(text)
            while not self._at_end() and self._tokens[self._next][0] == "string":
                value += _unquote(self._take()[1])
            return value
        if kind != "word":
            self._fail("a value was expected")
        return text

    def _at_end(self):
        return self._next >= len(self._tokens)

    def _peek(self):
        return None if self._at_end() else self._tokens[self._next][1]

    def _take(self):
        if self._at_end():
            self._fail("the file ends too early")
        self._next += 1
        return self._tokens[self._next - 1]

    def _fail(self, what):
        line = self._tokens[min(self._next, len(self._tokens)) - 1][2] if self._tokens else 1
        raise JobFileError(f"{self._path}:{line}: {what}; `codistillctl validate` says more")


def _unquote(text):
    return re.sub(r"\\(.)", r"\1", text[1:-1])


def parse(text, path="job"):
    return _Parser(text, path).message()


def read_model(path):
    """The Model of a job file with model.export. JobFileError says what it lacks."""
    try:
        with open(path, encoding="utf-8") as file:
            job = parse(file.read(), path)
    except OSError as error:
        raise JobFileError(f"{path}: {error.strerror}") from None

    def one(message, field, default=None):
        values = message.get(field, [])
        if not values and default is None:
            raise JobFileError(f"{path}: {field} is missing; `codistillctl validate` says more")
        return values[-1] if values else default

    try:
        model = one(job, "model")
        export = one(model, "export")
        dims = {
            one(table, "name"): int(one(table, "dim")) for table in model.get("embedding_tables", [])
        }
        inputs = []
        for entry in model.get("inputs", []):
            dtype = one(entry, "dtype", "DT_FLOAT")
            shape = tuple(int(size) for size in entry.get("shape", []))
            table = one(entry, "embedding_table", "")
            if table:
                if table not in dims:
                    raise JobFileError(f"{path}: model.embedding_tables has no table {table!r}")
                dtype, shape = "DT_FLOAT", (*shape, dims[table])
            inputs.append(Input(one(entry, "name"), _SHORT.get(dtype, dtype), shape))
        states = [
            State(one(state, "name"), tuple(int(size) for size in state.get("shape", [])))
            for state in model.get("states", [])
        ]
        options = {one(option, "key"): one(option, "value", "") for option in export.get("options", [])}
        training = one(job, "training", {})
        return Model(
            one(export, "module"),
            options,
            inputs,
            states,
            int(one(model, "num_outputs")),
            one(training, "precision", "FP32") == "BF16",
        )
    except (AttributeError, TypeError, ValueError) as error:
        raise JobFileError(f"{path}: {error}; `codistillctl validate` says more") from None
