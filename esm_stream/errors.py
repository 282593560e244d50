"""Errors that are answers to the user: what is wrong, where, what to do; one exit code each.

Code that finds several mistakes collects them all and raises one error with the list, so that a
user mends a manifest or an expert once instead of once per run.
"""

from collections.abc import Sequence


class EsmStreamError(Exception):
    """Base of all errors a user can act on; the CLI prints the text and exits with the code."""

    exit_code = 1


class ManifestError(EsmStreamError):
    """The manifest cannot be read or asks for something that does not exist."""

    exit_code = 3


class InputError(EsmStreamError):
    """Base, experts or calibration data are damaged, missing or do not fit each other."""

    exit_code = 4

    def __init__(self, problems: Sequence[str]) -> None:
        """Keep the list; the text is one problem per line."""
        self.problems = tuple(problems)
        super().__init__("\n".join(problems))

    def __reduce__(self) -> tuple[type["InputError"], tuple[tuple[str, ...]]]:
        """Pickle by the list, not by the text: errors come back from worker processes."""
        return type(self), (self.problems,)


class UnsupportedModelError(EsmStreamError):
    """The model's forward cannot be streamed block by block; the text says why."""

    exit_code = 5


class BudgetError(EsmStreamError):
    """A task needs more memory, or the run more disk, than there is."""

    exit_code = 6


class LockedError(EsmStreamError):
    """Another run holds the work directory."""

    exit_code = 7


class ChangedError(EsmStreamError):
    """The work directory belongs to a merge with other options or inputs."""

    exit_code = 8


class DataError(EsmStreamError):
    """A tensor holds NaN or Inf, or a merge met numbers it cannot use."""

    exit_code = 9


class TaskError(EsmStreamError):
    """A task failed for a reason that is not the user's input; the text names the task."""

    exit_code = 10


class StopRequestedError(EsmStreamError):
    """The run was asked to stop (Ctrl-C, SIGTERM); finished work is kept."""

    exit_code = 130
