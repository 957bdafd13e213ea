"""The demo, from training to the report: what `resect demo` and `make demo` run."""
