"""FIND: the residual blocks of a model, and the gates that act on their branches."""
