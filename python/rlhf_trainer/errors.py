"""The one exception of the trainer that a user, not a programmer, has to act on."""


class UsageError(ValueError):
    """Wrong input: a configuration, a data set, a model or a folder. The command line prints it without a traceback."""
