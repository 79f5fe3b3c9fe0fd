"""The errors fgalign raises on purpose: one line that says where, what was expected, what came, what to do."""


class FgalignError(Exception):
    """Base of every error that fgalign raises on purpose; the command line prints it without a traceback."""


class InputError(FgalignError):
    """Data, configuration or a file is not what it has to be."""


class RecordError(InputError):
    """One record of a file is bad; the message starts with ``file:line``."""


class ConfigError(InputError):
    """A profile, a parameter or a method name is bad."""


class TrainingError(FgalignError):
    """Training cannot go on (a loss that is not finite, a prompt that leaves no room for a response)."""
