"""Reference experiments: models, data, recipes and a trainer. Not public API; needs ``resect[lab]``."""
