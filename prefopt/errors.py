"""The one exception that means "the input is wrong", as opposed to "the program is wrong"."""


class InputError(ValueError):
    """Bad input: data, a file, a model folder, a configuration.

    The message is one sentence that says what was wrong, where, and what to do. The command line
    prints it without a traceback and exits with code 2.
    """
