"""REPORT: what models cost, figures drawn from rows, and one self-contained page that shows it all."""
