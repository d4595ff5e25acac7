"""The errors a user can meet. Each message names what, where, the limit and the remedy.

One base class, one exit code a class, so that a CI job can tell a bad model from a missed budget:

====  ======================  =====================================================
code  class                   meaning
====  ======================  =====================================================
0     -                       done
1     -                       a bug in onnx-lrs (traceback shown)
2     ConfigError             the command line or a setting is wrong
3     ModelError              the model cannot be read, is not supported or does not run
4     DataError               the calibration data or labels cannot be used
5     BudgetError             the budget cannot be reached
6     VerificationError       the compressed model failed a check; nothing was written
7     OutputError             the result could not be written
8     RuntimeEnvironmentError ONNX Runtime is missing, doubled or lacks the provider
9     -                       nothing pays: the original was written, ``Result.unchanged`` says why
10    -                       compare --at-most: a model is slower than that, or may be
130   KeyboardInterrupt       Ctrl-C; nothing was written
====  ======================  =====================================================
"""

import errno


class OnnxLrsError(Exception):
    """Base of every error onnx-lrs raises on purpose.

    Parameters
    ----------
    message : str
        One or two sentences: what is wrong, where, and the limit that was passed.
    remedy : str
        What the user can do about it; empty if there is nothing to advise.
    """

    exit_code = 1

    def __init__(self, message: str, remedy: str = "") -> None:
        super().__init__(f"{message}\n{remedy}" if remedy else message)
        self.message = message
        self.remedy = remedy

    def __reduce__(self) -> tuple[type["OnnxLrsError"], tuple[str, str]]:
        """Keep both fields when an error crosses a process border."""
        return type(self), (self.message, self.remedy)


class ConfigError(OnnxLrsError):
    """A flag, setting or argument is out of its range, or two contradict each other."""

    exit_code = 2


class ModelError(OnnxLrsError):
    """The model is missing, damaged, unsafe, not supported, or does not run in ONNX Runtime."""

    exit_code = 3


class DataError(OnnxLrsError):
    """Calibration data or labels are missing, damaged, of a wrong shape, or not finite."""

    exit_code = 4


class BudgetError(OnnxLrsError):
    """The budget is below what the compressible layers allow."""

    exit_code = 5


class VerificationError(OnnxLrsError):
    """The compressed model failed a check before it was written."""

    exit_code = 6


class OutputError(OnnxLrsError):
    """The result could not be written; files that were there before are untouched."""

    exit_code = 7


def remedy_of(error: OSError, otherwise: str) -> str:
    """Return what helps where a temporary file could not be made or written; ``otherwise`` where it is about space."""
    if error.errno == errno.EMFILE:
        return "Allow more open files: ulimit -n 65536."
    return otherwise


class RuntimeEnvironmentError(OnnxLrsError):
    """ONNX Runtime is missing, installed twice, or a provider did not start."""

    exit_code = 8
