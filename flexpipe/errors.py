"""What goes wrong in words a user can act on.

Every error a user can cause is a `FlexpipeError`: its text says what was asked, the fact it met and
a change that would work. The command line prints the text and exits with `exit_code`; only a bug
shows a traceback.
"""


class FlexpipeError(Exception):
    """Base of all errors whose text is meant for the user."""

    exit_code = 1


class InputError(FlexpipeError):
    """A prompt file, an option or an output path cannot be used as given."""

    exit_code = 2


class PolicyError(FlexpipeError):
    """The knobs contradict each other or the device."""

    exit_code = 2


class ModelError(FlexpipeError):
    """A model or its checkpoint is unknown, incomplete or misshapen."""

    exit_code = 3


class PlanError(FlexpipeError):
    """The plan does not fit the budgets; the text holds the shortfall per tier."""

    exit_code = 4


class RunError(FlexpipeError):
    """The run stopped: a lane failed, a disk filled up, a device was lost."""

    exit_code = 5
