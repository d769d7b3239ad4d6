"""Options of a model: strings from the job file or the command line, read once and checked.

A module's build() wraps its dict in Options, reads every option it knows and ends with finish(),
which refuses what nobody has read. All complaints name the option, what it was and what would be
right; the exporter shows them and exits with status 2.
"""


class OptionError(ValueError):
    """An option that is missing, unknown, or has a value that makes no sense."""


class Options:
    """Typed view of a dict of strings. Every read removes the option from what finish() refuses."""

    def __init__(self, model, values):
        self._model = model
        self._values = dict(values)
        self._known = []

    def integer(self, name, default=None, minimum=1):
        text = self._take(name, default)
        try:
            value = int(text)
        except ValueError:
            raise self._error(name, text, f"an integer of at least {minimum}") from None
        if value < minimum:
            raise self._error(name, text, f"an integer of at least {minimum}")
        return value

    def integers(self, name, default=None, minimum=1):
        """A list, separated by commas; the empty string is the empty list."""
        text = self._take(name, default)
        wanted = f"integers of at least {minimum}, separated by commas"
        try:
            values = [int(part) for part in text.split(",")] if text.strip() else []
        except ValueError:
            raise self._error(name, text, wanted) from None
        if any(value < minimum for value in values):
            raise self._error(name, text, wanted)
        return values

    def numbers(self, name, default=None):
        """A list of finite real numbers, separated by commas."""
        text = self._take(name, default)
        try:
            values = [float(part) for part in text.split(",")] if text.strip() else []
        except ValueError:
            values = [float("nan")]
        if not all(abs(value) < float("inf") for value in values):
            raise self._error(name, text, "numbers separated by commas")
        return values

    def fraction(self, name, default=None):
        """A number in [0, 1)."""
        text = self._take(name, default)
        try:
            value = float(text)
        except ValueError:
            value = -1.0
        if not 0.0 <= value < 1.0:
            raise self._error(name, text, "a number in [0, 1)")
        return value

    def boolean(self, name, default=None):
        return self.choice(name, ("true", "false"), default) == "true"

    def choice(self, name, allowed, default=None):
        text = self._take(name, default)
        if text not in allowed:
            raise self._error(name, text, "one of " + ", ".join(allowed))
        return text

    def refuse(self, name, text, wanted):
        """Raises for a value that is wrong for a reason only the model knows."""
        raise self._error(name, text, wanted)

    def finish(self):
        """Call after the last read: raises for options that the model does not have."""
        unknown = sorted(set(self._values) - set(self._known))
        if unknown:
            raise OptionError(
                f"{self._model} has no option {', '.join(repr(name) for name in unknown)}; "
                f"it has {', '.join(self._known)}"
            )

    def _take(self, name, default):
        self._known.append(name)
        if name in self._values:
            return self._values[name]
        if default is None:
            # Said before the missing one: a misspelt name is the likelier mistake.
            raise OptionError(
                f"{self._model} needs option {name!r}; given were: "
                f"{', '.join(sorted(self._values)) or 'none'}"
            )
        return default

    def _error(self, name, text, wanted):
        return OptionError(f"{self._model}: option {name} is {text!r}; it must be {wanted}")
