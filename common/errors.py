"""What a script fails by: bad input, told in one line, and memory that is out."""

from contextlib import contextmanager


class InputError(Exception):
    """Bad input; its one-line message says what is wrong and what to do. Exit status 2."""


@contextmanager
def memory_errors():
    """A MemoryError where the host's memory is out, which torch tells by a plain RuntimeError."""
    try:
        yield
    except RuntimeError as error:
        if "can't allocate memory" in str(error) or "bad_alloc" in str(error):
            raise MemoryError("the host's") from error
        raise


@contextmanager
def reading(path):
    """Whatever goes wrong while this file is read and checked is an InputError, one line."""
    try:
        with memory_errors():
            yield
    except (InputError, MemoryError):
        raise
    except Exception as error:
        what = f"{type(error).__name__}: {str(error)[:200]}"
        raise InputError(f"{path} could not be read: {what}; --traceback shows more") from error
