"""Other libraries' ways of building, saving and loading a model; each is imported only when used."""
