"""TRAIN: methods that attach to a model; the loop stays the user's own."""
