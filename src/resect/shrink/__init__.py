"""SHRINK: take blocks out for good, prove that nothing else changed, save and load the result."""
