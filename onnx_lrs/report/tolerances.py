"""How far a measured figure may lie beyond the one that was asked for and still count as kept."""

SLOWER = 1.02  # times a latency: less may be noise of the measurement
ROUNDING = 1e-3  # of a guaranteed error: the file's float32 weights
