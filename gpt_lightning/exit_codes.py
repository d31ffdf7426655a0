"""How the program ends, for schedulers and scripts; 2 is a user's mistake and 1 a fault of the program."""

NON_FINITE = 3  # a loss, a gradient or a weight became NaN or infinite
LOST_RANK = 4  # another process of the run was killed or stopped
WRITE_FAILED = 5  # a checkpoint could not be written
INTERRUPTED = 130  # SIGINT, after a checkpoint
TERMINATED = 143  # SIGTERM or SIGUSR1, after a checkpoint
