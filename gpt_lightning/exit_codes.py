"""Tells schedulers and scripts how the program ended; 1 is a fault of it, with its traceback."""

MISTAKE = 2  # an option, a file or a prompt that cannot be used
NON_FINITE = 3  # a loss, a gradient or a weight became NaN or infinite
LOST_RANK = 4  # another process of the run was killed or stopped
WRITE_FAILED = 5  # a checkpoint or a curve could not be written
INTERRUPTED = 130  # SIGINT, once steps are trained after a checkpoint
TERMINATED = 143  # SIGTERM or SIGUSR1, likewise


class UserError(ValueError):
    """Tells what a user can mend: option, value, rule and remedy, in the one line that ends the program.

    An error without an exit code is a fault of the program, whose traceback somebody will want to read.
    """

    exit_code = MISTAKE
